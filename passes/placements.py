"""Operators that only move entries along static axes, spelled as index_select, cat, reshape, flip and where.

- channel_shuffle, repeat_interleave, gather and take_along_dim with one index for all: index_select;
- x[:, i, j] with constant indices of any rank, boolean masks among them: a reshape that joins the indexed axes, one
  index_select, a reshape to the shape of the indices;
- slice_scatter, select_scatter, scatter, index_copy, index_put with one constant index: a concatenation of what stays
  and what is put in;
- index_fill, scatter of a number, index_put of constants that are the same along dynamic axes: a choice by a constant
  mask; x[condition] = number with a condition on the input: by that;
- copy into a value of the same shape: what is copied; tile: repeat; rot90: flip and transpose.

What meets a dynamic axis in a way that these cannot say stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.analysis import size_source
from passes.ir.program import Op, TensorInfo
from passes.ir.rewriter import Rewriter

aten = torch.ops.aten

LAST = 2**63 - 1

Key = tuple[int, ...]


def select_positions(
    op: Op, rewriter: Rewriter, x: fx.Node, axis: int, positions: Tensor, step: str = ""
) -> fx.Node:
    """An index_select of a new value in the place of the call."""
    index = rewriter.constant(positions, f"{op.node.name}_index", torch.int64)
    return rewriter.call(aten.index_select.default, (x, axis, index), like=op.node, step=step)


def run_time_sizes(op: Op, rewriter: Rewriter, keys: Sequence[Key], implied: int = -1) -> list[Any] | None:
    """Arguments for a reshape to axes with these keys (see `Sized.key`); None where one of them has no name.

    Dynamic sizes are taken from the inputs, but for one that the others imply: number `implied`, else the first.
    """
    if any(0 in key for key in keys):
        return None
    dynamic = [position for position, key in enumerate(keys) if len(set(key)) > 1]
    left_out = implied if implied in dynamic else next(iter(dynamic), None)
    sizes: list[Any] = [key[0] for key in keys]
    for position in dynamic:
        info = TensorInfo((keys[position][0],), (keys[position][1],), torch.float64, (keys[position][2],))
        source = size_source(op.program, info, 0)
        if position == left_out:
            sizes[position] = -1
        elif source is None:
            return None
        else:
            sizes[position] = rewriter.size_node(source, op.node)
    return sizes


def _static_size(op: Op, axis: int) -> int | None:
    info = op.info_of(op.operands[0])
    return info.sizes[axis] if info.is_static(axis) else None


def _axis(op: Op, name: str = "dim") -> int:
    return int(op.args[name]) % max(op.info_of(op.operands[0]).rank, 1)


def _channel_shuffle(op: Op, rewriter: Rewriter) -> fx.Node | None:
    count, groups = _static_size(op, 1), op.args["groups"]
    if count is None:
        return None
    order = torch.arange(count).reshape(groups, -1).T.flatten()
    return select_positions(op, rewriter, rewriter.value(op.operands[0]), 1, order)


def _repeat_interleave(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """Every index a number of times; along a dynamic axis by a new axis, expanded and merged."""
    count = op.args["repeats"] if isinstance(op.args["repeats"], int) else op.constant("repeats")
    if op.args["dim"] is None or count is None or not op.operands:
        return None
    axis, x = _axis(op), op.operands[0]
    size = _static_size(op, axis)
    if size is not None:
        positions = torch.arange(size).repeat_interleave(count)
        return select_positions(op, rewriter, rewriter.value(x), axis, positions)
    if op.info is None or not isinstance(count, int):
        return None
    sizes = run_time_sizes(op, rewriter, [op.info.key(each) for each in range(op.info.rank)], axis)
    if sizes is None:
        return None
    new = rewriter.call(aten.unsqueeze.default, (rewriter.value(x), axis + 1), like=op.node, step="new")
    repeats = [count if each == axis + 1 else -1 for each in range(op.info.rank + 1)]
    expanded = rewriter.call(aten.expand.default, (new, repeats), like=op.node, step="expanded")
    return rewriter.call(aten.reshape.default, (expanded, sizes), like=op.node)


def _gather(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """A constant index that varies along the gathered axis alone, expanded or not."""
    x, index = op.args["self"], _index_along(op)
    if index is None or not op.info_of(x).is_static(_axis(op)):
        return None
    return select_positions(op, rewriter, rewriter.value(x), _axis(op), index)


def _scatter(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """The same index, of places to put a number or values at."""
    index = _index_along(op)
    if index is None:
        return None
    if "value" in op.args:
        number = op.args["value"]
        return None if isinstance(number, fx.Node) else _put_number(op, rewriter, {_axis(op): index}, number)
    return _put_values(op, rewriter, {_axis(op): index}, op.args["src"])


def _index_along(op: Op) -> Tensor | None:
    """The constant index of a gather or scatter that is the same for all lines along the axis, and covers them all.

    int64, (as many as are read or put,).
    """
    x, index, axis = op.args["self"], op.args["index"], _axis(op)
    covered = op.program.infos.get(index)
    while isinstance(index, fx.Node) and index.target in {aten.expand.default, *_COPIES}:
        index = index.args[0]
    held, info = op.program.constant(index), op.program.infos.get(x)
    if covered is None or held is None or info is None or held.ndim != info.rank:
        return None
    beside = [each for each in range(info.rank) if each != axis]
    if not covered.is_static(axis) or any(covered.key(each) != info.key(each) for each in beside):
        return None
    for each in beside:
        first = held.narrow(each, 0, 1)
        if not bool((held == first).all()):
            return None
        held = first
    return held.flatten().long().expand(covered.sizes[axis])


_COPIES = (aten.clone.default, aten._to_copy.default, aten.alias.default)


def _index(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """x[..., i, j, ...] with constant indices: the indexed axes as one, read at flat positions."""
    x = op.args["self"]
    info = op.program.infos.get(x)
    found = None if info is None else _index_vectors(op, op.args["indices"])
    if info is None or found is None:
        return None
    axes = list(found)
    if 0 in info.sizes or not all(info.is_static(axis) for axis in axes):
        return None
    indices = [index % info.sizes[axis] for axis, index in found.items()]
    rest = [axis for axis in range(info.rank) if axis not in axes]
    together = axes == list(range(axes[0], axes[0] + len(axes))) and _are_adjacent(op.args["indices"])
    first = axes[0] if together else 0
    order = [*rest[:first], *axes, *rest[first:]]
    sizes = [info.sizes[axis] for axis in axes]
    joint = torch.broadcast_tensors(*indices)  # type: ignore[no-untyped-call]
    flat = torch.zeros_like(joint[0])
    for index, size in zip(joint, sizes, strict=True):
        flat = flat * size + index
    before, after = ([info.key(axis) for axis in part] for part in (rest[:first], rest[first:]))
    joined = [*before, (prod(sizes),) * 3, *after]
    wanted = [*before, *((size,) * 3 for size in flat.shape), *after]
    return _read_jointly(op, rewriter, order, joined, wanted, flat, first)


def _read_jointly(
    op: Op,
    rewriter: Rewriter,
    order: list[int],
    joined: list[Key],
    wanted: list[Key],
    flat: Tensor,
    axis: int,
) -> fx.Node | None:
    """Permute, join the axes from `axis` on, read the flat positions, give them the shape of the index."""
    value, rank = rewriter.value(op.args["self"]), len(order)
    sizes = [run_time_sizes(op, rewriter, keys) for keys in (joined, wanted)]
    if sizes[0] is None or sizes[1] is None:
        return None
    if order != list(range(rank)):
        value = rewriter.call(aten.permute.default, (value, order), like=op.node, step="front")
    if len(joined) != rank:
        value = rewriter.call(aten.reshape.default, (value, sizes[0]), like=op.node, step="joined")
    reshaped = flat.ndim != 1
    value = select_positions(op, rewriter, value, axis, flat.flatten(), "read" if reshaped else "")
    return rewriter.call(aten.reshape.default, (value, sizes[1]), like=op.node) if reshaped else value


def _index_vectors(op: Op, indices: Sequence[Any]) -> dict[int, Tensor] | None:
    """Indexed axis to constant int64 index, a boolean mask taken apart; None where an index is not constant."""
    found: dict[int, Tensor] = {}
    axis = 0
    for entry in indices:
        value = op.program.constant(entry)
        if entry is None:
            axis += 1
        elif value is None or value.dtype == torch.uint8:
            return None
        elif value.dtype == torch.bool:
            for vector in value.nonzero(as_tuple=True):
                found[axis] = vector
                axis += 1
        else:
            found[axis] = value.long()
            axis += 1
    return found or None


def _are_adjacent(indices: Sequence[Any]) -> bool:
    used = [position for position, entry in enumerate(indices) if entry is not None]
    return used == list(range(used[0], used[-1] + 1))


def _slice_scatter(op: Op, rewriter: Rewriter) -> fx.Node | None:
    axis, step = _axis(op), op.args["step"]
    bounds = [op.args["start"], op.args["end"]]
    size = _static_size(op, axis)
    if size is None:
        whole = bounds[0] in (None, 0) and bounds[1] in (None, LAST) and step == 1
        return rewriter.value(op.args["src"]) if whole and _same_kind(op, op.args["src"]) else None
    if not all(bound is None or isinstance(bound, int) for bound in (*bounds, step)):
        return None
    chosen = range(size)[bounds[0] : bounds[1] : step]
    return _put(op, rewriter, axis, chosen, op.args["src"])


def _select_scatter(op: Op, rewriter: Rewriter) -> fx.Node | None:
    axis, index = _axis(op), op.args["index"]
    size, source = _static_size(op, axis), op.args["src"]
    if size is None or not isinstance(index, int) or not _same_kind(op, source):
        return None
    new = rewriter.call(aten.unsqueeze.default, (rewriter.value(source), axis), like=op.node, step="new")
    return _put(op, rewriter, axis, [index % size], source, new)


def _index_put(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """Constant indices: with constants put there a choice, with values of the full shape a concatenation."""
    if op.args["accumulate"]:
        return None
    found, put = _index_vectors(op, op.args["indices"]), op.constant("values")
    if found is None:
        return _put_where(op, rewriter)
    if put is None:
        return _put_values(op, rewriter, found, op.args["values"])
    if put.numel() == 1:
        return _put_number(op, rewriter, found, put.item())
    return _put_constants(op, rewriter, found, put) or _put_values(op, rewriter, found, op.args["values"])


def _put_where(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """X[condition] = one number, with a condition that depends on the input: a choice."""
    put, infos = op.args["values"], op.program.infos
    first = next((axis for axis, entry in enumerate(op.args["indices"]) if entry is not None), 0)
    condition, *others = op.args["indices"][first:] or [None]
    if others or condition not in infos or infos[condition].dtype != torch.bool:
        return None
    if put not in infos or infos[put].sizes not in {(), (1,)} or op.info is None:
        return None
    value = rewriter.value(condition)
    for number in range(op.info.rank - first - infos[condition].rank):
        value = rewriter.call(aten.unsqueeze.default, (value, -1), like=op.node, step=f"condition{number}")
    args = (value, rewriter.value(put), rewriter.value(op.args["self"]))
    return rewriter.call(aten.where.self, args, like=op.node)


def _index_copy(op: Op, rewriter: Rewriter) -> fx.Node | None:
    found = _one_index_vector(op)
    return None if found is None else _put_values(op, rewriter, found, op.args["source"])


def _index_fill(op: Op, rewriter: Rewriter) -> fx.Node | None:
    found, value = _one_index_vector(op), op.args["value"]
    if isinstance(value, fx.Node):
        held = op.constant("value")
        value = None if held is None else held.item()
    return None if found is None or value is None else _put_number(op, rewriter, found, value)


def _one_index_vector(op: Op) -> dict[int, Tensor] | None:
    """The axis and the constant index of index_fill and index_copy."""
    index, x = op.constant("index"), op.program.infos.get(op.args["self"])
    return None if index is None or x is None or x.rank == 0 else {_axis(op): index.reshape(-1).long()}


def _put_number(op: Op, rewriter: Rewriter, indices: Mapping[int, Tensor], number: Any) -> fx.Node | None:
    """X with one number at the indexed places: a constant mask, which no index reads twice and nothing copies."""
    condition = _indexed(op, rewriter, indices)
    if condition is None:
        return None
    args = (rewriter.value(op.args["self"]), condition, number)
    return rewriter.call(aten.masked_fill.Scalar, args, like=op.node)


def _put_constants(op: Op, rewriter: Rewriter, indices: Mapping[int, Tensor], put: Tensor) -> fx.Node | None:
    """X with a constant for each index of one axis, the same along dynamic axes."""
    condition = _indexed(op, rewriter, indices)
    values = None if condition is None else _spread(op, indices, put)
    if values is None:
        return None
    dtype = rewriter.dtype_of(op.args["values"])
    constant = rewriter.constant(values, f"{op.node.name}_values", dtype)
    return rewriter.call(
        aten.where.self, (condition, constant, rewriter.value(op.args["self"])), like=op.node
    )


def _indexed(op: Op, rewriter: Rewriter, indices: Mapping[int, Tensor]) -> fx.Node | None:
    """A constant mask of the indexed places, broadcastable to x."""
    info = op.program.infos.get(op.args["self"])
    if info is None or not all(map(info.is_static, indices)):
        return None
    mask = torch.zeros([info.sizes[axis] if axis in indices else 1 for axis in range(info.rank)]).bool()
    mask[tuple(indices.get(axis, slice(None)) for axis in range(info.rank))] = True
    return rewriter.constant(mask, f"{op.node.name}_mask", torch.bool)


def _spread(op: Op, indices: Mapping[int, Tensor], put: Tensor) -> Tensor | None:
    """Values at the indices of one axis and zeros at the others, broadcastable to x; None where that is unclear."""
    [(axis, index), *others] = indices.items()
    info = op.info_of(op.args["self"])
    size, rank = info.sizes[axis], info.rank
    if others or index.ndim != 1 or put.ndim > rank or len(set((index % size).tolist())) < len(index):
        return None
    aligned = put.reshape((1,) * (rank - put.ndim) + tuple(put.shape))
    sizes = [size if each == axis else count for each, count in enumerate(aligned.shape)]
    if any(count != 1 and not info.is_static(each) for each, count in enumerate(sizes)):
        return None
    values = put.new_zeros(sizes)
    values.movedim(axis, 0)[index] = aligned.movedim(axis, 0)
    return values


def _put_values(op: Op, rewriter: Rewriter, indices: Mapping[int, Tensor], values: fx.Node) -> fx.Node | None:
    """X with values of the full shape at one index vector without repetitions."""
    if len(indices) != 1 or values not in op.program.infos:
        return None
    [(axis, index)] = indices.items()
    info, given, size = op.info_of(op.operands[0]), op.info_of(values), _static_size(op, axis)
    if size is None or index.ndim != 1 or given.rank != info.rank:
        return None
    keys = [info.key(each) if each != axis else (index.numel(),) * 3 for each in range(info.rank)]
    if any(given.key(each) != key for each, key in enumerate(keys)):
        return None
    chosen = (index % size).tolist()
    return _put(op, rewriter, axis, chosen, values) if len(set(chosen)) == len(chosen) else None


def _same_kind(op: Op, source: fx.Node) -> bool:
    info = op.program.infos.get(source)
    return info is not None and op.info is not None and info.dtype == op.info.dtype


def _put(
    op: Op, rewriter: Rewriter, axis: int, chosen: Sequence[int], source: fx.Node, new: fx.Node | None = None
) -> fx.Node | None:
    """X with the indices `chosen` along an axis taken from `source`."""
    size = _static_size(op, axis)
    if size is None or not _same_kind(op, source):
        return None
    x = rewriter.value(op.operands[0])
    if not chosen:
        return x
    values = rewriter.value(source) if new is None else new
    start, stop = chosen[0], chosen[-1] + 1
    if list(chosen) != list(range(start, stop)):
        joined = rewriter.call(aten.cat.default, ([x, values], axis), like=op.node, step="joined")
        positions = torch.arange(size)
        positions[list(chosen)] = size + torch.arange(len(chosen))
        return select_positions(op, rewriter, joined, axis, positions)
    parts = [
        rewriter.call(aten.slice.Tensor, (x, axis, first, last), like=op.node, step=name)
        for name, first, last in (("before", 0, start), ("after", stop, size))
        if first < last
    ]
    parts.insert(1 if start else 0, values)
    return values if len(parts) == 1 else rewriter.call(aten.cat.default, (parts, axis), like=op.node)


def _copy(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """x[...] = source of the same shape and dtype: the source."""
    source = op.args["src"]
    return rewriter.value(source) if op.info is not None and op.program.infos.get(source) == op.info else None


def _fill(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """A number that is held in a tensor."""
    held = op.constant("value")
    if held is None or not op.operands:
        return None
    return rewriter.call(aten.fill.Scalar, (rewriter.value(op.operands[0]), held.item()), like=op.node)


def _tile(op: Op, rewriter: Rewriter) -> fx.Node | None:
    if not op.operands:
        return None
    counts = list(rewriter.map(op.args["dims"]))
    counts = [1] * (op.info_of(op.operands[0]).rank - len(counts)) + counts
    return rewriter.call(aten.repeat.default, (rewriter.value(op.operands[0]), counts), like=op.node)


def _rot90(op: Op, rewriter: Rewriter) -> fx.Node | None:
    rank = op.info_of(op.operands[0]).rank
    x, turns = rewriter.value(op.operands[0]), op.args["k"] % 4
    first, second = (axis % rank for axis in op.args["dims"])
    flipped = {0: [], 1: [second], 2: [first, second], 3: [first]}[turns]
    if flipped:
        step = "flipped" if turns % 2 else ""
        x = rewriter.call(aten.flip.default, (x, flipped), like=op.node, step=step)
    return rewriter.call(aten.transpose.int, (x, first, second), like=op.node) if turns % 2 else x


PLACEMENTS: dict[Any, Callable[[Op, Rewriter], fx.Node | None]] = {
    **dict.fromkeys((aten.channel_shuffle.default, aten.native_channel_shuffle.default), _channel_shuffle),
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.repeat_interleave.self_Tensor: _repeat_interleave,
    aten.gather.default: _gather,
    aten.scatter.value: _scatter,
    aten.scatter.src: _scatter,
    aten.index.Tensor: _index,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.index_put.default: _index_put,
    aten.index_copy.default: _index_copy,
    aten.index_fill.int_Scalar: _index_fill,
    aten.index_fill.int_Tensor: _index_fill,
    aten.copy.default: _copy,
    aten.fill.Tensor: _fill,
    aten.tile.default: _tile,
    aten.rot90.default: _rot90,
}
# Their sizes follow from values that are constants, so they can be spelled before they are measured.
SIZED_BY_CONSTANTS = frozenset({aten.index.Tensor, aten.repeat_interleave.self_Tensor})
