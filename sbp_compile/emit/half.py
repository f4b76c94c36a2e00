"""The small network in half precision: weights and computation in float16, the interface as it was or float16, too."""

from __future__ import annotations

import dataclasses

import torch

from passes.ir.program import Program


def with_half_interface(program: Program) -> Program:
    """Return the Program with float16 wherever an input or output is floating point."""
    inputs = tuple(
        dataclasses.replace(entry, dtype=torch.float16) if entry.dtype.is_floating_point else entry
        for entry in program.inputs
    )
    outputs = tuple(
        torch.float16 if dtype is not None and dtype.is_floating_point else dtype
        for dtype in program.output_dtypes
    )
    return program.replace(inputs=inputs, output_dtypes=outputs)
