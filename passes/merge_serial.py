"""merge_serial: a layer and the one behind it become one, where nothing is between them and that is less work.

    W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)

One of the two reads each position by itself (a linear layer, or a kernel of one without stride and padding), neither
has groups, and nothing else reads the result of the first. The bias of the first must add the same everywhere: not
where the second pads.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from passes.ir.pipeline import Note, Result
from passes.ir.program import Program
from passes.ir.rewriter import Rewriter, with_replaced
from passes.rules.layer import Contraction, contraction_of, emit, label


@dataclass(frozen=True, eq=False)
class Product:
    """Both layers as one: `like` gives strides and the like, `x` is what it reads."""

    like: Contraction
    x: fx.Node
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class MergeSerial:
    """The pass; it has no options."""

    name: str = "merge_serial"

    def __call__(self, program: Program) -> Result:
        found: dict[fx.Node, Product] = {}
        for node in program.calls():
            second = _layer(program, node)
            first = None if second is None or second.x in found else _layer(program, second.x)
            if first is not None and second is not None and len(second.x.users) == 1:
                product = _product(first, second)
                if product is not None:
                    found[node] = product
        if not found:
            return Result(program, False)
        merged = with_replaced(program, lambda rewriter, node: _emit(rewriter, node, found.get(node)))
        notes = tuple(
            Note(label(node), f"is one layer with {label(program.op(node).operands[0])}, in front of it")
            for node in found
        )
        return Result(merged, True, notes)


def _emit(rewriter: Rewriter, node: fx.Node, one: Product | None) -> fx.Node | None:
    """The layer in the place of the second."""
    if one is None:
        return None
    return emit(one.like, rewriter, one.weight, one.bias, 1, x=rewriter.value(one.x), like=node)


def _layer(program: Program, node: fx.Node) -> Contraction | None:
    this = contraction_of(program, node)
    return None if this is None or this.groups != 1 else this


def _product(first: Contraction, second: Contraction) -> Product | None:
    """Both as one where that is less work."""
    if first.spatial_rank != second.spatial_rank or first.dtype != second.dtype:
        return None
    if not (_is_pointwise(first) or _is_pointwise(second)):
        return None
    like = first if _is_pointwise(second) else second
    before = sum(_size(this) * this.positions for this in (first, second))
    if second.out_channels * first.in_channels * prod(like.kernel) * like.positions >= before:
        return None
    moved = None if first.bias is None else second.of_constant(first.bias)
    if first.bias is not None and moved is None:
        return None
    if like is first:
        weight = torch.einsum("om,mi...->oi...", second.weight.flatten(1), first.weight)
    else:
        weight = torch.einsum("om...,mi->oi...", second.weight, first.weight.flatten(1))
    biases = [bias for bias in (moved, second.bias) if bias is not None]
    return Product(like, first.x, weight, sum(biases[1:], biases[0]) if biases else None)


def _size(this: Contraction) -> int:
    """Entries of the weight."""
    return this.out_channels * this.in_channels * prod(this.kernel)


def _is_pointwise(this: Contraction) -> bool:
    """Whether each position of the result reads its own position alone."""
    if not this.spatial_rank:
        return True
    plain = not any(this.per_spatial("padding")) and set(this.per_spatial("stride")) == {1}
    added = this.is_transposed and any(this.per_spatial("output_padding"))
    return plain and not added and prod(this.kernel) == 1
