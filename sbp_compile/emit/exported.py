"""The small network as an exported program, with the call structure of the original."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim, ExportedProgram, ShapesCollection

from passes.ir.program import Program
from sbp_compile.capture.call import Call
from sbp_compile.capture.export import quiet_export
from sbp_compile.emit.module import CompiledModule


def exported_program(module: CompiledModule, program: Program, call: Call) -> ExportedProgram:
    """Return `module` (emitted from `program`) captured with the same dynamic axes as the original."""
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]  # torch leaves it without types
    tensors = []
    for entry in program.inputs:
        tensor = torch.zeros(entry.sizes, dtype=entry.dtype)
        pairs = enumerate(zip(entry.sizes, entry.other_sizes, strict=True))
        shapes[tensor] = {axis: Dim.AUTO for axis, (size, other) in pairs if size != other}
        tensors.append(tensor)
    args, kwargs = call.nest_arguments(tensors)
    with torch.no_grad(), quiet_export():
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
