"""One call of an exported graph as a Program has it: in float64 (complex128), on the CPU, whatever torch's defaults."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from passes.ir import schema
from passes.ir.constants import Held, is_large
from passes.ir.program import Origin
from sbp_compile.errors import UnsupportedModelError

aten = torch.ops.aten

WIDENED = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64, torch.complex128), torch.complex128),
}


def copy_call(graph: fx.Graph, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> fx.Node:
    """Copy a call to the new graph; a result that torch's default dtype decides on is cast to float64.

    Such are `ones(2)`, or a quotient of integers: nothing among the arguments would make it float64.
    Raises UnsupportedModelError for random numbers, and for a result that depends on how a tensor lies in memory.
    """
    args, kwargs = widened_literals(args), widened_literals(kwargs)
    if schema.is_random(node):
        raise UnsupportedModelError(
            f"{node.name} ({node.target}) draws random numbers in eval mode, so there is no one function to "
            "compile; take it out of the model's forward or pass its result as an input"
        )
    strided = node.args[0] if node.target is aten.as_strided.default else None
    if isinstance(strided, fx.Node) and not strided.meta["val"].is_contiguous():
        raise UnsupportedModelError(
            f"{node.name} ({node.target}) reads the memory of a tensor that is not contiguous, so its result "
            "depends on how that tensor was computed; call contiguous() in front of it"
        )
    if node.target is aten.rms_norm.default and schema.bind(node)["eps"] is None:
        args, kwargs = args[:3], {**kwargs, "eps": _smallest_step(node)}
    made = _takes_default_dtype(node)
    call = graph.create_node(
        "call_function", node.target, args, kwargs, name=f"{node.name}_made" if made else node.name
    )
    if made:
        call = graph.create_node(
            "call_function", aten._to_copy.default, (call,), {"dtype": torch.float64}, name=node.name
        )
    call.meta = provenance(node)
    return call


def _smallest_step(node: fx.Node) -> float:
    """Return the eps that an RMS norm without one takes: that of the dtype it computes in."""
    dtype = node.meta["val"].dtype
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _takes_default_dtype(node: fx.Node) -> bool:
    values = [operand.meta.get("val") for operand in node.all_input_nodes]
    literals = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.dtype)]
    result = node.meta.get("val")
    return (
        isinstance(result, Tensor)
        and result.is_floating_point()
        and not any(_is_floating(value) for value in values)
        and not any(value.is_floating_point for value in literals)
    )


def _is_floating(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_floating(item) for item in value)
    return isinstance(value, Tensor) and value.is_floating_point()


def widened(value: Tensor, *, copy: bool = True) -> Held:
    """Return a tensor of the user's as a constant: float64 (complex128) on the CPU.

    Without `copy` a large one is the user's own, who must not change it; and it is held as wide as it is.
    """
    value, wide = value.detach(), WIDENED.get(value.dtype, value.dtype)
    if not is_large(value) or wide != torch.float64 or not value.is_contiguous():
        return Held(value.to("cpu", wide, copy=True), wide)
    return Held(value.to("cpu", copy=copy), wide)


def widened_literals(value: Any) -> Any:
    """Make dtype literals follow the constants to float64, and devices follow them to the CPU."""
    if isinstance(value, torch.dtype):
        return WIDENED.get(value, value)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, (list, tuple)):
        return type(value)(widened_literals(item) for item in value)
    if isinstance(value, dict):
        return {key: widened_literals(item) for key, item in value.items()}
    return value


def provenance(node: fx.Node) -> dict[str, Any]:
    """Return what a node of a Program says of where it came from: origin, dtype and module."""
    meta: dict[str, Any] = {"origin": Origin(node.name)}
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        meta["dtype"] = value.dtype
    stack = node.meta.get("nn_module_stack")
    if stack:
        meta["module"] = list(stack.values())[-1][0]
    return meta
