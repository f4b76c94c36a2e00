"""What a half-precision file is compared with: the original as it is, at the tolerance of float16."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir import schema
from passes.ir.program import Program
from sbp_compile.errors import UnsupportedModelError
from sbp_compile.verify import Reference, described, make_reference, verify_file

HALF_TIE_MARGIN = 5e-3
ROUNDED_TO_HALF = "the rounding to float16; write the network without fp16"


def half_references(
    original: Program, references: Sequence[Reference], *, interface: bool
) -> tuple[Reference, ...]:
    """Return references for a float16 version of the network: a tolerance of 1e-2, of `TOLERANCES` in verify.py.

    With `interface`, its inputs and outputs are float16 as well. Classes and comparisons may be what the original
    gives after a change of its weights by 0.5%, ten times the rounding of float16. Raises
    `UnsupportedModelError` where a finite input or output of the original is beyond the range of float16.
    """
    found = []
    for reference in references:
        if reference.shifted:
            reference = make_reference(original, reference.inputs, reference.own, margin=HALF_TIE_MARGIN)
        reference = dataclasses.replace(reference, dtypes=reference.dtypes | {torch.float16})
        if interface:
            inputs = tuple(_half(value, "an input") for value in reference.inputs)
            own = tuple(
                _half(value, "an output") if isinstance(value, Tensor) else value for value in reference.own
            )
            reference = dataclasses.replace(reference, inputs=inputs, own=own)
        found.append(reference)
    return tuple(found)


def verify_half_arithmetic(
    small: Program, references: Sequence[Reference], names: Sequence[str | None]
) -> None:
    """Run the small network with every value rounded to float16, and compare.

    A CPU's runtime may compute a float16 file in float32, which hides an overflow that any GPU would have. Raises
    `UnsupportedModelError` where a finite value is infinite after rounding, `VerificationError` outside the tolerance.
    """

    def run_one(inputs: Sequence[Tensor]) -> list[Tensor]:
        results = run_in_half(small, inputs)
        return [
            value.to(dtype)
            for value, dtype, name in zip(results, small.output_dtypes, names, strict=True)
            if name is not None
        ]

    verify_file(run_one, references, names, "float16 arithmetic", lambda _: ROUNDED_TO_HALF)


def run_in_half(program: Program, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return the flat outputs where each value, constants included, is computed in float64 and rounded to float16."""
    feeds = {entry.name: value for entry, value in zip(program.inputs, inputs, strict=True)}
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "output":
                return tuple(fx.node.map_arg(node.args[0], env.__getitem__))
            if node.op == "call_function":
                value = schema.call(node, env.__getitem__)
            else:
                value = feeds[str(node.target)] if node.op == "placeholder" else program.constant(node)
            env[node] = fx.node.map_aggregate(value, functools.partial(_rounded, node))
    raise AssertionError("a graph ends with its output")


def _rounded(node: fx.Node, value: Any) -> Any:
    """Return a value as float16 would hold it, in float64."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return _half(value, f"the value {described(node)}").to(torch.float64)


def _half(value: Tensor, name: str) -> Tensor:
    if not value.is_floating_point():
        return value
    rounded = value.to(torch.float16)
    if bool((torch.isinf(rounded) & torch.isfinite(value)).any()):
        largest = float(value[torch.isfinite(value)].abs().max())
        raise UnsupportedModelError(
            f"{name} reaches {largest:.3g}, beyond the range of float16 (65504); write the network without fp16"
        )
    return rounded
