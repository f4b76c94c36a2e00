"""One convolution, transposed convolution or linear layer with constant weights, described once for every pass."""

from __future__ import annotations

from functools import cached_property
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.ir.lattice import along
from passes.ir.program import Op, Program
from passes.ir.rewriter import Rewriter

aten = torch.ops.aten


CONVOLUTIONS: dict[object, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}

TRANSPOSED: dict[object, int] = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}

LINEAR = aten.linear.default

SPATIAL_RANK: dict[object, int] = {**CONVOLUTIONS, **TRANSPOSED, LINEAR: 0}
"""Every overload described here, with its number of spatial axes."""


def describe(op: Op) -> Contraction:
    """The call's description, made once for each Op."""
    if "contraction" not in op.cache:
        op.cache["contraction"] = Contraction(op)
    found: Contraction = op.cache["contraction"]
    return found


def contraction_of(program: Program, node: fx.Node) -> Contraction | None:
    """A call's description; None if it is no such call."""
    if node.target not in SPATIAL_RANK:
        return None
    op = program.op(node)
    return describe(op) if op.info is not None and is_contraction(op) else None


def label(node: fx.Node) -> str:
    """What a user calls a layer: its module's name, or else the call's."""
    return str(node.meta.get("module") or node.name)


def is_contraction(op: Op) -> bool:
    """Whether weight and bias are constants of the usual ranks (a linear layer takes a vector and a number too)."""
    weight, bias = op.held("weight"), op.held("bias")
    if weight is None or len(weight.shape) != SPATIAL_RANK.get(op.target, 0) + 2 or op.has_empty_tensors:
        return False
    out = weight.shape[1] * op.args["groups"] if op.target in TRANSPOSED else weight.shape[0]
    return op.args["bias"] is None or (bias is not None and bias.shape == (out,))


def by_rows(stored: Tensor, groups: int) -> Tensor:
    """The weight of a transposed convolution, (in, out / groups, *kernel), as (out, in / groups, *kernel)."""
    blocks = stored.reshape(groups, -1, *stored.shape[1:]).transpose(1, 2)
    return blocks.flatten(0, 1).contiguous()


class Contraction:
    """One call, described: x, W, b, channel axes, groups, spatial axes.

    `weight` is (out, in / groups, *kernel) for each of the layers, whatever the call's own layout is.
    """

    def __init__(self, op: Op) -> None:
        weight = op.held("weight")
        assert weight is not None
        self.op = op
        self.bias = op.constant("bias")
        self.x: fx.Node = op.args["input"]
        self.info = op.info_of(self.x)
        self.spatial_rank: int = SPATIAL_RANK.get(op.target, 0)
        self.is_transposed = op.target in TRANSPOSED
        self.axis = self.info.rank - 1 - self.spatial_rank
        self.spatial = tuple(range(self.axis + 1, self.info.rank))
        self.leading = tuple(range(self.axis))
        self.groups: int = op.args.get("groups", 1)
        self._held, self._rows = weight, None if weight.is_narrow else self._by_rows(weight.read())
        self.out_channels, self.in_per_group = weight.shape[:2]
        if self.is_transposed:
            self.out_channels, self.in_per_group = (
                self.in_per_group * self.groups,
                self.out_channels // self.groups,
            )
        self.kernel = tuple(weight.shape[2:])
        self.out_per_group = self.out_channels // self.groups
        self.in_channels = self.info.sizes[self.axis]

    @property
    def weight(self) -> Tensor:
        """(out, in / groups, *kernel); widened anew each time where it is held narrow."""
        return self._by_rows(self._held.read()) if self._rows is None else self._rows

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, without reading it."""
        return self._held.dtype

    def own_weight(self) -> Tensor:
        """The same in memory of its own, to write into."""
        return self.weight if self._rows is None else self._rows.clone()

    def cut_weight(self, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        """The weight of a layer without groups at some rows and columns (indices; None for all)."""
        found = self._by_rows(self._held.tensor) if self._rows is None else self._rows
        for axis, index in enumerate((rows, columns)):
            found = found if index is None else found.index_select(axis, index)
        return found.to(self._held.dtype)

    def _by_rows(self, weight: Tensor) -> Tensor:
        return by_rows(weight, self.groups) if self.is_transposed else weight

    @property
    def positions(self) -> int:
        """Spatial positions at which the kernel is applied, for one example of everyday size."""
        sizes = self.info.sizes if self.is_transposed else self.op.out.sizes
        return prod(sizes[axis] for axis in self.spatial)

    @property
    def columns(self) -> Tensor:
        """Whether row j reads input channel c with a weight that is not zero; bool (out, in / groups)."""
        return self._columns if self._rows is not None else self._columns_of(self._by_rows(self._held.tensor))

    @cached_property
    def _columns(self) -> Tensor:
        return self._columns_of(self.weight)

    def _columns_of(self, weight: Tensor) -> Tensor:
        if not self.spatial_rank:
            return weight != 0
        taps = weight.flatten(2)
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
        """The op on other data of the same layout, without bias; `weight` as (out, in / groups, *kernel)."""
        if not self.spatial_rank:
            return F.linear(x, weight)
        result: Tensor = self.op.target(x, self.stored(weight, groups), None, *self.settings(groups))
        return result

    def stored(self, weight: Tensor, groups: int) -> Tensor:
        """A weight (out, in / groups, *kernel) in the call's own layout."""
        return by_rows(weight, groups) if self.is_transposed else weight

    def settings(self, groups: int) -> list[object]:
        """The arguments of a convolution after the bias, in the order of its schema."""
        stride, padding, dilation = (
            list(self.per_spatial(name)) for name in ("stride", "padding", "dilation")
        )
        if self.is_transposed:
            return [stride, padding, list(self.per_spatial("output_padding")), groups, dilation]
        return [stride, padding, dilation, groups]

    def window(self, position: int) -> int:
        """How many entries the kernel spans along a spatial axis (numbered from 0)."""
        return self.per_spatial("dilation")[position] * (self.kernel[position] - 1) + 1

    def at_full_width(self, stored: Tensor) -> Tensor:
        """Stored values of x with every channel laid out."""
        return stored.expand([*stored.shape[: self.axis], self.in_channels, *stored.shape[self.axis + 1 :]])

    def may_vary(self) -> bool:
        """Whether what a constant adds can differ by position: at a padded border, or under a transposed kernel."""
        if self.is_transposed and (max(self.kernel) > 1 or any(self.per_spatial("output_padding"))):
            return True
        moved = self.is_transposed and max(self.per_spatial("stride")) > 1
        return moved or (bool(self.spatial_rank) and any(self.per_spatial("padding")))

    def has_dynamic_border(self) -> bool:
        """Whether some dynamic axis has border effects, so that they cannot be laid out."""
        return any(
            self.has_border(position) and not self.info.is_static(axis)
            for position, axis in enumerate(self.spatial)
        )

    def has_border(self, position: int) -> bool:
        """Whether what a constant adds near the ends of a spatial axis can depend on how long the axis is.

        A transposed convolution has none where its windows do not overlap and no output lies beyond them.
        """
        padding, stride = self.per_spatial("padding")[position], self.per_spatial("stride")[position]
        if not self.is_transposed:
            return padding > 0
        window = self.window(position)
        return window > stride or window + self.per_spatial("output_padding")[position] - padding > stride

    def spread(self, stored: Tensor, every_position: bool = True) -> Tensor:
        """Stored values at the size of x (dynamic axes: one window, or one period of a transposed convolution).

        Without `every_position` a flat axis is cut short, by whole strides, to a size with the same border effects.
        """
        sizes = list(stored.shape)
        for position, axis in enumerate(self.spatial):
            if not self.info.is_static(axis):
                sizes[axis] = self._shortest(position) if self.is_transposed else self.window(position)
            elif every_position or stored.shape[axis] > 1:
                sizes[axis] = self.info.sizes[axis]
            else:
                sizes[axis] = self._short(position, self.info.sizes[axis])
        return stored.expand(sizes)

    def _short(self, position: int, size: int) -> int:
        if self.is_transposed:
            return min(size, self._shortest(position))
        window, stride = self.window(position), self.per_spatial("stride")[position]
        spare = (size - 2 * (window + self.per_spatial("padding")[position]) - stride) // stride
        return size - stride * max(0, spare)

    def _shortest(self, position: int) -> int:
        """An input size of a transposed convolution that shows both borders and a whole period between them."""
        stride = self.per_spatial("stride")[position]
        beyond = self.per_spatial("padding")[position] + self.per_spatial("output_padding")[position]
        return 2 * -(-(self.window(position) + beyond) // stride) + 3

    def contribution(
        self, values: Tensor, channels: Tensor, rows: Tensor, every_position: bool = True
    ) -> Tensor | None:
        """Conv of stored x values on some channels, for some rows, without bias; None where it cannot be laid out.

        Shape: stored form of y restricted to `rows` along the channel axis, but with several positions along a dynamic
        axis of a transposed convolution; without `every_position` with fewer positions, among them the first and one
        of each kind.
        """
        if channels.numel() == 0 or rows.numel() == 0:
            return self._nothing(rows)
        if self.groups > 1:
            return self._grouped_contribution(values, channels, rows, every_position)
        part = self.at_full_width(values).index_select(self.axis, channels)
        weight = self.weight[rows][:, channels]
        if not self.spatial_rank:
            return self.run(part, weight)
        flat = all(part.shape[axis] == 1 for axis in self.spatial)
        if flat and not self.is_transposed and not any(self.per_spatial("padding")):
            return torch.movedim(
                F.linear(torch.movedim(part, self.axis, -1), weight.flatten(2).sum(2)), -1, self.axis
            )
        return None if self.has_dynamic_border() else self.run(self.spread(part, every_position), weight)

    def _grouped_contribution(
        self, values: Tensor, channels: Tensor, rows: Tensor, every_position: bool
    ) -> Tensor | None:
        """The same with groups: computed for all rows of the groups that hold them."""
        groups = torch.unique(rows // self.out_per_group)
        inputs = (groups[:, None] * self.in_per_group + torch.arange(self.in_per_group)).flatten()
        outputs = (groups[:, None] * self.out_per_group + torch.arange(self.out_per_group)).flatten()
        chosen = torch.zeros(self.in_channels, dtype=values.dtype).index_fill(0, channels, 1.0)
        part = self.at_full_width(values) * along(chosen, self.axis, self.info.rank)
        part = part.index_select(self.axis, inputs)
        if not bool((part != 0).any()):
            return self._nothing(rows)
        if not self.may_vary() and all(part.shape[axis] == 1 for axis in self.spatial):
            blocks = self.weight[outputs].flatten(2).sum(2).view(groups.numel(), -1, self.in_per_group)
            vectors = torch.movedim(part, self.axis, -1).reshape(-1, groups.numel(), self.in_per_group)
            shape = [*part.shape[: self.axis], *part.shape[self.axis + 1 :], -1]
            found = torch.movedim(torch.einsum("ngi,goi->ngo", vectors, blocks).reshape(shape), -1, self.axis)
        elif self.has_dynamic_border():
            return None
        else:
            found = self.run(self.spread(part, every_position), self.weight[outputs], groups.numel())
        return found.index_select(self.axis, torch.searchsorted(outputs, rows))

    def of_constant(self, vector: Tensor) -> Tensor | None:
        """What x = `vector` (in,) at every position adds to each row, (out,); None where positions differ."""
        if not self.may_vary():
            return (self.weight * self.per_input(vector)).flatten(1).sum(1)
        channels = vector.expand(self.in_channels).nonzero().flatten()
        values = along(vector, self.axis, self.info.rank)
        part = self.contribution(values, channels, torch.arange(self.out_channels), every_position=False)
        if part is None or not is_uniform(part, self.axis):
            return None
        return torch.movedim(part, self.axis, 0).reshape(self.out_channels, -1)[:, 0]

    def per_input(self, vector: Tensor) -> Tensor:
        """A vector (in,) or (1,) laid out like the input channels of the weight; (out, in / groups, 1, ...)."""
        grouped = vector.expand(self.in_channels).reshape(self.groups, 1, self.in_per_group)
        rows = grouped.expand(-1, self.out_per_group, -1).reshape(self.out_channels, self.in_per_group)
        return rows.reshape(*rows.shape, *([1] * self.spatial_rank))

    def channels_read(self, rows: Tensor) -> Tensor:
        """The channels of x that some of the rows (a mask) read with a weight that is not zero; (in,)."""
        return (self.columns & rows[:, None]).view(self.groups, -1, self.in_per_group).any(1).flatten()

    def rows_reading(self, channels: Tensor) -> Tensor:
        """The rows that read some of the channels (a mask) with a weight that is not zero; (out,)."""
        per_group = channels.view(self.groups, 1, self.in_per_group)
        return (self.columns.view(self.groups, -1, self.in_per_group) & per_group).any(2).flatten()

    def _nothing(self, rows: Tensor) -> Tensor:
        shape = [1] * self.info.rank
        shape[self.axis] = rows.numel()
        return torch.zeros(shape, dtype=self._held.dtype)


def is_uniform(stored: Tensor, axis: int) -> bool:
    """Whether values vary along no axis but `axis`, up to rounding of the sums behind them."""
    return not bool(varying(stored, axis).any())


def varying(stored: Tensor, axis: int) -> Tensor:
    """For each index along `axis`, whether values vary along some other axis; (size of `axis`,)."""
    rows = torch.movedim(stored, axis, 0).unsqueeze(-1).flatten(1)
    scale = stored.abs().max() if stored.numel() else torch.zeros(())
    return ((rows - rows[:, :1]).abs() > 1e-15 * scale).any(1)


def emit(
    this: Contraction,
    rewriter: Rewriter,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    *,
    x: fx.Node | None = None,
    like: fx.Node | None = None,
    step: str = "",
) -> fx.Node:
    """The call with other weights, (out, in / groups, *kernel); new constants keep the old ones' names and dtypes.

    `x`, `like` and `step`: another operand in the new graph, another old call in whose place this one is, and the name
    of an intermediate result (Rewriter.call).
    """
    node = this.op.node
    source = this.op.args["weight"]
    dtype = rewriter.dtype_of(source)
    stored = rewriter.constant(this.stored(weight, groups), str(source.target), dtype)
    args: list[object] = [rewriter.value(this.x) if x is None else x, stored, None]
    if bias is not None:
        held = this.op.args["bias"]
        name = str(source.target).removesuffix("weight") + "bias" if held is None else str(held.target)
        args[2] = rewriter.constant(bias, name, dtype)
    if this.spatial_rank:
        args += this.settings(groups)
    return rewriter.call(node.target, args, like=node if like is None else like, step=step)
