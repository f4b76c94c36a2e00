"""Chains of views and permutations, followed on the level of single factors of axes.

A view splits an axis into factors or joins neighbours, a permutation reorders axes. So behind any chain of them each
axis is a row of *atoms*, and each atom a factor of one axis of the chain's first operand:

    (B, 6, T)                    [0]            [1]            [2]
    view(B, 2, 3, T)             [0]            [1.0] [1.1]    [2]
    transpose(1, 2)              [0]            [1.1] [1.0]    [2]
    view(B, 6, T)                [0]            [1.1 1.0]      [2]       channels read at 0, 3, 1, 4, 2, 5

Sizes are compared under all three example shapes, so dynamic axes take part like static ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from passes.ir.axes import Reading
from passes.ir.program import TensorInfo


@dataclass(frozen=True)
class Atom:
    """A factor of an axis; `path` orders the factors of one axis, outermost first, `key` holds its three sizes."""

    axis: int
    path: tuple[int, ...]
    key: tuple[int, ...]

    def split(self, outer: tuple[int, ...]) -> tuple[Atom, Atom]:
        """(outer, inner) factors, the outer one with the given sizes, which divide."""
        inner = tuple(size // part for size, part in zip(self.key, outer, strict=True))
        return Atom(self.axis, (*self.path, 0), outer), Atom(self.axis, (*self.path, 1), inner)


Layout = tuple[tuple[Atom, ...], ...]


def layout_of(info: TensorInfo) -> Layout:
    """Every axis as one atom; an axis of size 1 holds none."""
    return tuple(
        () if set(info.key(axis)) == {1} else (Atom(axis, (), info.key(axis)),) for axis in range(info.rank)
    )


def permuted(layout: Layout, reading: Reading) -> Layout | None:
    """The layout behind a reading that only orders, adds and drops axes; None for any other."""
    if any(read.positions is not None or not read.numbered for read in reading.axes):
        return None
    if any(layout[axis] for axis in reading.dropped):
        return None
    return tuple(() if read.source is None else layout[read.source] for read in reading.axes)


def viewed(layout: Layout, target: TensorInfo) -> Layout | None:
    """The layout behind a view to the shape of `target`; None where its axes cut through the atoms."""
    left = [atom for axis in layout for atom in axis][::-1]
    found = []
    for axis in range(target.rank):
        atoms = _take(left, target.key(axis))
        if atoms is None:
            return None
        found.append(atoms)
    return None if left else tuple(found)


def _take(left: list[Atom], wanted: tuple[int, ...]) -> tuple[Atom, ...] | None:
    """The next atoms whose sizes multiply to `wanted`, taken off the end of `left`; the last one may be split."""
    taken: list[Atom] = []
    while set(wanted) != {1}:
        if not left:
            return None
        atom = left.pop()
        if not _divides(atom.key, wanted):
            if not _divides(wanted, atom.key):
                return None
            atom, remainder = atom.split(wanted)
            left.append(remainder)
        taken.append(atom)
        wanted = tuple(size // part for size, part in zip(wanted, atom.key, strict=True))
    return tuple(taken)


def _divides(part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return not any(size % divisor for size, divisor in zip(whole, part, strict=True))


def reordered_axis(layout: Layout, source: TensorInfo) -> tuple[int, Tensor | None] | None:
    """(axis, positions read along it) where the chain only reorders one static axis of its first operand.

    Positions None: the chain changes nothing. None for every other chain.
    """
    if len(layout) != source.rank:
        return None
    found: tuple[int, Tensor | None] = (0, None)
    for axis, atoms in enumerate(layout):
        if any(atom.axis != axis for atom in atoms) or _sizes(atoms) != source.key(axis):
            return None
        ordered = sorted(atoms, key=lambda atom: atom.path)
        if list(atoms) == ordered:
            continue
        if found[1] is not None or not source.is_static(axis):
            return None
        numbers = torch.arange(source.sizes[axis]).reshape([atom.key[0] for atom in ordered])
        found = axis, numbers.permute([ordered.index(atom) for atom in atoms]).flatten()
    return found


def _sizes(atoms: Sequence[Atom]) -> tuple[int, ...]:
    return tuple(prod(atom.key[example] for atom in atoms) for example in range(3))
