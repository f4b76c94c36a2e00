"""Operators written as others that have rules already.

    glu(x) = a sigmoid(b), a and b the halves of x       rrelu(x) = leaky_relu(x, (lower + upper) / 2)
    addcmul(x, a, b) = x + value a b                     addcdiv(x, a, b) = x + value a / b
    pairwise_distance(x, y) = norm(x - y + eps)          cosine_similarity(x, y) = sum(x / |x| * y / |y|)
    bilinear(x, y, W, b) = linear(flat products of x and y, flat W, b)

var_mean and std_mean become a variance and a mean, aminmax amin and amax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from passes.ir.program import Op
from passes.ir.rewriter import Rewriter

aten = torch.ops.aten

Formula = Callable[[Op, Rewriter], fx.Node | None]
Piece = Callable[[Op, Op, Rewriter], fx.Node | None]


def _glu(op: Op, rewriter: Rewriter) -> fx.Node | None:
    if not op.operands:
        return None
    x, axis = rewriter.value(op.operands[0]), op.axis(op.args["dim"])
    if not op.out.is_static(axis):
        return None
    half = op.out.sizes[axis]
    value = rewriter.call(aten.slice.Tensor, (x, axis, 0, half), like=op.node, step="value")
    gate = rewriter.call(aten.slice.Tensor, (x, axis, half, 2 * half), like=op.node, step="gate")
    opened = rewriter.call(aten.sigmoid.default, (gate,), like=op.node, step="opened")
    return rewriter.call(aten.mul.Tensor, (value, opened), like=op.node)


def _rrelu(op: Op, rewriter: Rewriter) -> fx.Node | None:
    if op.args["training"]:
        return None
    slope = (op.args["lower"] + op.args["upper"]) / 2
    return rewriter.call(aten.leaky_relu.default, (rewriter.value(op.operands[0]), slope), like=op.node)


def _add_combination(target: Any) -> Formula:
    """The sum of x and value times (a op b)."""

    def formula(op: Op, rewriter: Rewriter) -> fx.Node:
        x, first, second = (rewriter.value(op.args[name]) for name in ("self", "tensor1", "tensor2"))
        joined = rewriter.call(target, (first, second), like=op.node, step="term")
        return rewriter.call(
            aten.add.Tensor, (x, joined), {"alpha": rewriter.map(op.args["value"])}, like=op.node
        )

    return formula


def _pairwise_distance(op: Op, rewriter: Rewriter) -> fx.Node:
    first, second = rewriter.value(op.args["x1"]), rewriter.value(op.args["x2"])
    difference = rewriter.call(aten.sub.Tensor, (first, second), like=op.node, step="difference")
    shifted = rewriter.call(aten.add.Tensor, (difference, op.args["eps"]), like=op.node, step="shifted")
    arguments = (shifted, op.args["p"], [-1], op.args["keepdim"])
    return rewriter.call(aten.linalg_vector_norm.default, arguments, like=op.node)


def _cosine_similarity(op: Op, rewriter: Rewriter) -> fx.Node | None:
    first, second = op.args["x1"], op.args["x2"]
    if op.info_of(first).rank != op.info_of(second).rank:
        return None
    axis, eps = op.axis(op.args["dim"], first), op.args["eps"]

    def unit(node: fx.Node, step: str) -> fx.Node:
        x = rewriter.value(node)
        norm = rewriter.call(
            aten.linalg_vector_norm.default, (x, 2, [axis], True), like=op.node, step=f"{step}_norm"
        )
        safe = rewriter.call(aten.clamp_min.default, (norm, eps), like=op.node, step=f"{step}_safe")
        return rewriter.call(aten.div.Tensor, (x, safe), like=op.node, step=step)

    product = rewriter.call(
        aten.mul.Tensor, (unit(first, "first"), unit(second, "second")), like=op.node, step="product"
    )
    return rewriter.call(aten.sum.dim_IntList, (product, [axis]), like=op.node)


def _moments(target: Any) -> Piece:
    """The variance (or deviation) and the mean of a call that gives both."""

    def piece(op: Op, source: Op, rewriter: Rewriter) -> fx.Node | None:
        x, dim = rewriter.value(source.args["self"]), source.args.get("dim")
        keepdim = source.args.get("keepdim", False)
        if op.node.args[1] == 1:
            axes = list(range(source.info_of(source.operands[0]).rank)) if dim is None else dim
            return rewriter.call(aten.mean.dim, (x, axes, keepdim), like=op.node)
        unbiased = int(source.args.get("unbiased", True))
        correction = source.args.get("correction", unbiased)
        kwargs = {"correction": correction, "keepdim": keepdim}
        return rewriter.call(target, (x, dim), kwargs, like=op.node)

    return piece


def _both_extrema(op: Op, source: Op, rewriter: Rewriter) -> fx.Node:
    x, dim = rewriter.value(source.operands[0]), source.args["dim"]
    axes = list(range(source.info_of(source.operands[0]).rank)) if dim is None else [dim]
    target = (aten.amin.default, aten.amax.default)[op.node.args[1]]  # type: ignore[index]
    return rewriter.call(target, (x, axes, source.args["keepdim"]), like=op.node)


def _bilinear(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """Entry (i, j) of the products meets column (i, j) of each matrix."""
    weight = op.constant("weight")
    if weight is None or not {op.args["input1"], op.args["input2"]} <= op.program.infos.keys():
        return None
    x, y = (
        rewriter.call(aten.unsqueeze.default, (rewriter.value(op.args[name]), axis), like=op.node, step=name)
        for name, axis in (("input1", -1), ("input2", -2))
    )
    products = rewriter.call(aten.mul.Tensor, (x, y), like=op.node, step="products")
    flat = rewriter.call(aten.flatten.using_ints, (products, -2, -1), like=op.node, step="flat")
    held = op.args["weight"]
    matrix = rewriter.constant(weight.flatten(1), str(held.target), rewriter.dtype_of(held))
    bias = None if op.args["bias"] is None else rewriter.value(op.args["bias"])
    return rewriter.call(aten.linear.default, (flat, matrix, bias), like=op.node)


FORMULAS: dict[Any, Formula] = {
    aten.bilinear.default: _bilinear,
    aten.glu.default: _glu,
    aten.rrelu.default: _rrelu,
    aten.addcmul.default: _add_combination(aten.mul.Tensor),
    aten.addcdiv.default: _add_combination(aten.div.Tensor),
    aten.pairwise_distance.default: _pairwise_distance,
    aten.cosine_similarity.default: _cosine_similarity,
}
PARTS: dict[Any, Piece] = {
    **dict.fromkeys(
        (aten.var_mean.default, aten.var_mean.dim, aten.var_mean.correction), _moments(aten.var.correction)
    ),
    **dict.fromkeys(
        (aten.std_mean.default, aten.std_mean.dim, aten.std_mean.correction), _moments(aten.std.correction)
    ),
    aten.aminmax.default: _both_extrema,
}
