"""What torch does not publish about an operator, wrapped in one place.

tests/passes/ir/test_schema.py says when it breaks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


def is_overload(target: object) -> bool:
    """Whether `target` is an ATen-style operator overload such as `torch.ops.aten.relu.default`."""
    return isinstance(target, torch._ops.OpOverload)


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by their schema names, defaults filled in, in schema order."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def call(node: fx.Node, value_of: Callable[[fx.Node], Any], **changed: Any) -> Any:
    """Call a node's target with every node among its arguments replaced; `changed` overrides keywords.

    A view is called as a reshape: memory lies as the device and dtype of the operators before it have it.
    """
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
    target: Any = (
        torch.ops.aten.reshape.default if node.target is torch.ops.aten.view.default else node.target
    )
    return target(*args, **{**kwargs, **changed})


def is_deterministic(target: object) -> bool:
    """Whether equal inputs give equal results and nothing is mutated."""
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in {"_operator", "operator", "math", "builtins"}
    random = torch.Tag.nondeterministic_seeded in target.tags or target._schema.name in _RANDOM
    return not random and not target._schema.is_mutable


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers: what torch tags so, unless it is told not to (dropout in eval mode)."""
    if (
        not isinstance(node.target, torch._ops.OpOverload)
        or torch.Tag.nondeterministic_seeded not in node.target.tags
    ):
        return False
    bound = bind(node)
    if bound.get("train", bound.get("training", True)) is False:
        return False
    return bool(bound.get("dropout_p", bound.get("dropout", 1.0)))


_RANDOM = frozenset(f"aten::{name}" for name in ("empty", "empty_like", "new_empty", "empty_strided"))
