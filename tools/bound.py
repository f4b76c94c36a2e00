"""A bound on what masks leave of a network, measured by running it, without the compiler's analysis.

A layer is a convolution (transposed or not), or a linear map or matrix product with an operand that does not depend on
the network's input (its weight). It needs at least a multiply-add for each position, kernel tap and pair of

- an input channel that depends on the network's input and meets a weight that is not zero in such a row, or stands
  for constants (below);
- an output channel that depends on the network's input and that a gradient of a random projection of the outputs
  reaches through this layer's own result: masked on one side of an add it is dead there, whatever the other side keeps.

In a grouped convolution both lie in the same group. Positions of a convolution all count; of a linear layer's static
leading axes only the indices that depend on the input and are reached. Products of two values that both depend on the
input are no layers and have no bound, nor have recurrent cells.

Measured in float64 on SAMPLES random inputs that run side by side, so that what differs between them is known at each
operator. Whether a rectifier is on, a sigmoid not saturated or an entry the largest is a matter of chance: such an
operator (FLAT, EXTREMA) gets SLOPE times those entries of its operand added that differ between the samples, so that
only what is constant for every input stops values and gradients. (A rectifier that is off for every input since its
operand has a bounded range counts as live.)

Constants: where the input channels that are constant and read add something that varies over positions (a border, a
depthwise convolution's constant maps), no bias can hold it, and channels must stand for them: as many as the maps of
these channels have rank; up to a constant where nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from layer_shapes import PRODUCTS, Shape, dependent_nodes, layers, macs_of
from torch import Tensor, fx

from passes.ir import schema
from passes.ir.program import Input, Program

aten = torch.ops.aten

SAMPLES = 3
SLOPE = 0.1
TOLERANCE = 1e-10
FLAT = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.hardtanh.default,
        aten.hardsigmoid.default,
        aten.hardswish.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.threshold.default,
        aten.hardshrink.default,
        aten.softshrink.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.erf.default,
        aten.silu.default,
        aten.gelu.default,
        aten.mish.default,
        aten.elu.default,
        aten.softplus.default,
        aten.log_sigmoid.default,
    }
)
EXTREMA = frozenset({aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim})
EXTREMA_OF_TWO = frozenset({aten.maximum.default, aten.minimum.default})


@dataclass(frozen=True)
class Bound:
    """What one layer needs at least; the counts are of channels.

    `name`: of the node; `standing`: input channels that stand for constants; `macs`: multiply-adds at full width;
    `unit`: those of one pair of channels; `needed`: the bound itself.
    """

    name: str
    groups: int
    inputs: int
    live_inputs: int
    standing: int
    outputs: int
    live_outputs: int
    macs: int
    unit: float
    needed: float


def bounds(program: Program, examples: Sequence[Tensor], seed: int = 0) -> list[Bound]:
    """The bound of every layer of a network as captured; `examples` say what its inputs look like."""
    shapes = list(layers(program))
    run = _Run(program, {shape.node for shape in shapes}, _samples(program, examples, seed))
    gradients = run.gradients(seed)
    return [_bound(shape, program, run, gradients[shape.node], macs_of(shape, program)) for shape in shapes]


def _samples(program: Program, examples: Sequence[Tensor], seed: int) -> list[list[Tensor]]:
    """Random inputs like the examples, all of the Program's first example shape."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [_like(entry, example, generator) for entry, example in zip(program.inputs, examples, strict=True)]
        for _ in range(SAMPLES)
    ]


def _like(entry: Input, example: Tensor, generator: torch.Generator) -> Tensor:
    if example.dtype == torch.bool:
        return torch.rand(entry.sizes, generator=generator) < 0.5
    if not example.is_floating_point():
        low, high = int(example.min()), int(example.max())
        return torch.randint(low, high + 1, entry.sizes, generator=generator).to(example.dtype)
    wide = example.to(torch.float64)
    scale = float(wide.std()) if wide.numel() > 1 else 1.0
    noise = torch.randn(entry.sizes, generator=generator, dtype=torch.float64)
    return noise * (scale or 1.0) + wide.mean()


class _Run:
    """A Program on several inputs side by side, with what autograd needs.

    `values`: a list with one value for each sample where a node depends on the input, else the value.
    """

    def __init__(self, program: Program, watched: set[fx.Node], samples: Sequence[Sequence[Tensor]]) -> None:
        self.program = program
        self.watched = watched
        self.dependent = dependent_nodes(program)
        self.values: dict[fx.Node, Any] = {}
        names = [entry.name for entry in program.inputs]
        feeds = {name: [sample[position] for sample in samples] for position, name in enumerate(names)}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = feeds[str(node.target)]
            elif node.op == "get_attr":
                self.values[node] = program.constants[str(node.target)]
            elif node.op == "call_function":
                self.values[node] = self._call(node)

    def _call(self, node: fx.Node) -> Any:
        if node not in self.dependent:
            return schema.call(node, self.values.__getitem__)
        if node.target is aten.detach.default:
            return self.values[node.args[0]]  # type: ignore[index]
        results = [self._result(node, number) for number in range(SAMPLES)]
        results = [self._tilted(node, number, result) for number, result in enumerate(results)]
        if node in self.watched:
            results = [value if value.requires_grad else value.requires_grad_() for value in results]
        return results

    def _result(self, node: fx.Node, number: int) -> Any:
        """What the operator gives for one sample; a copy (x[...] = y) by way of one that has a derivative."""
        of = self._of_sample(number)
        if node.target is aten.copy.default:
            target, source = (of(operand) for operand in node.all_input_nodes)
            return source.to(target.dtype).expand_as(target)
        return schema.call(node, of)

    def _tilted(self, node: fx.Node, number: int, result: Any) -> Any:
        """The result plus a slope along what moves in the operands, where the operator has flat parts."""
        if node.target in FLAT:
            return _plus(result, self._moving(node.args[0], number))
        if node.target in EXTREMA_OF_TWO:
            return _plus(result, self._moving(node.args[0], number) + self._moving(node.args[1], number))
        if node.target in EXTREMA:
            args = schema.bind(node)
            more = self._moving(args["self"], number).sum(args["dim"], args["keepdim"])
            return _plus(result, more) if isinstance(result, Tensor) else (_plus(result[0], more), result[1])
        return result

    def _moving(self, operand: Any, number: int) -> Tensor:
        """SLOPE times those entries of an operand that differ between the samples, 0 elsewhere."""
        if operand not in self.dependent:
            return torch.zeros(())
        values = self.values[operand]
        return torch.where(differing(values), SLOPE * values[number], 0.0)

    def _of_sample(self, number: int) -> Callable[[fx.Node], Any]:
        def value(node: fx.Node) -> Any:
            return self.values[node][number] if node in self.dependent else self.values[node]

        return value

    def gradients(self, seed: int) -> dict[fx.Node, list[Tensor | None]]:
        """For each watched node, the gradients of a random projection of the outputs, one for each sample."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64)
        for node in self._ends:
            for value in self.values[node]:
                if isinstance(value, Tensor) and value.is_floating_point():
                    weights = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                    total = total + torch.where(torch.isfinite(value), value, 0.0).mul(weights).sum()
        order = sorted(self.watched, key=lambda node: node.name)
        flat = [value for node in order for value in self.values[node]]
        found = _gradients(total, flat)
        return {
            node: found[position * SAMPLES : (position + 1) * SAMPLES] for position, node in enumerate(order)
        }

    @cached_property
    def _ends(self) -> list[fx.Node]:
        """The floating-point outputs, and what the others (classes, comparisons) are made of."""
        found: dict[fx.Node, None] = {}
        pending = list(self.program.output_node.all_input_nodes)
        seen = set(pending)
        while pending:
            node = pending.pop()
            if node not in self.dependent or node.op == "get_attr":
                continue
            value = self.values[node][0]
            if isinstance(value, Tensor) and value.is_floating_point():
                found[node] = None
                continue
            fresh = [operand for operand in node.all_input_nodes if operand not in seen]
            seen.update(fresh)
            pending += fresh
        return list(found)


def _plus(result: Tensor, more: Tensor) -> Tensor:
    return result + more if result.is_floating_point() else result


def _gradients(total: Tensor, values: list[Tensor]) -> list[Tensor | None]:
    if not values or not total.requires_grad:
        return [None] * len(values)
    return list(torch.autograd.grad(total, values, allow_unused=True))


def differing(values: Sequence[Tensor]) -> Tensor:
    """The entries that differ between samples by more than rounding; a NaN differs from nothing."""
    first = values[0].detach()
    if not first.is_floating_point():
        return torch.stack([other != first for other in values[1:]]).any(0)
    spread = torch.stack([(other.detach() - first).abs() for other in values[1:]]).amax(0)
    return spread > TOLERANCE * _scale(first)


def _scale(value: Tensor) -> Tensor:
    finite = torch.where(torch.isfinite(value), value, 0.0)
    return finite.abs().max() if value.numel() else torch.zeros(())


def _bound(shape: Shape, program: Program, run: _Run, gradients: Sequence[Tensor | None], macs: int) -> Bound:
    x, y = run.values[shape.x], run.values[shape.node]
    reached = torch.zeros_like(y[0], dtype=torch.bool)
    for gradient in gradients:
        if gradient is not None:
            reached |= gradient.abs() > TOLERANCE * _scale(gradient)
    moving = differing(y)
    outs = _along(reached, shape.y_axis) & _along(moving, shape.y_axis)
    matrix = shape.matrix(run.values[shape.weight].detach())
    groups, per_out, per_in, _ = matrix.shape
    rows = outs.view(groups, per_out)
    read = ((matrix != 0).any(3) & rows[:, :, None]).any(1)
    varies = _along(differing(x), shape.x_axis).view(groups, per_in)
    standing = _standing(shape, run, x[0].detach(), read & ~varies, rows, matrix)
    pairs = (((varies & read).sum(1) + standing) * rows.sum(1)).sum()
    unit = macs / max(groups * per_out * per_in, 1)
    share = 1.0 if shape.is_convolution else _share_of_positions(shape, program, reached & moving)
    live = int((varies & read).sum())
    return Bound(
        shape.node.name,
        groups,
        varies.numel(),
        live,
        standing,
        outs.numel(),
        int(outs.sum()),
        macs,
        unit * share,
        float(pairs) * unit * share,
    )


def _along(mask: Tensor, axis: int) -> Tensor:
    """Whether any entry is set, for each index along one axis."""
    return mask.movedim(axis, 0).flatten(1).any(1) if mask.ndim > 1 else mask


def _share_of_positions(shape: Shape, program: Program, live: Tensor) -> float:
    """The share of a linear layer's positions that are live, index by index along its static leading axes."""
    info = program.infos[shape.node]
    share = 1.0
    for axis in info.static_axes:
        if axis != info.rank + shape.y_axis:
            share *= float(_along(live, axis).double().mean())
    return share


def _standing(shape: Shape, run: _Run, x: Tensor, constant: Tensor, rows: Tensor, matrix: Tensor) -> int:
    """How many channels must stand for the constants that live rows read (see the module's docstring)."""
    if shape.groups > 1 or not bool(constant.any()) or x.ndim < 2:
        return 0
    channels = constant.flatten()
    keep = torch.zeros_like(x)
    moved = keep.movedim(shape.x_axis, 0)
    moved[channels] = x.movedim(shape.x_axis, 0)[channels]
    if _is_flat(_alone(shape, run, keep).movedim(shape.y_axis, 0).flatten(1)[rows.flatten()]):
        return 0
    maps = moved[channels].flatten(1)
    if not shape.padded:
        maps = maps - maps[:, :1]
    singular = torch.linalg.svdvals(maps)
    return int((singular > TOLERANCE * singular.max()).sum())


def _alone(shape: Shape, run: _Run, x: Tensor) -> Tensor:
    """The layer on another input, without its bias."""
    node = shape.node
    weight = run.values[shape.weight]
    if node.target in PRODUCTS:
        return x @ weight if shape.y_axis == -1 else weight @ x  # type: ignore[no-any-return]
    args = schema.bind(node) | {"input": x, "weight": weight, "bias": None}
    result: Tensor = node.target(*args.values())  # type: ignore[operator]
    return result


def _is_flat(values: Tensor) -> bool:
    """Whether each row of a matrix holds one number, up to rounding."""
    return bool(((values - values[:, :1]).abs() <= TOLERANCE * _scale(values)).all())
