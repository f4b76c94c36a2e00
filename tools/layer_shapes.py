"""The layers of a Program: convolutions, transposed ones, linear maps and products with a constant factor.

A layer is what multiplies something that depends on the network's input by something that does not, its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from passes.ir import schema
from passes.ir.program import Program

aten = torch.ops.aten

CONVOLUTIONS: dict[object, int] = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
TRANSPOSED: dict[object, int] = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}
PRODUCTS: dict[object, tuple[int, int]] = {  # the positions of the two factors
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}


@dataclass(frozen=True)
class Shape:
    """One layer's geometry: nodes of the call, its input and its weight; negative channel axes of input and result."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    x_axis: int
    y_axis: int
    groups: int = 1
    padded: bool = False

    @property
    def is_convolution(self) -> bool:
        return self.node.target in CONVOLUTIONS or self.node.target in TRANSPOSED

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (groups, out per group, in per group, taps)."""
        if self.node.target in TRANSPOSED:
            ins, outs = weight.shape[0] // self.groups, weight.shape[1]
            return weight.reshape(self.groups, ins, outs, -1).transpose(1, 2)
        if self.node.target in PRODUCTS:
            stack = weight.reshape(-1, *weight.shape[-2:])
            return (stack.permute(2, 1, 0) if self.y_axis == -1 else stack.permute(1, 2, 0))[None]
        return weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)


def layers(program: Program) -> Iterator[Shape]:
    """Every layer of a Program that depends on its input, in order."""
    dependent = dependent_nodes(program)
    for node in program.calls():
        found = _product(node, program, dependent) if node.target in PRODUCTS else _layer(node, program)
        if found is not None and found.x in dependent and found.weight not in dependent:
            yield found


def dependent_nodes(program: Program) -> set[fx.Node]:
    """The nodes that the network's input reaches, dead or not."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def _product(node: fx.Node, program: Program, dependent: set[fx.Node]) -> Shape | None:
    factors = [node.args[position] for position in PRODUCTS[node.target]]
    ranks = [program.infos[factor].rank if factor in program.infos else 0 for factor in factors]  # type: ignore[index]
    if node not in program.infos or min(ranks) < 2:
        return None
    left, right = factors
    if left in dependent:
        return Shape(node, left, right, -1, -1)  # type: ignore[arg-type]
    return Shape(node, right, left, -2, -2)  # type: ignore[arg-type]


def _layer(node: fx.Node, program: Program) -> Shape | None:
    rank = CONVOLUTIONS.get(node.target, TRANSPOSED.get(node.target, 0))
    if node not in program.infos or not (rank or node.target is aten.linear.default):
        return None
    args = schema.bind(node)
    padding = args.get("padding", 0)
    wide = (
        padding != "valid"
        if isinstance(padding, str)
        else any([padding] if isinstance(padding, int) else padding)
    )
    padded = wide or node.target in TRANSPOSED
    return Shape(node, args["input"], args["weight"], -1 - rank, -1 - rank, args.get("groups", 1), padded)


def unsized_layers(program: Program) -> int:
    """How many calls would be layers if their sizes could be derived without data."""
    kinds = CONVOLUTIONS.keys() | TRANSPOSED.keys() | PRODUCTS.keys() | {aten.linear.default}
    return sum(node.target in kinds and node not in program.infos for node in program.calls())


def layer_macs(program: Program) -> dict[str, int]:
    """Multiply-adds of each layer for one example, by node name."""
    return {shape.node.name: macs_of(shape, program) for shape in layers(program)}


def macs_of(shape: Shape, program: Program) -> int:
    """Positions times the weight's entries, for one example of the first example shape."""
    transposed = shape.node.target in TRANSPOSED
    sizes = program.infos[shape.x if transposed else shape.node].sizes
    positions = torch.Size(sizes).numel() // max(sizes[shape.x_axis if transposed else shape.y_axis], 1)
    weight = program.infos[shape.weight].sizes
    entries = torch.Size(weight[-2:] if shape.node.target in PRODUCTS else weight).numel()
    batch = program.inputs[0].sizes[0] if program.inputs and program.inputs[0].sizes else 1
    return positions * entries // (batch if positions % batch == 0 else 1)
