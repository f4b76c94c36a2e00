"""Calls with a floating-point dtype among their arguments, in a network that may be cast: the anchor has the dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
ANCHOR = "dtype_anchor"


def has_float_literal(value: Any) -> bool:
    """Whether a floating-point dtype is among the arguments of a call."""
    if isinstance(value, torch.dtype):
        return value.is_floating_point
    if isinstance(value, (list, tuple)):
        return any(has_float_literal(item) for item in value)
    return isinstance(value, dict) and any(has_float_literal(item) for item in value.values())


def complex_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the complex dtype of a network whose floating-point dtype this is."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def narrowed(value: Any, dtype: torch.dtype) -> Any:
    """Return arguments with the complex dtypes among them as a network of that floating-point dtype has them."""
    if isinstance(value, torch.dtype):
        return complex_dtype(dtype) if value.is_complex else value
    if isinstance(value, (list, tuple)):
        return type(value)(narrowed(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: narrowed(item, dtype) for key, item in value.items()}
    return value


CREATIONS = {
    aten.full.default: aten.new_full.default,
    aten.zeros.default: aten.new_zeros.default,
    aten.ones.default: aten.new_ones.default,
}


def follow_anchor(
    graph: fx.Graph, node: fx.Node, args: Any, kwargs: dict[str, Any], anchor: fx.Node
) -> fx.Node:
    """Rewrite a call with a floating-point dtype literal: at run time the anchor gives the dtype."""
    if node.target in CREATIONS:
        return graph.create_node("call_function", CREATIONS[node.target], (anchor, *args), {}, name=node.name)
    if node.target in {aten._to_copy.default, aten.to.dtype}:
        return graph.create_node("call_function", aten.type_as.default, (args[0], anchor), {}, name=node.name)
    plain = {key: value for key, value in kwargs.items() if not isinstance(value, torch.dtype)}
    plain_args = tuple(None if isinstance(value, torch.dtype) else value for value in args)
    result = graph.create_node("call_function", node.target, plain_args, plain, name=node.name)
    return graph.create_node("call_function", aten.type_as.default, (result, anchor), {})
