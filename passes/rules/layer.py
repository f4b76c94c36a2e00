"""One convolution or linear layer with constant weights, described once for every pass that looks at it."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.ir.program import Op
from passes.ir.rewriter import Rewriter

aten = torch.ops.aten


CONVOLUTIONS: dict[object, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}

LINEAR = aten.linear.default


def describe(op: Op) -> Contraction:
    """The call's description, made once for each Op."""
    if "contraction" not in op.cache:
        op.cache["contraction"] = Contraction(op)
    found: Contraction = op.cache["contraction"]
    return found


def is_contraction(op: Op) -> bool:
    """Whether weight and bias are constants of the usual ranks (a linear layer takes a vector and a number too)."""
    weight, bias = op.constant("weight"), op.constant("bias")
    if weight is None or weight.ndim != CONVOLUTIONS.get(op.target, 0) + 2:
        return False
    return op.args["bias"] is None or (bias is not None and bias.shape == weight.shape[:1])


class Contraction:
    """One call, described: x, W, b, channel axes, groups, spatial axes."""

    def __init__(self, op: Op) -> None:
        weight = op.constant("weight")
        assert weight is not None
        self.op = op
        self.weight = weight
        self.bias = op.constant("bias")
        self.x: fx.Node = op.args["input"]
        self.info = op.info_of(self.x)
        self.spatial_rank: int = CONVOLUTIONS.get(op.target, 0)
        self.axis = self.info.rank - 1 - self.spatial_rank
        self.spatial = tuple(range(self.axis + 1, self.info.rank))
        self.leading = tuple(range(self.axis))
        self.groups: int = op.args.get("groups", 1)
        self.out_channels, self.in_per_group = weight.shape[:2]
        self.in_channels = self.info.sizes[self.axis]

    @cached_property
    def columns(self) -> Tensor:
        """Whether row j reads input channel c with a weight that is not zero; bool (out, in / groups)."""
        if not self.spatial_rank:
            return self.weight != 0
        taps = self.weight.flatten(2)
        first = taps[:, :, 0] != 0
        return first if bool(first.all()) else (taps != 0).any(2)

    @cached_property
    def full_rows(self) -> bool:
        """Whether every row has a weight that is not zero."""
        return bool(self.columns.any(1).all())

    def per_spatial(self, name: str) -> tuple[int, ...]:
        values = self.op.args[name]
        values = [values] if isinstance(values, int) else list(values)
        return tuple(values * self.spatial_rank if len(values) == 1 else values)

    def run(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """The op on other data of the same layout, without bias."""
        if not self.spatial_rank:
            return F.linear(x, weight)
        names = ("stride", "padding", "dilation")
        stride, padding, dilation = (list(self.per_spatial(name)) for name in names)
        result: Tensor = self.op.target(x, weight, None, stride, padding, dilation, groups)
        return result

    def at_full_width(self, stored: Tensor) -> Tensor:
        """Stored values of x with every channel laid out."""
        return stored.expand([*stored.shape[: self.axis], self.in_channels, *stored.shape[self.axis + 1 :]])

    def has_padding(self) -> bool:
        """Whether zeros are added at some border."""
        return bool(self.spatial_rank) and any(self.per_spatial("padding"))

    def has_dynamic_border(self) -> bool:
        """Whether some dynamic axis is padded, so that border effects cannot be laid out."""
        if not self.spatial_rank:
            return False
        return any(
            pad > 0 and not self.info.is_static(axis)
            for pad, axis in zip(self.per_spatial("padding"), self.spatial, strict=True)
        )

    def spread(self, stored: Tensor, every_position: bool = True) -> Tensor:
        """Stored values at the size of x (dynamic axes: one window).

        Without `every_position` a flat axis is cut short, by whole strides, to a size with the same border effects.
        """
        sizes = list(stored.shape)
        for position, axis in enumerate(self.spatial):
            window = self.per_spatial("dilation")[position] * (self.weight.shape[2 + position] - 1) + 1
            size = self.info.sizes[axis] if self.info.is_static(axis) else window
            if not every_position and stored.shape[axis] == 1:
                stride, padding = self.per_spatial("stride")[position], self.per_spatial("padding")[position]
                spare = (size - 2 * (window + padding) - stride) // stride
                size -= stride * max(0, spare)
            sizes[axis] = size
        return stored.expand(sizes)

    def contribution(
        self, values: Tensor, channels: Tensor, rows: Tensor, every_position: bool = True
    ) -> Tensor | None:
        """Conv of stored x values on some channels, for some rows, without bias; None where it cannot be laid out.

        Shape: stored form of y restricted to `rows` along the channel axis; without `every_position` with fewer
        positions, among them the first and one of each kind. Groups must be 1.
        """
        values = self.at_full_width(values)
        part = values.index_select(self.axis, channels)
        weight = self.weight[rows][:, channels]
        if not self.spatial_rank or part.numel() == 0:
            return self.run(part, weight) if part.numel() else self._nothing(rows)
        flat = all(part.shape[axis] == 1 for axis in self.spatial)
        if flat and not any(self.per_spatial("padding")):
            return torch.movedim(
                F.linear(torch.movedim(part, self.axis, -1), weight.flatten(2).sum(2)), -1, self.axis
            )
        if self.has_dynamic_border():
            return None
        return self.run(self.spread(part, every_position), weight)

    def _nothing(self, rows: Tensor) -> Tensor:
        shape = [1] * self.info.rank
        shape[self.axis] = rows.numel()
        return torch.zeros(shape, dtype=self.weight.dtype)


def is_uniform(stored: Tensor, axis: int) -> bool:
    """Whether values vary along no axis but `axis`, up to rounding of the sums behind them."""
    first = stored
    for other in range(stored.ndim):
        if other != axis:
            first = first.narrow(other, 0, 1)
    scale = stored.abs().max() if stored.numel() else torch.zeros(())
    return bool(((stored - first).abs() <= 1e-15 * scale).all())


def emit(this: Contraction, rewriter: Rewriter, weight: Tensor, bias: Tensor | None, groups: int) -> fx.Node:
    """The call with other weights; new constants keep the old ones' names and dtypes."""
    node = this.op.node
    source = this.op.args["weight"]
    dtype = rewriter.dtype_of(source)
    args: list[object] = [rewriter.value(this.x), rewriter.constant(weight, str(source.target), dtype), None]
    if bias is not None:
        held = this.op.args["bias"]
        name = str(source.target).removesuffix("weight") + "bias" if held is None else str(held.target)
        args[2] = rewriter.constant(bias, name, dtype)
    if this.spatial_rank:
        args += [list(this.per_spatial(name)) for name in ("stride", "padding", "dilation")]
        args.append(groups)
    return rewriter.call(node.target, args, like=node)
