"""Numbers among the arguments of calls, written so that torch's ONNX exporter takes them for what they are.

Those close to 0 and 1 become tensors with one axis: its optimiser leaves out `x + c` and `x - c` where |c| <= 1e-8, and
`x * c` and `x / c` where c is within 1e-5 of 1, for scalars. So the 1e-12 of `y / (y.norm() + 1e-12)` is gone from its
file, which divides 0 by 0 where the network does not.

The bounds of a clamp become floats where only one of them is: it has no translation for a pair of types.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from passes.ir.program import Program
from passes.ir.rewriter import Rewriter, with_replaced

aten = torch.ops.aten

NEUTRAL: dict[Any, float] = {
    aten.add.Tensor: 0.0,
    aten.sub.Tensor: 0.0,
    aten.mul.Tensor: 1.0,
    aten.div.Tensor: 1.0,
}
MARGIN = 1e-4  # wider than the optimiser's: what is kept for nothing costs nothing


def keep_scalars(program: Program) -> Program:
    """Return the Program with such numbers written so that the exporter keeps them."""
    return with_replaced(program, lambda rewriter, node: _clamp(rewriter, node) or _kept(rewriter, node))


def _clamp(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """A clamp with an int and a float, both as floats."""
    bounds = node.args[1:]
    if node.target is not aten.clamp.default or {type(bound) for bound in bounds} != {int, float}:
        return None
    floats = [float(bound) for bound in bounds]  # type: ignore[arg-type]
    return rewriter.call(node.target, (*rewriter.map(node.args[:1]), *floats), like=node)


def _kept(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """The same call with its scalars as tensors of shape (1,); None where there is none that is in danger."""
    program = rewriter.program
    neutral, info = NEUTRAL.get(node.target), program.infos.get(node)
    if neutral is None or info is None or not info.dtype.is_floating_point:
        return None
    numbers = [_number(program, argument) for argument in node.args]
    if not any(_is_in_danger(number, neutral) for number in numbers):
        return None
    if not any(program.infos[x].dtype == info.dtype for x in node.all_input_nodes if program.held(x) is None):
        return None
    dtype = node.meta.get("dtype", info.dtype)

    def argument(value: Any, number: float | None) -> Any:
        if number is None or not _is_in_danger(number, neutral):
            return rewriter.map(value)
        return rewriter.constant(torch.tensor([number], dtype=torch.float64), f"{node.name}_number", dtype)

    args = [argument(value, number) for value, number in zip(node.args, numbers, strict=True)]
    if info.rank > 0:
        return rewriter.call(node.target, args, dict(node.kwargs), like=node)
    whole = rewriter.call(node.target, args, dict(node.kwargs), like=node, step="whole")
    return rewriter.call(aten.squeeze.dim, (whole, 0), like=node)


def _number(program: Program, argument: Any) -> float | None:
    """The value of an argument that is one number, written out or held as a tensor without axes."""
    if isinstance(argument, (int, float)):
        return float(argument)
    held = program.held(argument) if isinstance(argument, fx.Node) else None
    if held is None or len(held.shape) or not program.infos[argument].dtype.is_floating_point:
        return None
    return float(held.read())


def _is_in_danger(number: float | None, neutral: float) -> bool:
    return number is not None and number != neutral and math.isclose(number, neutral, abs_tol=MARGIN)
