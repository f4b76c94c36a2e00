"""For a recipe: the zeros that switch channels off, found in one checkpoint and put into another.

A checkpoint switches channels off by zeros in factors: in what a value is multiplied with (noise, masks, the scale of
a norm), and in whole rows and columns of weights. Those zeros are the masks of a recipe; everything else that makes a
channel constant or unread follows from them and from the architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir import schema
from passes.ir.program import Program
from passes.ir.rewriter import Rewriter

aten = torch.ops.aten


@dataclass(frozen=True)
class Mask:
    """Zeros in one constant operand of a call: all entries at `zeros` along `axis`, or flat positions (axis None).

    `value`: the call; `argument`: the operand's name, or the name of a list and the position in it; `shape`: of the
    operand.
    """

    value: str
    argument: tuple[str, int | None]
    shape: tuple[int, ...]
    axis: int | None
    zeros: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many positions there are, of which `zeros` are some."""
        return torch.Size(self.shape).numel() if self.axis is None else self.shape[self.axis]

    def factor(self) -> Tensor:
        """Return 0 at the zeros and 1 elsewhere; float64, shape of the operand, or size 1 along all other axes."""
        factor = torch.ones(self.size, dtype=torch.float64)
        factor[list(self.zeros)] = 0.0
        if self.axis is None:
            return factor.reshape(self.shape)
        return factor.reshape([-1 if axis == self.axis else 1 for axis in range(len(self.shape))])


Axes = Sequence[int | None]
FLAT: Axes = (None,)
_WEIGHT: dict[str, Axes] = {"weight": (0, 1)}
_SCALE: dict[str, Axes] = {"weight": FLAT}
# Of each operator: the operands that multiply, and the axes whose slices are rows, columns or channels.
_FACTORS: dict[Any, dict[str, Axes]] = {
    aten.mul.Tensor: {"self": FLAT, "other": FLAT},
    aten.matmul.default: {"self": (-2, -1), "other": (-2, -1)},
    aten.mm.default: {"self": (-2, -1), "mat2": (-2, -1)},
    aten.bmm.default: {"self": (-2, -1), "mat2": (-2, -1)},
    aten.addmm.default: {"mat1": (-2, -1), "mat2": (-2, -1)},
    aten.embedding.default: {"weight": (1,)},
    **{getattr(aten, f"conv{rank}d").default: _WEIGHT for rank in (1, 2, 3)},
    **{getattr(aten, f"conv{rank}d").padding: _WEIGHT for rank in (1, 2, 3)},
    aten.conv_transpose1d.default: _WEIGHT,
    aten.conv_transpose2d.input: _WEIGHT,
    aten.conv_transpose3d.input: _WEIGHT,
    aten.linear.default: _WEIGHT,
    aten._native_batch_norm_legit_no_training.default: _SCALE,
    aten.native_batch_norm.default: _SCALE,
    aten.batch_norm.default: _SCALE,
    aten.layer_norm.default: _SCALE,
    aten.rms_norm.default: _SCALE,
    aten.group_norm.default: _SCALE,
    aten.instance_norm.default: _SCALE,
    aten.lstm.input: {"params": (1,)},
    aten.gru.input: {"params": (1,)},
    aten.rnn_tanh.input: {"params": (1,)},
    aten.rnn_relu.input: {"params": (1,)},
}


def find_masks(program: Program) -> tuple[Mask, ...]:
    """Return the masks of a captured network, in graph order."""
    values = constant_values(program)
    return tuple(
        mask
        for node in program.calls()
        if node not in values
        for argument, axes, operand in factors(node)
        if operand in values
        for mask in _masks_of(node.name, argument, axes, values[operand])
    )


def factors(node: fx.Node) -> Iterator[tuple[tuple[str, int | None], Axes, fx.Node]]:
    """Yield (argument, axes, operand) of a call's operands that multiply."""
    bound = schema.bind(node) if node.target in _FACTORS else {}
    for name, axes in _FACTORS.get(node.target, {}).items():
        operand = bound[name]
        listed = enumerate(operand) if isinstance(operand, (list, tuple)) else [(None, operand)]
        for position, item in listed:
            if isinstance(item, fx.Node):
                yield (name, position), axes, item


def constant_values(program: Program) -> dict[fx.Node, Tensor]:
    """Return the value of every node that depends on constants alone."""
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            values[node] = program.constant(node)
        elif node.op == "call_function" and schema.is_deterministic(node.target):
            operands = node.all_input_nodes
            if operands and all(operand in values for operand in operands):
                with torch.no_grad():
                    values[node] = schema.call(node, values.__getitem__)
    return {node: value for node, value in values.items() if isinstance(value, Tensor)}


def _masks_of(name: str, argument: tuple[str, int | None], axes: Axes, value: Tensor) -> Iterator[Mask]:
    """Yield the masks in one operand; a single number is a factor of the architecture and no mask."""
    if not value.is_floating_point() or value.numel() < 2:
        return
    for axis in axes:
        if axis is not None and value.ndim < 2:
            continue
        place = None if axis is None else axis % value.ndim
        others = [other for other in range(value.ndim) if other != place]
        zero = (value == 0).flatten() if place is None else (value == 0).all(dim=others)
        if bool(zero.any()):
            yield Mask(name, argument, tuple(value.shape), place, tuple(zero.nonzero().flatten().tolist()))


def masked(program: Program, masks: Sequence[Mask]) -> Program:
    """Return the captured network with these zeros put into its constant operands.

    Each mask must name an operand of the program that has the mask's shape.
    """
    by_value: dict[str, list[Mask]] = {}
    for mask in masks:
        by_value.setdefault(mask.value, []).append(mask)
    rewriter = Rewriter(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node.op == "call_function":
            rewriter.env[node] = _with_masks(rewriter, node, by_value.get(node.name, []))
    rewriter.output()
    return rewriter.finish()


def _with_masks(rewriter: Rewriter, node: fx.Node, masks: Sequence[Mask]) -> fx.Node:
    """Emit a call with its masked operands."""
    bound = schema.bind(node) if masks else {}
    changed: dict[tuple[str, int | None], fx.Node] = {}
    for argument in dict.fromkeys(mask.argument for mask in masks):
        name, position = argument
        operand = bound[name] if position is None else bound[name][position]
        factor = torch.ones((), dtype=torch.float64)
        for mask in masks:
            if mask.argument == argument:
                factor = factor * mask.factor()
        changed[argument] = _masked_operand(rewriter, node, operand, factor)
    if not changed:
        return rewriter.copy(node)

    def replaced(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [
                changed.get((name, position)) or rewriter.map(item) for position, item in enumerate(value)
            ]
        return changed.get((name, None)) or rewriter.map(value)

    names = list(bound)
    args = [replaced(name, value) for name, value in zip(names, node.args, strict=False)]
    kwargs = {name: replaced(name, value) for name, value in node.kwargs.items()}
    return rewriter.call(node.target, args, kwargs, like=node)


def _masked_operand(rewriter: Rewriter, node: fx.Node, operand: fx.Node, factor: Tensor) -> fx.Node:
    value = rewriter.program.constant(operand)
    if value is not None:
        return rewriter.constant(value * factor, str(operand.target), rewriter.dtype_of(operand))
    mask = rewriter.constant(factor, f"{node.name}_mask", torch.float32)
    return rewriter.call(aten.mul.Tensor, (rewriter.value(operand), mask), like=node, step="masked")
