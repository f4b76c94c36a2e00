"""Entries that move along some axes to where the input says, or mix there, and stay where they are along all others.

Gathers and scatters by indices that are computed, sampling at points of a grid, pools with indices and their inverse,
Fourier transforms. A `Routing` says which axis of each operand is which axis of the result; along all others everything
meets.

forward: what is read is known where it is the same number along the axes that meet; what is added, compared or
    transformed only where it is 0 (into a base: where the base is known).
backward: a live entry needs all that meets there, of data and indices alike.
couple: aligned axes keep equal indices, the others are kept whole.
rewrite: the call itself, on what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from passes.ir.axes import any_over, flatten_facts
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts
from passes.ir.program import Op
from passes.rules.base import Rule, rule

aten = torch.ops.aten

Alignment = Mapping[int, int]


@dataclass(frozen=True)
class Routing:
    """What a call does.

    `aligned`: for each tensor operand, its static axes that are axes of the result. `data`: operands whose entries
    arrive in the result. `base`: what they are added to, which may be one of them. `reads`: entries arrive as they are.
    """

    aligned: Mapping[fx.Node, Alignment]
    data: tuple[fx.Node, ...]
    base: fx.Node | None = None
    reads: bool = False


class Routed(Rule):
    """Any call that the table below describes."""

    def applies(self, op: Op) -> bool:
        return op.target in ROUTINGS and ROUTINGS[op.target](op) is not None

    def routing(self, op: Op) -> Routing:
        found = ROUTINGS[op.target](op)
        assert found is not None
        return found

    def forward(self, op: Op, facts: Sequence[Facts]) -> Facts:
        routing, by_node = self.routing(op), dict(zip(op.operands, facts, strict=True))
        if not routing.data or not all(by_node[node].any_known for node in routing.data):
            return Facts.unknown(op.out)

        def met(node: fx.Node) -> Facts:
            return _flat(op, node, by_node[node], routing.aligned[node])

        if routing.reads:
            [x] = routing.data
            return met(x)
        zeros = [fact.forget(fact.value != 0).known for fact in map(met, routing.data)]
        known = torch.stack(torch.broadcast_tensors(*zeros)).all(dim=0)  # type: ignore[no-untyped-call]
        if routing.base is None:
            return Facts(torch.zeros([1] * op.out.rank, dtype=op.out.dtype), known)
        base = met(routing.base)
        return Facts(base.value, base.known & known)

    def backward(self, op: Op, demand: Tensor, facts: Sequence[Facts]) -> Sequence[Tensor]:
        aligned = self.routing(op).aligned
        return [_asked(op, operand, demand, aligned[operand]) for operand in op.operands]

    def couple(self, op: Op, keep: KeepSets, facts: Sequence[Facts]) -> None:
        why, served = f"positions of {op.source.name}", set[int]()
        for operand, axes in self.routing(op).aligned.items():
            served.update(axes.values())
            for axis, out_axis in axes.items():
                keep.tie((operand, axis), (op.node, out_axis), f"aligned by {op.source.name}")
            keep.fill(
                operand, why, tuple(axis for axis in op.info_of(operand).static_axes if axis not in axes)
            )
        keep.fill(op.node, why, tuple(axis for axis in op.out.static_axes if axis not in served))


def _flat(op: Op, node: fx.Node, facts: Facts, aligned: Alignment) -> Facts:
    """What is known along the axes that stay, laid out as the result; size 1 along the others."""
    others = [axis for axis in range(op.info_of(node).rank) if axis not in aligned]
    flat = flatten_facts(facts, others)
    shape = [1] * op.out.rank
    for axis, out_axis in aligned.items():
        shape[out_axis] = flat.known.shape[axis]
    order = sorted(aligned, key=aligned.__getitem__)
    order = [*order, *others]
    return Facts(*(stored.permute(order).reshape(shape) for stored in (flat.value, flat.known)))


def _asked(op: Op, node: fx.Node, demand: Tensor, aligned: Alignment) -> Tensor:
    """What an operand is asked for: along its own axes that stay what is live there, along the others everything."""
    by_out = {out_axis: axis for axis, out_axis in aligned.items()}
    others = [axis for axis in range(op.out.rank) if axis not in by_out]
    asked = any_over(demand, others).permute([*sorted(by_out, key=by_out.__getitem__), *others])
    shape = [1] * op.info_of(node).rank
    for out_axis, axis in by_out.items():
        shape[axis] = demand.shape[out_axis]
    return asked.reshape(shape)


def _beside(op: Op, mixed: Sequence[int], *operands: fx.Node) -> dict[fx.Node, Alignment]:
    """Operands of the result's rank, aligned along the static axes beside `mixed` that all of them have whole."""
    infos = [op.info_of(node) for node in operands]
    whole = [
        axis
        for axis in op.out.static_axes
        if axis not in mixed and all(info.key(axis) == op.out.key(axis) for info in infos)
    ]
    return {node: {axis: axis for axis in whole} for node in operands}


def _index(op: Op) -> Routing | None:
    """x[..., i, j, ...] with indices of which at least one is computed; boolean ones have no sizes to speak of."""
    x, indices = op.args["self"], op.args["indices"]
    used = [axis for axis, index in enumerate(indices) if index is not None]
    infos = [op.program.infos.get(indices[axis]) for axis in used]
    if x not in op.program.infos or not used or x in {indices[axis] for axis in used}:
        return None
    if any(info is None or info.dtype not in (torch.int32, torch.int64) for info in infos):
        return None
    rank = max(info.rank for info in infos if info is not None)
    rest = [axis for axis in range(op.info_of(x).rank) if axis not in used]
    together = used == list(range(used[0], used[-1] + 1))
    first = used[0] if together else 0
    places = {axis: number if number < first else number + rank for number, axis in enumerate(rest)}
    aligned = {axis: place for axis, place in places.items() if op.info_of(x).is_static(axis)}
    return Routing({**{indices[axis]: {} for axis in used}, x: aligned}, (x,), reads=True)


def _index_select(op: Op) -> Routing | None:
    x, index = op.args["self"], op.args["index"]
    if x not in op.program.infos or index not in op.program.infos or op.out.rank == 0:
        return None
    return Routing({index: {}, **_beside(op, [op.axis(op.args["dim"])], x)}, (x,), reads=True)


def _gather(op: Op) -> Routing | None:
    x, index = op.args["self"], op.args["index"]
    if not {x, index} <= op.program.infos.keys() or op.out.rank == 0:
        return None
    return Routing(_beside(op, [op.axis(op.args["dim"])], x, index), (x,), reads=True)


def _index_add(op: Op) -> Routing | None:
    x, index, source = (op.args[name] for name in ("self", "index", "source"))
    if not {x, index, source} <= op.program.infos.keys() or op.out.rank == 0:
        return None
    aligned = _beside(op, [op.axis(op.args["dim"])], x, source)
    return Routing({**aligned, index: {}}, (source,), base=x)


def _scatter(op: Op) -> Routing | None:
    """Sums keep a known base where zeros arrive; a plain scatter or another reduction does so for a base of zeros."""
    x, index, source = (op.args[name] for name in ("self", "index", "src"))
    if not {x, index, source} <= op.program.infos.keys() or op.out.rank == 0 or index == source:
        return None
    aligned = _beside(op, [op.axis(op.args["dim"])], x, index, source)
    if op.target is aten.scatter_add.default:
        return Routing(aligned, (source,), base=x)
    return Routing(aligned, (x, source))


def _index_copy(op: Op) -> Routing | None:
    x, index, source = (op.args[name] for name in ("self", "index", "source"))
    if not {x, index, source} <= op.program.infos.keys() or op.out.rank == 0:
        return None
    aligned = _beside(op, [op.axis(op.args["dim"])], x, source)
    return Routing({**aligned, index: {}}, (x, source))


def _grid_sampler(op: Op) -> Routing | None:
    """Points outside are 0, or are read at the border or as in a mirror: then what is flat stays so."""
    x, grid = op.args["input"], op.args["grid"]
    if not {x, grid} <= op.program.infos.keys() or x == grid or not op.info_of(x).is_static(1):
        return None
    return Routing({x: {1: 1}, grid: {}}, (x,), reads=op.args["padding_mode"] != 0)


def _max_pool(op: Op) -> Routing | None:
    """The largest entries of windows, and where they lie: who reads both has no other spelling."""
    [x] = op.operands or [None]
    if x is None or op.position is None:
        return None
    mixed = range(op.out.rank - MAX_POOLS[op.target], op.out.rank)
    return Routing(_beside(op, mixed, x), (x,) if op.position == 0 else (), reads=True)


def _max_unpool(op: Op) -> Routing | None:
    x, indices = op.args["self"], op.args["indices"]
    if not {x, indices} <= op.program.infos.keys() or x == indices:
        return None
    spatial = 3 if op.target is aten.max_unpool3d.default else 2
    return Routing(_beside(op, range(op.out.rank - spatial, op.out.rank), x, indices), (x,))


def _fourier(op: Op) -> Routing | None:
    [x] = op.operands or [None]
    dim = op.args["dim"]
    if x is None or op.info_of(x).rank != op.out.rank:
        return None
    if dim is None:
        count = len(op.args["s"]) if op.args.get("s") is not None else op.out.rank
        dim = range(op.out.rank - count, op.out.rank)
    mixed = [dim] if isinstance(dim, int) else dim
    return Routing(_beside(op, [axis % op.out.rank for axis in mixed], x), (x,))


MAX_POOLS = {
    getattr(aten, name.format(rank)).default: rank
    for name in ("max_pool{}d_with_indices", "adaptive_max_pool{}d")
    for rank in (1, 2, 3)
    if hasattr(aten, name.format(rank))
}
FOURIER = tuple(
    getattr(aten, f"fft_{name}{kind}").default
    for kind in ("", "2", "n")
    for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
)
ROUTINGS: Mapping[object, Callable[[Op], Routing | None]] = {
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.index_add.default: _index_add,
    aten.index_copy.default: _index_copy,
    aten.scatter_add.default: _scatter,
    aten.scatter.src: _scatter,
    aten.scatter_reduce.two: _scatter,
    aten.grid_sampler.default: _grid_sampler,
    aten.grid_sampler_2d.default: _grid_sampler,
    aten.grid_sampler_3d.default: _grid_sampler,
    aten.max_unpool2d.default: _max_unpool,
    aten.max_unpool3d.default: _max_unpool,
    **dict.fromkeys(MAX_POOLS, _max_pool),
    **dict.fromkeys(FOURIER, _fourier),
}
rule(*(ROUTINGS.keys() - {aten.index.Tensor, aten.index_select.default}))(Routed)
