"""Several spellings of a product, as two operators: linear with a constant weight, and matmul.

- mm, matmul and addmm with a constant matrix become linear;
- bmm, mm, mv and dot of values become matmul, baddbmm, addmm and addmv a matmul, a factor and a sum, and so does
  linear with a weight that is not constant;
- einsum and tensordot become permute, sum, reshape and products of two, from left to right. For two operands with
  letters

      batch (in both and in the result)   rows (in the first)   columns (in the second)   summed (in both)

  it is  (batch, rows, summed) @ (batch, summed, columns),  where letters of a kind share one axis for the while.

An einsum of a diagonal, or with sizes that are broadcast, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from string import ascii_letters
from typing import Any

import torch
from torch import fx

from passes.ir.program import Op
from passes.ir.rewriter import Rewriter

aten = torch.ops.aten

Spelling = Callable[[Op, Rewriter], fx.Node | None]


def _linear_call(op: Op, rewriter: Rewriter, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """linear(x, W^T, b) in the place of a product x W + b."""
    value = op.program.constant(weight)
    assert value is not None
    args: list[Any] = [rewriter.value(x)]
    args.append(rewriter.constant(value.T, str(weight.target), rewriter.dtype_of(weight)))
    if bias is not None:
        held = op.program.constant(bias)
        assert held is not None
        full = held.expand(value.shape[1]).clone()
        args.append(rewriter.constant(full, str(bias.target), rewriter.dtype_of(bias)))
    return rewriter.call(aten.linear.default, args, like=op.node)


def _is_matrix(op: Op, node: object) -> bool:
    held = op.program.held(node)
    return held is not None and len(held.shape) == 2


def _addmm(op: Op, rewriter: Rewriter) -> fx.Node | None:
    bias, x, weight = (op.args[name] for name in ("self", "mat1", "mat2"))
    held = op.program.constant(bias)
    plain = op.args["beta"] == 1 and op.args["alpha"] == 1
    if not plain or held is None or held.ndim > 1 or not _is_matrix(op, weight) or _is_matrix(op, x):
        return _sum_with_product(op, rewriter)
    return _linear_call(op, rewriter, x, weight, bias)


def _product(op: Op, rewriter: Rewriter) -> fx.Node | None:
    x, other = op.args["self"], op.arg("mat2", "other", "vec", "tensor")
    if _is_matrix(op, other) and op.program.held(x) is None:
        return _linear_call(op, rewriter, x, other, None)
    if op.info is None or any(node not in op.program.infos for node in (x, other)):
        return None
    ranks = [op.info_of(node).rank for node in (x, other)]
    if op.target is aten.matmul.default and min(ranks) > 1:
        return None
    return _matmul(op, rewriter, rewriter.value(x), rewriter.value(other), ranks, step="")


def _matmul(
    op: Op, rewriter: Rewriter, left: fx.Node, right: fx.Node, ranks: Sequence[int], step: str
) -> fx.Node:
    """A product of new nodes; a vector gets a second axis for the while."""
    dropped = []
    if ranks[0] == 1:
        left = rewriter.call(aten.unsqueeze.default, (left, 0), like=op.node, step="row")
        dropped.append(-2)
    if ranks[1] == 1:
        right = rewriter.call(aten.unsqueeze.default, (right, 1), like=op.node, step="column")
        dropped.append(-1)
    if not dropped:
        return rewriter.call(aten.matmul.default, (left, right), like=op.node, step=step)
    found = rewriter.call(aten.matmul.default, (left, right), like=op.node, step="product")
    return rewriter.call(aten.squeeze.dims, (found, dropped), like=op.node, step=step)


def _sum_with_product(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """Beta * x + alpha * (a b)."""
    x, *factors = op.operands
    if op.info is None or len(factors) != 2 or op.info.dtype == torch.bool:
        return None
    ranks = [op.info_of(node).rank for node in factors]
    left, right = (rewriter.value(node) for node in factors)
    found = _matmul(op, rewriter, left, right, ranks, step="term")
    if op.args["alpha"] != 1:
        found = rewriter.call(aten.mul.Tensor, (found, op.args["alpha"]), like=op.node, step="alpha")
    added = rewriter.value(x)
    if op.args["beta"] != 1:
        added = rewriter.call(aten.mul.Tensor, (added, op.args["beta"]), like=op.node, step="beta")
    return rewriter.call(aten.add.Tensor, (found, added), like=op.node)


def _linear(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """Linear with a weight that is not constant: x W^T + b."""
    x, weight, bias = (op.args[name] for name in ("input", "weight", "bias"))
    if op.info is None or op.held("weight") is not None or op.info_of(weight).rank != 2:
        return None
    turned = rewriter.call(aten.transpose.int, (rewriter.value(weight), 0, 1), like=op.node, step="turned")
    ranks = [op.info_of(x).rank, 2]
    step = "" if bias is None else "product"
    found = _matmul(op, rewriter, rewriter.value(x), turned, ranks, step=step)
    if bias is None:
        return found
    return rewriter.call(aten.add.Tensor, (found, rewriter.value(bias)), like=op.node)


def _einsum(op: Op, rewriter: Rewriter) -> fx.Node | None:
    tensors = op.args["tensors"]
    if op.info is None or any(node not in op.program.infos for node in tensors):
        return None
    terms = _parse(op.args["equation"], [op.info_of(node).rank for node in tensors])
    return None if terms is None else _contracted(op, rewriter, tensors, terms)


def _tensordot(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """The axes dims_self of the one meet dims_other of the other; the rest stay, in order."""
    tensors = op.args["self"], op.args["other"]
    if op.info is None or any(node not in op.program.infos for node in tensors):
        return None
    pairs = [
        (op.axis(axis, tensors[0]), op.axis(other, tensors[1]))
        for axis, other in zip(op.args["dims_self"], op.args["dims_other"], strict=True)
    ]
    if pairs == [(op.info_of(tensors[0]).rank - 1, 0)] and _is_matrix(op, tensors[1]):
        return _linear_call(op, rewriter, *tensors, None)
    spare = iter(ascii_letters)
    first, second = ([next(spare) for _ in range(op.info_of(node).rank)] for node in tensors)
    for axis, other in pairs:
        second[other] = first[axis]
    left, right = "".join(first), "".join(second)
    result = "".join(letter for letter in left + right if not (letter in left and letter in right))
    return _contracted(op, rewriter, tensors, [left, right, result])


def _contracted(
    op: Op, rewriter: Rewriter, tensors: Sequence[fx.Node], terms: Sequence[str]
) -> fx.Node | None:
    """The product of tensors with these letters; the last of `terms` is the result's."""
    sizes: dict[str, tuple[int, ...]] = {}
    for node, letters in zip(tensors, terms[:-1], strict=True):
        for axis, letter in enumerate(letters):
            if sizes.setdefault(letter, op.info_of(node).key(axis)) != op.info_of(node).key(axis):
                return None
    builder = Einsum(op, rewriter, sizes)
    factors = [Term(rewriter.value(node), letters) for node, letters in zip(tensors, terms[:-1], strict=True)]
    return builder.build(factors, terms[-1])


def _parse(equation: str, ranks: Sequence[int]) -> list[str] | None:
    """The letters of each operand and of the result; None where one has a letter twice.

    The axes behind an ellipsis get capital letters of their own that the equation does not use.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = [letter for letter in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if letter not in equation]
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    if not arrow:
        once = sorted(letter for letter in set(left) - set(",.") if left.count(letter) == 1)
        right = ("..." if "..." in left else "") + "".join(once)
    extra = "".join(spare[: max(hidden)])
    found = [
        term.replace("...", extra[len(extra) - count :]) for term, count in zip(terms, hidden, strict=True)
    ]
    found.append(right.replace("...", extra))
    return None if any(len(set(term)) != len(term) for term in found) else found


@dataclass(frozen=True)
class Term:
    """A value of the new graph and the letter of each of its axes."""

    node: fx.Node
    letters: str


class Einsum:
    """The calls of one einsum, under construction."""

    def __init__(self, op: Op, rewriter: Rewriter, sizes: dict[str, tuple[int, ...]]) -> None:
        self.op, self.rewriter, self.sizes = op, rewriter, sizes
        self.owners: dict[str, tuple[fx.Node, int]] = {}

    def build(self, factors: Sequence[Term], result: str) -> fx.Node | None:
        for term in factors:
            for axis, letter in enumerate(term.letters):
                self.owners.setdefault(letter, (term.node, axis))
        others = [
            set(result).union(*(set(other.letters) for other in factors if other is not term))
            for term in factors
        ]
        last, *rest = [self.summed(term, wanted) for term, wanted in zip(factors, others, strict=True)]
        while rest:
            wanted = set(result).union(*(set(term.letters) for term in rest[1:]))
            found = self.product(last, rest.pop(0), wanted)
            if found is None:
                return None
            last = found
        done = self.ordered(last, result)
        if done.node in {term.node for term in factors}:
            return done.node
        done.node.meta = dict(self.op.node.meta)
        return done.node

    def call(self, target: Any, *args: Any, step: str) -> fx.Node:
        return self.rewriter.call(target, args, like=self.op.node, step=step)

    def summed(self, term: Term, wanted: set[str]) -> Term:
        """The term without the letters that nothing else has."""
        alone = [axis for axis, letter in enumerate(term.letters) if letter not in wanted]
        if not alone:
            return term
        letters = "".join(letter for letter in term.letters if letter in wanted)
        return Term(self.call(aten.sum.dim_IntList, term.node, alone, step="sum"), letters)

    def ordered(self, term: Term, letters: str) -> Term:
        if term.letters == letters:
            return term
        order = [term.letters.index(letter) for letter in letters]
        return Term(self.call(aten.permute.default, term.node, order, step="permuted"), letters)

    def product(self, left: Term, right: Term, wanted: set[str]) -> Term | None:
        shared = set(left.letters) & set(right.letters)
        batch = "".join(letter for letter in left.letters if letter in shared & wanted)
        summed = "".join(letter for letter in left.letters if letter in shared - wanted)
        rows = "".join(letter for letter in left.letters if letter not in shared)
        columns = "".join(letter for letter in right.letters if letter not in shared)
        free = not batch and len(rows) > 0  # matmul broadcasts over further rows
        row_groups = list(rows) if free else [rows]
        first = self.merged(left, [*batch, *row_groups, summed])
        second = self.merged(right, [*batch, summed, columns])
        if first is None or second is None:
            return None
        found = self.call(aten.matmul.default, first, second, step="product")
        return self.split(found, [*batch, *row_groups, columns])

    def size(self, letter: str) -> Any:
        keys = self.sizes[letter]
        if len(set(keys)) == 1:
            return keys[0]
        node, axis = self.owners[letter]
        return self.call(aten.sym_size.int, node, axis, step=f"size_{letter}")

    def is_static(self, letters: str) -> bool:
        return all(len(set(self.sizes[letter])) == 1 for letter in letters)

    def merged(self, term: Term, groups: Sequence[str]) -> fx.Node | None:
        """The term with one axis for each group of letters; None where sizes of two groups are run-time products."""
        ordered = self.ordered(term, "".join(groups)).node
        if all(len(group) == 1 for group in groups):
            return ordered
        mixed = [group for group in groups if len(group) > 1 and not self.is_static(group)]
        if len(mixed) > 1:
            return None
        sizes = [
            -1
            if group in mixed
            else self.size(group)
            if len(group) == 1
            else prod(self.sizes[letter][0] for letter in group)
            for group in groups
        ]
        return self.call(aten.reshape.default, ordered, sizes, step="merged")

    def split(self, node: fx.Node, groups: Sequence[str]) -> Term:
        """The value with one axis for each letter."""
        letters = "".join(groups)
        if all(len(group) == 1 for group in groups):
            return Term(node, letters)
        sizes = [self.size(letter) for letter in letters]
        return Term(self.call(aten.reshape.default, node, sizes, step="split"), letters)


PRODUCTS: dict[Any, Spelling] = {
    aten.addmm.default: _addmm,
    aten.addmv.default: _sum_with_product,
    aten.baddbmm.default: _sum_with_product,
    aten.bmm.default: _product,
    aten.dot.default: _product,
    aten.einsum.default: _einsum,
    aten.linear.default: _linear,
    aten.matmul.default: _product,
    aten.mm.default: _product,
    aten.mv.default: _product,
    aten.tensordot.default: _tensordot,
}
