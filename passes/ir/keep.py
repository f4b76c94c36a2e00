"""Keep sets: for every value and static axis, which indices stay.

Keeping more than necessary is always legal, so the solution is monotone: the sets start at what must stay (some entry
at the index depends on the input and reaches an output) and the rules' couplings only ever widen them, until nothing
changes. Each index remembers the first reason it was widened for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from passes.ir.lattice import any_over_others
from passes.ir.program import TensorInfo


class KeepSets:
    """Keep sets of one Program, by node name and axis; dynamic axes are always kept whole."""

    def __init__(self, infos: Mapping[fx.Node, TensorInfo]) -> None:
        self._infos = {node.name: info for node, info in infos.items()}
        self._sets: dict[tuple[str, int], Tensor] = {}
        self._reasons: dict[tuple[str, int], list[tuple[str, Tensor]]] = {}
        self._needed: dict[tuple[str, int], Tensor] = {}
        self.changed = False

    def renamed(self, names: Mapping[str, str], infos: Mapping[fx.Node, TensorInfo]) -> KeepSets:
        """The same sets for a graph whose nodes have other names (old name to new; the rest is dropped)."""
        other = KeepSets(infos)
        for (name, axis), kept in self._sets.items():
            if name in names:
                other._sets[names[name], axis] = kept
        for (name, axis), reasons in self._reasons.items():
            if name in names:
                other._reasons[names[name], axis] = reasons
        for (name, axis), needed in self._needed.items():
            if name in names:
                other._needed[names[name], axis] = needed
        return other

    def start(self, node: fx.Node, needed: Tensor) -> None:
        """Begin with the indices at which some entry of the stored mask `needed` is set."""
        info = self._infos[node.name]
        for axis in info.static_axes:
            self._sets[node.name, axis] = any_over_others(needed, axis, info.sizes[axis])
            self._needed[node.name, axis] = self._sets[node.name, axis]

    def get(self, node: fx.Node, axis: int) -> Tensor:
        """The keep set along one axis: bool, shape (size of the axis,); all set along a dynamic axis."""
        found = self._sets.get((node.name, axis))
        if found is None:
            return torch.ones(self._infos[node.name].sizes[axis], dtype=torch.bool)
        return found

    def widen(self, node: fx.Node, axis: int, mask: Tensor, why: str = "") -> None:
        """Keep the indices set in `mask` too."""
        held = self._sets.get((node.name, axis))
        if held is None:
            return
        fresh = mask & ~held
        if bool(fresh.any()):
            self._sets[node.name, axis] = held | fresh
            self._reasons.setdefault((node.name, axis), []).append((why, fresh))
            self.changed = True

    def tie(self, first: tuple[fx.Node, int], second: tuple[fx.Node, int], why: str = "") -> None:
        """Make two axes of equal size keep the same indices; each passes its reasons on, `why` where it has none."""
        self._follow(first, second, why)
        self._follow(second, first, why)

    def _follow(self, follower: tuple[fx.Node, int], leader: tuple[fx.Node, int], why: str) -> None:
        held = self._sets.get((follower[0].name, follower[1]))
        wanted = self.get(*leader)
        if held is None or not bool((wanted & ~held).any()):
            return
        for reason, mask in self._reasons.get((leader[0].name, leader[1]), []):
            self.widen(*follower, mask, reason)
        self.widen(*follower, wanted, why)

    def fill(self, node: fx.Node, why: str, axes: tuple[int, ...] | None = None) -> None:
        """Keep everything along the given axes (all by default)."""
        info = self._infos[node.name]
        for axis in info.static_axes if axes is None else axes:
            if (node.name, axis) in self._sets:
                self.widen(node, axis, torch.ones(info.sizes[axis], dtype=torch.bool), why)

    def is_empty(self, node: fx.Node) -> bool:
        """Whether nothing of the value is kept along some axis (a value that had entries to begin with)."""
        info = self._infos[node.name]
        return any(info.sizes[axis] > 0 and not bool(self.get(node, axis).any()) for axis in info.static_axes)

    def is_full(self, node: fx.Node, axis: int) -> bool:
        return bool(self.get(node, axis).all())

    def index(self, node: fx.Node, axis: int) -> Tensor | None:
        """The kept indices in ascending order, int64; None where all are kept."""
        kept = self.get(node, axis)
        return None if bool(kept.all()) else kept.nonzero().flatten()

    def count(self, node: fx.Node, axis: int) -> int:
        """How many indices are kept."""
        return int(self.get(node, axis).sum())

    def at(self, name: str, axis: int) -> Tensor:
        """The same by the value's name, along a static axis."""
        return self._sets[name, axis]

    def needed(self, name: str, axis: int) -> int | None:
        """How many indices had to be kept before any coupling; None for a dynamic axis."""
        found = self._needed.get((name, axis))
        return None if found is None else int(found.sum())

    def needed_at(self, node: fx.Node, axis: int) -> Tensor:
        """The indices that had to be kept before any coupling; bool, (size,), all along a dynamic axis."""
        found = self._needed.get((node.name, axis))
        return self.get(node, axis) if found is None else found

    def reasons(self, name: str, axis: int) -> list[tuple[str, int]]:
        """Why indices beyond the necessary ones are kept: (reason, how many), in the order they came."""
        return [(why, int(mask.sum())) for why, mask in self.reason_masks(name, axis)]

    def reason_masks(self, name: str, axis: int) -> list[tuple[str, Tensor]]:
        """The same with the indices themselves: bool, (size of the axis,)."""
        return list(self._reasons.get((name, axis), []))
