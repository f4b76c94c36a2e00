"""compose_readings: entries that are moved several times in a row are moved once, and not at all where nothing moved.

- a reading of a reading along the same axis is one reading of the source: slice of slice, flip of index_select;
- a reading of a concatenation becomes a reading of the operands that it meets, one after the other (cat, then split);
- a concatenation of concatenations is one, if nobody else reads the inner one (in a dense block each layer does, and n
  layers would make n squared operands); neighbours that read on in one source become one reading, and pieces that
  together are all of a source become the source;
- select of stack is the operand; equal readings of one value are one call;
- a chain of views and permutations that only reorders one axis (a channel shuffle written with views) becomes one
  index_select, and one that changes nothing goes (passes/ir/regroup.py).

So each piece has keep sets of its own, and a permutation is one call that fold_permutations can move.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from passes.ir.axes import Reading
from passes.ir.pipeline import Result
from passes.ir.program import Op, Program
from passes.ir.regroup import Layout, layout_of, permuted, reordered_axis, viewed
from passes.ir.rewriter import Rewriter
from passes.rules import rule_for
from passes.rules.joining import Concatenate, Stack, joined_axis
from passes.rules.reading import is_tied, read_call
from passes.rules.selection import LAST, Select
from passes.rules.view import Rearrange, Squeeze, View

aten = torch.ops.aten

LONGEST_CHAIN = 8


@dataclass(frozen=True)
class ComposeReadings:
    """The pass; it has no options."""

    name: str = "compose_readings"

    def __call__(self, program: Program) -> Result:
        composer = _Composer(program)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                composer.rewriter.placeholder(node)
                composer.known.add(composer.rewriter.env[node])
            elif node.op == "call_function":
                new = composer.composed(node)
                composer.changed |= new is not None
                composer.rewriter.env[node] = composer.rewriter.copy(node) if new is None else new
                composer.remember(node)
        composer.rewriter.output()
        return Result(composer.rewriter.finish(), True) if composer.changed else Result(program, False)


@dataclass(frozen=True, eq=False)
class Piece:
    """What a new value reads of another one along an axis: `positions` of `count`, int64."""

    source: fx.Node
    positions: Tensor
    count: int

    @property
    def is_whole(self) -> bool:
        return torch.equal(self.positions, torch.arange(self.count))

    def key(self, axis: int) -> tuple[fx.Node, int, bytes]:
        return self.source, axis, self.positions.numpy().tobytes()

    def at(self, positions: Tensor) -> Piece:
        return Piece(self.source, self.positions[positions], self.count)


@dataclass
class _Composer:
    """The pass at work; the tables are about new nodes, but for `chains`."""

    program: Program
    changed: bool = False
    rewriter: Rewriter = field(init=False)
    pieces: dict[tuple[fx.Node, int], tuple[Piece, ...]] = field(default_factory=dict)
    stacks: dict[tuple[fx.Node, int], tuple[fx.Node, ...]] = field(default_factory=dict)
    chains: dict[fx.Node, tuple[tuple[fx.Node, Layout], ...]] = field(default_factory=dict)
    held: dict[tuple[fx.Node, int, bytes], fx.Node] = field(default_factory=dict)
    shared: set[fx.Node] = field(default_factory=set)
    known: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rewriter = Rewriter(self.program)

    def composed(self, node: fx.Node) -> fx.Node | None:
        """The new value of a call that can be composed with what is before it."""
        if node not in self.program.infos:
            return None
        op = self.program.op(node)
        rule = rule_for(op)
        if isinstance(rule, Concatenate):
            return self._concatenation(op)
        if isinstance(rule, Select):
            return self._reading(op, rule.reading(op))
        if isinstance(rule, (View, Rearrange, Squeeze)):
            return self._chain(op, rule)
        return None

    def remember(self, node: fx.Node) -> None:
        """Note what the new value of a call reads, for those after it.

        Nothing of a value that was there before (x, for a flip of a flip of x): it would read itself.
        """
        new = self.rewriter.env[node]
        if new in self.known or node not in self.program.infos:
            return
        self.known.add(new)
        op = self.program.op(node)
        rule = rule_for(op)
        if isinstance(rule, Concatenate) and op.out.is_static(joined_axis(op)):
            axis = joined_axis(op)
            self.pieces.setdefault((new, axis), tuple(self._operand_pieces(op, axis)))
            if len(node.users) > 1:
                self.shared.add(new)
        elif isinstance(rule, Stack):
            values = tuple(self.rewriter.value(operand) for operand in op.operands)
            self.stacks[new, joined_axis(op)] = values
        elif isinstance(rule, Select):
            moved = _moved_axis(op, rule.reading(op))
            if moved is not None and not moved[2]:
                axis, positions, _ = moved
                piece = self._piece(op.operands[0], positions, axis)
                self.pieces.setdefault((new, axis), (piece,))
                self.held.setdefault(piece.key(axis), new)

    def _piece(self, operand: fx.Node, positions: Tensor, axis: int) -> Piece:
        count = self.program.infos[operand].sizes[axis]
        return Piece(self.rewriter.value(operand), positions, count)

    def _operand_pieces(self, op: Op, axis: int) -> Iterable[Piece]:
        for operand in op.operands:
            count = op.info_of(operand).sizes[axis]
            whole = Piece(self.rewriter.value(operand), torch.arange(count), count)
            yield from self._resolved([whole], axis, through_shared=False)

    def _resolved(self, pieces: Iterable[Piece], axis: int, through_shared: bool = True) -> list[Piece]:
        """The same entries read from as far back as they can be, neighbours joined.

        Without `through_shared` a concatenation that others read, too, is taken whole.
        """
        found: list[Piece] = []
        ahead = list(pieces)[::-1]
        while ahead:
            piece = ahead.pop()
            behind = self.pieces.get((piece.source, axis))
            stays = behind is None or (not through_shared and piece.source in self.shared and piece.is_whole)
            parts = None if stays or behind is None else _runs(piece.positions, behind)
            if parts is None:
                found.append(piece)
            else:
                ahead += parts[::-1]
        return _joined(found)

    def _reading(self, op: Op, reading: Reading) -> fx.Node | None:
        if _is_whole_dynamic_slice(op):
            return self.rewriter.value(op.operands[0])
        moved = _moved_axis(op, reading)
        if moved is None:
            return None
        axis, positions, drops = moved
        direct = self._piece(op.operands[0], positions, axis)
        stacked = self.stacks.get((direct.source, axis))
        if drops and stacked is not None:
            return stacked[int(positions)]
        pieces = self._resolved([direct], axis)
        if len(pieces) == 1 and not drops and pieces[0].key(axis) in self.held:
            return self.held[pieces[0].key(axis)]
        if len(pieces) == 1 and pieces[0].source is direct.source and (drops or not pieces[0].is_whole):
            return None
        return self._emit(op, axis, pieces, drops)

    def _concatenation(self, op: Op) -> fx.Node | None:
        axis = joined_axis(op)
        if not op.out.is_static(axis):
            return None
        given = list(self._operand_pieces(op, axis))
        pieces = _joined(given)
        if len({piece.source for piece in pieces}) == 1 and len(pieces) > 1:
            pieces = [_one_piece(pieces)]
        same = len(pieces) == len(given) == len(op.operands)
        return None if same else self._emit(op, axis, pieces, False)

    def _emit(self, op: Op, axis: int, pieces: list[Piece], drops: bool) -> fx.Node:
        parts = []
        for number, piece in enumerate(pieces, 1):
            step = "" if len(pieces) == 1 else f"part{number}"
            parts.append(self._read(op, axis, piece, drops, step))
        joined = len(parts) > 1
        new = self.rewriter.call(aten.cat.default, (parts, axis), like=op.node) if joined else parts[0]
        if not drops and not (len(pieces) == 1 and pieces[0].is_whole):
            self.pieces[new, axis] = tuple(pieces)
        if not drops and len(pieces) == 1:
            self.held.setdefault(pieces[0].key(axis), new)
        return new

    def _read(self, op: Op, axis: int, piece: Piece, drops: bool, step: str) -> fx.Node:
        if drops:
            args = (piece.source, axis, int(piece.positions))
            return self.rewriter.call(aten.select.int, args, like=op.node)
        call = read_call(op, self.rewriter, axis, piece.positions, piece.count)
        if call is None:
            return piece.source
        return self.rewriter.call(call[0], (piece.source, *call[1]), like=op.node, step=step)

    def _chain(self, op: Op, rule: View | Rearrange | Squeeze) -> fx.Node | None:
        x = op.operands[0]
        started = ((x, layout_of(op.info_of(x))),)
        links = []
        for base, layout in (self.chains.get(x, ()) + started)[-LONGEST_CHAIN:]:
            after = viewed(layout, op.out) if isinstance(rule, View) else permuted(layout, rule.reading(op))
            if after is None:
                continue
            found = reordered_axis(after, self.program.infos[base]) if _same_shape(op, base) else None
            if found is not None:
                return self._reordered(op, base, *found)
            links.append((base, after))
        self.chains[op.node] = tuple(links)
        return None

    def _reordered(self, op: Op, base: fx.Node, axis: int, positions: Tensor | None) -> fx.Node:
        """The chain as one reading of its first operand."""
        if positions is None:
            return self.rewriter.value(base)
        pieces = self._resolved([self._piece(base, positions, axis)], axis)
        return self._emit(op, axis, pieces, False)


def _same_shape(op: Op, base: fx.Node) -> bool:
    return op.out.has_shape_of(op.program.infos[base])


def _is_whole_dynamic_slice(op: Op) -> bool:
    if op.target is not aten.slice.Tensor or op.out.is_static(op.axis(op.args["dim"])):
        return False
    return op.args["start"] in (None, 0) and op.args["end"] in (None, LAST) and op.args["step"] == 1


def _moved_axis(op: Op, reading: Reading) -> tuple[int, Tensor, bool] | None:
    """(axis, positions, whether the axis goes) of a reading that changes one static axis alone."""
    moved = [read for read in reading.axes if not is_tied(read)]
    if len(moved) == 1 and not reading.dropped and moved[0].positions is not None:
        return moved[0].source or 0, moved[0].positions, False
    info = op.info_of(op.operands[0])
    if not moved and len(reading.dropped) == 1:
        [(axis, index)] = reading.dropped.items()
        return (axis, torch.tensor([index]), True) if info.is_static(axis) else None
    return None


def _runs(positions: Tensor, pieces: tuple[Piece, ...]) -> list[Piece] | None:
    """What reading `positions` of joined pieces reads of each; None where it comes back to one that it left."""
    ends = torch.tensor([piece.positions.numel() for piece in pieces]).cumsum(0)
    owner = torch.searchsorted(ends, positions, right=True)
    visited, counts = torch.unique_consecutive(owner, return_counts=True)
    if visited.unique().numel() < visited.numel():
        return None
    found, start = [], 0
    for number, count in zip(visited.tolist(), counts.tolist(), strict=True):
        first = int(ends[number]) - pieces[number].positions.numel()
        found.append(pieces[number].at(positions[start : start + count] - first))
        start += count
    return found


def _joined(pieces: list[Piece]) -> list[Piece]:
    """The same pieces, with neighbours that read on in one source as one."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last is not None and last.source is piece.source:
            both = torch.cat([last.positions, piece.positions])
            if bool((both.diff() == 1).all()):
                found[-1] = Piece(piece.source, both, piece.count)
                continue
        found.append(piece)
    return found


def _one_piece(pieces: list[Piece]) -> Piece:
    positions = torch.cat([piece.positions for piece in pieces])
    return Piece(pieces[0].source, positions, pieces[0].count)
