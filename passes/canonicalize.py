"""canonicalize: one ATen dialect, so that every later pass meets each operation in one form.

- constant subgraphs (deterministic, from constants alone) are evaluated once: a noise layer becomes one vector;
- copies, no-op casts and assertions go; sizes are taken from the network's inputs;
- every product becomes linear or matmul (passes/spell_products.py); every convolution becomes conv1d, conv2d or
  conv3d, or conv_transpose1d, 2d or 3d;
- batch norm in eval mode, and instance norm with running statistics, becomes y = x * scale + shift with
  scale = gamma / sqrt(var + eps) and shift = beta - mean * scale;
- pooling, extrema and padding have one spelling each (passes/spellings.py), and what can be written as other
  operators is (passes/formulas.py);
- recurrent networks get one call for each level (passes/unstack.py);
- split, chunk and unbind become slices; every view becomes a reshape, which needs no copy in front of it;
- a piece of a view becomes a view of a piece (passes/spell_pieces.py);
- x + 0, x * 1 and the like go; what is expanded for one operation alone is broadcast by it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from passes.formulas import FORMULAS, PARTS
from passes.ir import schema
from passes.ir.analysis import LARGEST_CONSTANT, size_source
from passes.ir.constants import Held, hold
from passes.ir.pipeline import Result
from passes.ir.program import Op, Program
from passes.ir.rewriter import Rewriter
from passes.placements import PLACEMENTS, SIZED_BY_CONSTANTS
from passes.rules.pointwise import CASTS, COPIES
from passes.rules.view import SQUEEZES
from passes.spell_pieces import piece, select, squeeze
from passes.spell_products import PRODUCTS
from passes.spellings import FIRST_OUTPUTS, SPELLINGS, group_norm
from passes.unstack import RECURRENT, last_states, unstack

aten = torch.ops.aten

Handler = Callable[[Op, Rewriter], "fx.Node | int | None"]


@dataclass(frozen=True)
class Canonicalize:
    """The pass; it has no options."""

    name: str = "canonicalize"

    def __call__(self, program: Program) -> Result:
        folded = fold_constants(program)
        result = rewrite_calls(folded)
        return Result(program, False) if _same_calls(program, result) else Result(result, True)


def _same_calls(first: Program, second: Program) -> bool:
    return [(node.op, node.target) for node in first.nodes] == [
        (node.op, node.target) for node in second.nodes
    ]


def fold_constants(program: Program) -> Program:
    """Replace every deterministic call on constants alone by its value."""
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        held = program.held(node)
        if held is not None:
            values[node] = held
        elif node.op == "call_function" and _is_foldable(node, values):
            value = _evaluate(node, values)
            if not isinstance(value, Tensor):
                values[node] = value
            elif value.numel() <= LARGEST_CONSTANT:
                values[node] = hold(value, node.meta.get("dtype", value.dtype))
    rewriter = Rewriter(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node.op == "call_function" and isinstance(values.get(node), Held):
            dtype = node.meta.get("dtype", values[node].dtype)
            name = node.meta.get("constant_name", node.name)
            rewriter.env[node] = rewriter.shared(values[node], name, dtype)
        elif node.op == "call_function" and isinstance(values.get(node), (bool, int, float)):
            rewriter.env[node] = values[node]
        elif node.op == "call_function" and node not in values:
            rewriter.env[node] = rewriter.copy(node)
    rewriter.output()
    return rewriter.finish()


def _is_foldable(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    return schema.is_deterministic(node.target) and all(operand in values for operand in node.all_input_nodes)


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def value_of(operand: fx.Node) -> Any:
        value = values[operand]
        return value.read() if isinstance(value, Held) else value

    with torch.no_grad():
        return schema.call(node, value_of)


def rewrite_calls(program: Program) -> Program:
    """Apply the table of handlers to every call whose sizes are known, and copy the others."""
    rewriter = Rewriter(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node.op == "call_function" and node.target not in DROPPED:
            measured = node not in program.unmeasured or node.target in SIZED_BY_CONSTANTS
            handler = HANDLERS.get(node.target) if measured else None
            result = handler(program.op(node), rewriter) if handler else None
            rewriter.env[node] = rewriter.copy(node) if result is None else result  # type: ignore[assignment]
    rewriter.output()
    return rewriter.finish()


DROPPED = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)


def _forward_operand(op: Op, rewriter: Rewriter) -> fx.Node:
    return rewriter.value(op.operands[0])


def _on_contiguous(op: Op, rewriter: Rewriter) -> fx.Node:
    """The call on a contiguous copy, for it reads memory as it lies; copies elsewhere are dropped."""
    contiguous = {"memory_format": torch.contiguous_format}
    copied = rewriter.call(
        aten.clone.default, (rewriter.value(op.operands[0]),), contiguous, like=op.node, step="contiguous"
    )
    return rewriter.call(op.target, (copied, *rewriter.map(op.node.args[1:])), like=op.node)


def _cast(op: Op, rewriter: Rewriter) -> fx.Node | None:
    source = op.operands[0]
    return (
        rewriter.value(source) if op.info is not None and op.info_of(source).dtype == op.info.dtype else None
    )


def _size(op: Op, rewriter: Rewriter) -> fx.Node | int | None:
    source, axis = op.node.args[0], op.args["dim"]
    info = op.program.infos.get(source)  # type: ignore[arg-type]
    if info is None:
        return None
    axis = int(axis) % info.rank
    if info.is_static(axis):
        return info.sizes[axis]
    found = size_source(op.program, info, axis)
    return rewriter.size_node(found, op.node) if found is not None else None


def _batch_norm(op: Op, rewriter: Rewriter) -> fx.Node | None:
    mean, var = op.constant("running_mean"), op.constant("running_var")
    gamma, beta = op.constant("weight"), op.constant("bias")
    source = op.args["input"]
    if (
        mean is None
        or var is None
        or (op.args["weight"] is not None and gamma is None)
        or (op.args["bias"] is not None and beta is None)
        or source not in op.program.infos
    ):
        return None
    scale = torch.rsqrt(var + op.args["eps"])
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale if beta is None else beta - mean * scale
    rank = op.info_of(source).rank
    held = op.args["weight"] if gamma is not None else op.args["running_mean"]
    dtype, base = rewriter.dtype_of(held), str(held.target).rsplit(".", 1)[0]
    shape = (-1, *([1] * (rank - 2)))
    scaled = rewriter.call(
        aten.mul.Tensor,
        (rewriter.value(source), rewriter.constant(scale.reshape(shape), f"{base}.scale", dtype)),
        like=op.node,
        step="scale",
    )
    return rewriter.call(
        aten.add.Tensor,
        (scaled, rewriter.constant(shift.reshape(shape), f"{base}.shift", dtype)),
        like=op.node,
    )


def _getitem(op: Op, rewriter: Rewriter) -> fx.Node | None:
    source, position = op.node.args
    assert isinstance(source, fx.Node)
    if source.target in BATCH_NORMS and position == 0 and source in rewriter.env:
        new = rewriter.env[source]
        if new.target is not aten.add.Tensor:
            return None
        new.meta = dict(op.node.meta)
        return new
    piece = PIECES.get(source.target)
    return None if piece is None else piece(op, op.program.op(source), rewriter)


def _split_piece(op: Op, split: Op, rewriter: Rewriter) -> fx.Node | None:
    source, axis = split.operands[0], split.args["dim"]
    info = split.info_of(source)
    axis %= info.rank
    if not info.is_static(axis):
        return None
    sizes = split.arg("split_sizes", "split_size", "chunks")
    position: int = op.node.args[1]  # type: ignore[assignment]
    if isinstance(sizes, (list, tuple)):
        if not all(isinstance(size, int) for size in sizes):
            return None
        start, stop = sum(sizes[:position]), sum(sizes[: position + 1])
    elif not isinstance(sizes, int):
        return None
    else:
        start, stop = sizes * position, min(sizes * (position + 1), info.sizes[axis])
    return rewriter.call(aten.slice.Tensor, (rewriter.value(source), axis, start, stop), like=op.node)


def _unbind_piece(op: Op, unbind: Op, rewriter: Rewriter) -> fx.Node:
    source, axis, index = unbind.operands[0], unbind.args["dim"], op.node.args[1]
    assert isinstance(index, int)
    return piece(op, rewriter, source, axis, index) or rewriter.call(
        aten.select.int, (rewriter.value(source), axis, index), like=op.node
    )


PIECES: dict[Any, Callable[[Op, Op, Rewriter], fx.Node | None]] = {
    **FIRST_OUTPUTS,
    **PARTS,
    aten.split.Tensor: _split_piece,
    aten.split_with_sizes.default: _split_piece,
    aten.unbind.int: _unbind_piece,
    **dict.fromkeys(RECURRENT, last_states),
}


CONVOLUTION_OF_RANK = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
TRANSPOSED_OF_RANK = {
    1: aten.conv_transpose1d.default,
    2: aten.conv_transpose2d.input,
    3: aten.conv_transpose3d.input,
}


def _convolution(op: Op, rewriter: Rewriter) -> fx.Node | None:
    weight = op.constant("weight")
    if weight is None:
        return None
    names, targets = ["input", "weight", "bias", "stride", "padding"], CONVOLUTION_OF_RANK
    if op.args["transposed"]:
        names, targets = [*names, "output_padding", "groups", "dilation"], TRANSPOSED_OF_RANK
    else:
        names += ["dilation", "groups"]
    args = [rewriter.map(op.args[name]) for name in names]
    return rewriter.call(targets[weight.ndim - 2], args, like=op.node)


def _convolution_padding(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """padding="same" or "valid" as numbers; unequal sides become a pad in front."""
    weight = op.constant("weight")
    if weight is None:
        return None
    rank = weight.ndim - 2
    dilation = list(op.args["dilation"])
    dilation = dilation * rank if len(dilation) == 1 else dilation
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    total = total if op.args["padding"] == "same" else [0] * rank
    x = rewriter.map(op.args["input"])
    if any(amount % 2 for amount in total):
        pads = [side for amount in reversed(total) for side in (0, amount % 2)]
        x = rewriter.call(aten.constant_pad_nd.default, (x, pads, 0.0), like=op.node, step="pad")
    rest = [rewriter.map(op.args[name]) for name in ("weight", "bias", "stride")]
    padding = [amount // 2 for amount in total]
    target = CONVOLUTION_OF_RANK[rank]
    return rewriter.call(target, (x, *rest, padding, dilation, op.args["groups"]), like=op.node)


def _arithmetic(neutral: float, commutes: bool) -> Handler:
    """Give x for x op neutral where shape and dtype stay; a constant expanded for this call alone is not expanded."""

    def handler(op: Op, rewriter: Rewriter) -> fx.Node | None:
        first, second = op.node.args[:2]
        for x, other in ((first, second), (second, first)):
            if not isinstance(x, fx.Node) or not _has_shape_of_result(op, x):
                continue
            constant = _unexpanded(op, other)
            value = other if constant is None else op.program.constant(constant)
            if not isinstance(value, (int, float, Tensor)):
                continue
            may_go = (commutes or x is first) and op.args.get("alpha", 1) == 1
            if may_go and bool(torch.all(torch.as_tensor(value) == neutral)):
                return rewriter.value(x)
            if constant is not None and constant is not other:
                args = [rewriter.map(constant if entry is other else entry) for entry in (first, second)]
                return rewriter.call(op.target, args, rewriter.map(dict(op.node.kwargs)), like=op.node)
        return _broadcasting(op, rewriter)

    return handler


def _broadcasting(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """The call on what an operand expands, where the other operand has the result's shape."""
    first, second = op.node.args[:2]
    for expanded, other in ((second, first), (first, second)):
        if (
            isinstance(expanded, fx.Node)
            and isinstance(other, fx.Node)
            and expanded.target is aten.expand.default
            and isinstance(expanded.args[0], fx.Node)
            and _has_shape_of_result(op, other)
            and op.info_of(expanded.args[0]).rank == op.out.rank
        ):
            args = [
                rewriter.map(expanded.args[0] if entry is expanded else entry) for entry in (first, second)
            ]
            return rewriter.call(op.target, args, rewriter.map(dict(op.node.kwargs)), like=op.node)
    return None


def _has_shape_of_result(op: Op, x: fx.Node) -> bool:
    info = op.program.infos.get(x)
    return info is not None and op.info is not None and info == op.info


def _unexpanded(op: Op, value: object) -> fx.Node | None:
    """The constant behind an operand: the operand itself, or what it expands at the same rank."""
    if not isinstance(value, fx.Node):
        return None
    if value.target is aten.expand.default and isinstance(value.args[0], fx.Node):
        inner = op.program.constant(value.args[0])
        if inner is not None and inner.ndim == op.out.rank:
            return value.args[0]
    return value if op.program.held(value) is not None else None


def _view(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """A reshape, which also serves an operand whose strides changed; nothing where the shape stays.

    Static sizes are literals; if there are dynamic ones, one of them is written -1.
    """
    source = op.operands[0] if op.operands else None
    if op.info is None or source is None:
        return None
    if op.info.has_shape_of(op.info_of(source)):
        return rewriter.value(source)
    norm = group_norm(op, rewriter)
    if norm is not None:
        return norm
    entries = enumerate(rewriter.map(op.arg("size", "shape")))
    sizes = [op.out.sizes[axis] if op.out.is_static(axis) else entry for axis, entry in entries]
    distances = {
        axis: _distance_to_input(size) for axis, size in enumerate(sizes) if isinstance(size, fx.Node)
    }
    if distances and -1 not in sizes:
        sizes[max(distances, key=distances.__getitem__)] = -1
    return rewriter.call(aten.reshape.default, (rewriter.value(source), sizes), like=op.node)


def _distance_to_input(size: fx.Node) -> int:
    """How a run-time size is computed: 0 from an input directly, 1 from other values."""
    return int(any(operand.op != "placeholder" for operand in size.all_input_nodes))


BATCH_NORMS = frozenset(
    {
        aten._native_batch_norm_legit_no_training.default,
        aten.native_batch_norm.default,
        aten.batch_norm.default,
    }
)


def _plain_batch_norm(op: Op, rewriter: Rewriter) -> fx.Node | None:
    return None if op.args["training"] else _batch_norm(op, rewriter)


def _instance_norm(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """An instance norm with statistics of its own is a batch norm."""
    return None if op.args["use_input_stats"] else _batch_norm(op, rewriter)


READS_MEMORY = (aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default)

HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(COPIES, _forward_operand),
    **dict.fromkeys(READS_MEMORY, _on_contiguous),
    **dict.fromkeys(CASTS, _cast),
    aten.sym_size.int: _size,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.batch_norm.default: _plain_batch_norm,
    aten.instance_norm.default: _instance_norm,
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), _view),
    operator.getitem: _getitem,
    **dict.fromkeys(RECURRENT, unstack),
    **SPELLINGS,
    **PRODUCTS,
    aten.select.int: select,
    **dict.fromkeys(SQUEEZES, squeeze),
    **PLACEMENTS,
    **FORMULAS,
    aten.convolution.default: _convolution,
    aten.conv1d.padding: _convolution_padding,
    aten.conv2d.padding: _convolution_padding,
    aten.conv3d.padding: _convolution_padding,
    aten.add.Tensor: _arithmetic(0.0, commutes=True),
    aten.sub.Tensor: _arithmetic(0.0, commutes=False),
    aten.mul.Tensor: _arithmetic(1.0, commutes=True),
    aten.div.Tensor: _arithmetic(1.0, commutes=False),
}
