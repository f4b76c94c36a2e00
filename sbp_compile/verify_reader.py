"""The proof that a graph was read rightly: another runtime runs the user's file, and both must give the same.

`verify_capture` allows what a capture may lose to rounding at most. Here translations are on trial, so the limit is
what this very graph loses to rounding in its own dtype, measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from passes.ir.program import Program
from sbp_compile.emit.module import emit_graph_module
from sbp_compile.errors import UnsupportedModelError
from sbp_compile.verify import TOLERANCES, Reference, has_fractions, output_error, relative_error

READER_NOISE_FACTOR = 10.0


def verify_reader(
    original: Program, references: Sequence[Reference], locate: Callable[[Sequence[Tensor]], str]
) -> None:
    """Raise `UnsupportedModelError` where the user's own run and the graph that was read are no rounding apart.

    The limit for floats is 1e-5 (float32), or ten times the error of the same graph in its own dtype; what is no float
    must be equal, or be what a tiny change of the weights gives. `locate`: where the values part for some inputs.
    """
    rounded = emit_graph_module(original)
    for reference in references:
        with torch.no_grad():
            in_own_dtype = rounded(*reference.inputs)
        for position, (own, exact) in enumerate(zip(reference.own, reference.exact, strict=True)):
            noise = 0.0
            if has_fractions(exact):
                noise = relative_error(exact, in_own_dtype[position])
            limit = max(reference.tolerance(TOLERANCES), READER_NOISE_FACTOR * noise)
            error = output_error(exact, own, [other[position] for other in reference.shifted])
            if not error <= limit:
                shapes = [list(value.shape) for value in reference.inputs]
                raise UnsupportedModelError(
                    f"output {position} as onnxruntime computes it differs by {error:.1e} from what was read of the "
                    f"file (limit {limit:.1e}), for shapes {shapes}; they part at {locate(reference.inputs)}; "
                    "please report this, and give the PyTorch module or TorchScript instead"
                )
