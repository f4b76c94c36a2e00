"""Control flow that is decided at capture, and sequences of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sbp_compile.capture.from_onnx.graph import Graph
from sbp_compile.capture.from_onnx.node import Node, translates
from sbp_compile.capture.from_onnx.values import Known, Value, axis_of, known, number, numbers, tensor

WITH_GRAPHS = frozenset({"If", "Loop"})
_MOST_ITERATIONS = 1_000
_MOST_STEPS = 10_000
Run = Callable[[Graph, dict[str, Value]], list[Value]]


@translates("If")
def _branch(node: Node, condition: Value, *, run: Run, outside: dict[str, Value]) -> tuple[Value, ...]:
    if not isinstance(condition, Known):
        raise node.refusal(
            "its condition depends on the values of a tensor: branches on data cannot be compiled; export the branch "
            "that is used"
        )
    taken = node.get("then_branch" if condition.numbers[0] else "else_branch")
    return tuple(run(taken, dict(outside)))


@translates("Loop")
def _loop(
    node: Node, count: Value, condition: Value, *carried: Value, run: Run, outside: dict[str, Value]
) -> tuple[Value, ...]:
    """Unroll a loop whose number of steps is known; what it collects in each step is stacked."""
    body: Graph = node.get("body")
    most = _MOST_ITERATIONS + 1 if count is None else number(node, count, "number of iterations")
    if not isinstance(most, int):
        raise node.refusal(
            "its number of iterations is a size that is open; export the network with that size fixed"
        )
    state: list[Value] = list(carried)
    collected: list[list[Tensor]] = [[] for _ in body.outputs[1 + len(state) :]]
    goes_on, step = condition, 0
    while step < most and _decided(node, goes_on):
        if step >= _MOST_ITERATIONS or len(body.nodes) * step > _MOST_STEPS:
            raise node.refusal(f"it runs over {step} times and is not unrolled further")
        given = dict(zip(body.inputs, [known(step), _true(), *state], strict=True))
        goes_on, *results = run(body, {**outside, **given})
        state, parts = results[: len(state)], results[len(state) :]
        for held, part in zip(collected, parts, strict=True):
            held.append(tensor(part))
        step += 1
    if collected and not step:
        raise node.refusal("it never runs, so what it collects has no shape")
    return (*state, *(torch.stack(parts) for parts in collected))


def _decided(node: Node, condition: Value) -> bool:
    if condition is None:
        return True
    if not isinstance(condition, Known):
        raise node.refusal(
            "whether it goes on depends on the values of a tensor: such loops cannot be compiled"
        )
    return bool(condition.numbers[0])


def _true() -> Known:
    return known(True, torch.bool)


@translates("SequenceConstruct")
def _sequence(node: Node, *items: Value) -> list[Any]:
    return list(items)


@translates("SequenceEmpty")
def _empty(node: Node) -> list[Any]:
    return []


@translates("SequenceAt")
def _item(node: Node, items: Any, position: Value) -> Value:
    return items[number(node, position, "position")]  # type: ignore[no-any-return]


@translates("SequenceLength")
def _length(node: Node, items: Any) -> Known:
    return known(len(items))


@translates("SequenceInsert")
def _insert(node: Node, items: Any, item: Value, position: Value = None) -> list[Any]:
    place = len(items) if position is None else number(node, position, "position")
    return [*items[:place], item, *items[place:]]


@translates("ConcatFromSequence")
def _joined(node: Node, items: Any) -> Tensor:
    tensors = [tensor(item) for item in items]
    if node.get("new_axis", 0):
        return torch.stack(tensors, axis_of(node, node.get("axis"), tensors[0].ndim + 1))
    return torch.cat(tensors, axis_of(node, node.get("axis"), tensors[0].ndim))


@translates("SplitToSequence")
def _split(node: Node, x: Value, sizes: Value = None) -> list[Any]:
    value = tensor(x)
    axis = axis_of(node, node.get("axis", 0), value.ndim)
    if sizes is None:
        parts = list(torch.split(value, 1, axis))
        return parts if node.get("keepdims", 1) else [part.squeeze(axis) for part in parts]
    given = numbers(node, sizes, "sizes")
    single = isinstance(sizes, Known) and sizes.entries.ndim == 0
    return list(torch.split(value, given[0] if single else given, axis))
