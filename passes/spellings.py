"""Several spellings of pooling, extrema and padding, each as one operator with one output.

- max_pool*_with_indices becomes max_pool*; max and min, of an axis or of everything, and both results of aminmax
  become amax and amin;
- adaptive_max_pool* becomes amax where one position is left, max_pool* where sizes are static: of positions read
  repeatedly where they do not divide, since windows overlap and differ in size there;
- a pool in ceil mode that has no window more than without becomes one without (onnxruntime counts windows that torch
  leaves out, those that begin behind everything);
- an average pool with a divisor of its own becomes a plain one times a number (ONNX has no such attribute);
- a concatenation loses operands without entries;
- an instance norm between two views, as ONNX files have a group norm, becomes a group norm;
- pad becomes constant_pad_nd, reflection_pad* or replication_pad*, and nothing where it adds nothing;
- the operators of `a & b`, `a | b` and `a ^ b` become bitwise_and, bitwise_or and bitwise_xor;
- real and imaginary parts of a conjugate are those of one that is computed: torch captures those of what it holds as a
  conjugate already (ihfft), which a constant in its place is not.

Another call whose other outputs are used stays as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from passes.ir.program import Op
from passes.ir.rewriter import Rewriter
from passes.rules.view import RESHAPES

aten = torch.ops.aten

Piece = Callable[[Op, Op, Rewriter], fx.Node | None]
Spelling = Callable[[Op, Rewriter], fx.Node | None]


def _is_alone(source: fx.Node) -> bool:
    """Whether nothing but the first output is used."""
    return all(user.target is operator.getitem and user.args[1] == 0 for user in source.users)


def _plain_pool(target: Any) -> Piece:
    def piece(op: Op, source: Op, rewriter: Rewriter) -> fx.Node | None:
        if not _is_alone(source.node):
            return None
        return rewriter.call(target, rewriter.map(tuple(source.args.values())), like=op.node)

    return piece


def _extremum(target: Any) -> Piece:
    def piece(op: Op, source: Op, rewriter: Rewriter) -> fx.Node | None:
        if not _is_alone(source.node):
            return None
        x, axis, keepdim = (source.args[name] for name in ("self", "dim", "keepdim"))
        return rewriter.call(target, (rewriter.value(x), [axis], keepdim), like=op.node)

    return piece


def _one_extremum(op: Op, source: Op, rewriter: Rewriter) -> fx.Node | None:
    x, axis, keepdim = (source.args[name] for name in ("self", "dim", "keepdim"))
    target = (aten.amin.default, aten.amax.default)[op.node.args[1]]  # type: ignore[index]
    return rewriter.call(target, (rewriter.value(x), [] if axis is None else [axis], keepdim), like=op.node)


def _adaptive(target: Any, spatial_rank: int) -> Piece:
    def piece(op: Op, source: Op, rewriter: Rewriter) -> fx.Node | None:
        x, wanted = source.args["self"], source.args["output_size"]
        wanted = [wanted] if isinstance(wanted, int) else list(wanted)
        if not _is_alone(source.node) or x not in op.program.infos:
            return None
        info = source.info_of(x)
        axes = list(range(info.rank - spatial_rank, info.rank))
        if all(size == 1 for size in wanted):
            return rewriter.call(aten.amax.default, (rewriter.value(x), axes, True), like=op.node)
        if not all(isinstance(size, int) for size in wanted) or not all(
            info.is_static(axis) for axis in axes
        ):
            return None
        value, window = rewriter.value(x), []
        for axis, count in zip(axes, wanted, strict=True):
            places = _adaptive_windows(info.sizes[axis], count)
            window.append(places.shape[1])
            if not torch.equal(places.flatten(), torch.arange(info.sizes[axis])):
                index = rewriter.constant(places.flatten(), f"{op.node.name}_windows", torch.int64)
                args, step = (value, axis, index), f"windows{axis}"
                value = rewriter.call(aten.index_select.default, args, like=op.node, step=step)
        return rewriter.call(target, (value, window, window), like=op.node)

    return piece


def _adaptive_windows(size: int, count: int) -> torch.Tensor:
    """The positions of each window, int64 (count, longest window); shorter ones repeat their last."""
    numbers = torch.arange(count)
    first, end = numbers * size // count, ((numbers + 1) * size + count - 1) // count
    places = first[:, None] + torch.arange(int((end - first).max()))
    return places.minimum(end[:, None] - 1)


def _whole_extremum(target: Any) -> Spelling:
    def handler(op: Op, rewriter: Rewriter) -> fx.Node | None:
        if not op.operands:
            return None
        axes = list(range(op.info_of(op.operands[0]).rank))
        return rewriter.call(target, (rewriter.value(op.operands[0]), axes), like=op.node)

    return handler


def _renamed(target: Any) -> Spelling:
    def handler(op: Op, rewriter: Rewriter) -> fx.Node:
        return rewriter.call(target, rewriter.map(op.node.args), like=op.node)

    return handler


def _constant_pad(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """Drop a pad that adds nothing."""
    nothing = bool(op.operands) and all(pad == 0 for pad in op.args["pad"])
    return rewriter.value(op.operands[0]) if nothing else None


def _parts_of_conjugate(op: Op, rewriter: Rewriter) -> fx.Node | None:
    x = op.args["self"]
    if not isinstance(x, fx.Node) or x.target is not aten._conj.default:
        return None
    resolved = rewriter.call(aten.resolve_conj.default, (rewriter.value(x),), like=op.node, step="resolved")
    return rewriter.call(op.target, (resolved,), like=op.node)


OWN_ENTRIES = {
    "reflect": (aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d),
    "replicate": (aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d),
}


def _pad(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """Choose the operator of the mode; circular padding has none of its own."""
    source, pads, mode = (op.args[name] for name in ("self", "pad", "mode"))
    args = (rewriter.value(source), rewriter.map(pads))
    if mode == "constant":
        value = 0.0 if op.args["value"] is None else op.args["value"]
        call = aten.constant_pad_nd.default
        return _constant_pad(op, rewriter) or rewriter.call(call, (*args, value), like=op.node)
    packets = OWN_ENTRIES.get(mode)
    return None if packets is None else rewriter.call(packets[len(pads) // 2 - 1].default, args, like=op.node)


def _concatenation(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """Leave out what has no entries, if anything else is left."""
    parts = list(op.args["tensors"])
    if op.info is None or any(part not in op.program.infos for part in parts):
        return None
    kept = [part for part in parts if not op.info_of(part).is_empty]
    if not kept or len(kept) == len(parts) or any(op.info_of(part).rank != op.info.rank for part in kept):
        return None
    if len(kept) == 1:
        return rewriter.value(kept[0])
    return rewriter.call(op.target, (rewriter.map(kept), op.args["dim"]), like=op.node)


def _pool_with_divisor(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """An average with a divisor of its own: the plain one, padding counted, times window / divisor.

    Not with `ceil_mode`: there the plain average divides by the part of the window inside the padding.
    """
    divisor = op.args["divisor_override"]
    if divisor is None or op.args["ceil_mode"]:
        return None
    rank = {aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}[op.target]
    window = list(op.args["kernel_size"])
    area = math.prod(window) ** (rank if len(window) == 1 else 1)
    args = [rewriter.map(op.args[name]) for name in ("self", "kernel_size", "stride", "padding")]
    mean = rewriter.call(op.target, (*args, False, True), like=op.node, step="mean")
    return rewriter.call(aten.mul.Tensor, (mean, area / divisor), like=op.node)


def _pool_without_ceil(spatial_rank: int, then: Spelling | None = None) -> Spelling:
    def handler(op: Op, rewriter: Rewriter) -> fx.Node | None:
        if not op.args["ceil_mode"]:
            return None if then is None else then(op, rewriter)
        if not op.operands or not _has_no_window_more(op, spatial_rank):
            return None
        args = {**op.args, "ceil_mode": False}
        return rewriter.call(op.target, rewriter.map(tuple(args.values())), like=op.node)

    return handler


def _has_no_window_more(op: Op, spatial_rank: int) -> bool:
    """Whether rounding down gives as many windows, along static axes alone."""
    info = op.info_of(op.operands[0])
    kernel, padding = (_per_axis(op.args[name], spatial_rank) for name in ("kernel_size", "padding"))
    stride = _per_axis(op.args["stride"] or op.args["kernel_size"], spatial_rank)
    dilation = _per_axis(op.args.get("dilation", 1), spatial_rank)
    for number in range(spatial_rank):
        axis = info.rank - spatial_rank + number
        reach = dilation[number] * (kernel[number] - 1)
        windows = (info.sizes[axis] + 2 * padding[number] - reach - 1) // stride[number] + 1
        if not info.is_static(axis) or windows != op.out.sizes[axis]:
            return False
    return True


def _per_axis(value: int | list[int], count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _type_as(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """The cast to a dtype: torch's own decomposition names a device as well, which not every run has."""
    x, other = op.args["self"], op.args["other"]
    if not all(isinstance(node, fx.Node) and node in op.program.infos for node in (x, other)):
        return None
    dtype = {"dtype": op.info_of(other).dtype}
    return rewriter.call(aten._to_copy.default, (rewriter.value(x),), dtype, like=op.node)


def group_norm(op: Op, rewriter: Rewriter) -> fx.Node | None:
    """A view of an instance norm of a view, back in the first one's shape, where neighbouring channels make a group.

    With x of shape (N, C, ...): reshape(instance_norm(reshape(x, (N, G, -1))), x.shape) = group_norm(x, G).
    """
    norm = _made_by(op, op.operands[0], (aten.instance_norm.default,))
    view = None if norm is None else _made_by(norm, norm.args["input"], RESHAPES)
    if norm is None or view is None or not norm.args["use_input_stats"] or not view.operands:
        return None
    x, flat = view.info_of(view.operands[0]), view.out
    if x.rank < 2 or not op.out.has_shape_of(x) or x.key(0) != flat.key(0):
        return None
    if not (x.is_static(1) and flat.is_static(1)) or flat.is_empty or x.sizes[1] % flat.sizes[1]:
        return None
    given = [norm.args[name] for name in ("weight", "bias")]
    affine = [_per_channel(norm, rewriter, node, x.sizes[1]) for node in given]
    if [node is None for node in given] != [node is None for node in affine]:
        return None
    args = (rewriter.value(view.operands[0]), flat.sizes[1], *affine, norm.args["eps"])
    return rewriter.call(aten.group_norm.default, args, like=op.node)


def _made_by(op: Op, source: Any, targets: tuple[Any, ...]) -> Op | None:
    known = isinstance(source, fx.Node) and source.target in targets and source in op.program.infos
    return op.program.op(source) if known else None


def _per_channel(norm: Op, rewriter: Rewriter, node: Any, channels: int) -> fx.Node | None:
    """Return a constant with one entry for each group as one with an entry for each channel."""
    value = norm.program.constant(node) if isinstance(node, fx.Node) else None
    if value is None:
        return None
    repeated = value.repeat_interleave(channels // len(value))
    return rewriter.constant(repeated, str(node.target), rewriter.dtype_of(node))


FIRST_OUTPUTS: dict[Any, Piece] = {
    aten.max_pool1d_with_indices.default: _plain_pool(aten.max_pool1d.default),
    aten.max_pool2d_with_indices.default: _plain_pool(aten.max_pool2d.default),
    aten.max_pool3d_with_indices.default: _plain_pool(aten.max_pool3d.default),
    aten.adaptive_max_pool1d.default: _adaptive(aten.max_pool1d.default, 1),
    aten.adaptive_max_pool2d.default: _adaptive(aten.max_pool2d.default, 2),
    aten.adaptive_max_pool3d.default: _adaptive(aten.max_pool3d.default, 3),
    aten.max.dim: _extremum(aten.amax.default),
    aten.min.dim: _extremum(aten.amin.default),
    aten.aminmax.default: _one_extremum,
}
SPELLINGS: dict[Any, Spelling] = {
    aten.cat.default: _concatenation,
    aten.max.default: _whole_extremum(aten.amax.default),
    aten.min.default: _whole_extremum(aten.amin.default),
    aten.max_pool1d.default: _pool_without_ceil(1),
    aten.max_pool2d.default: _pool_without_ceil(2),
    aten.max_pool3d.default: _pool_without_ceil(3),
    aten.avg_pool1d.default: _pool_without_ceil(1),
    aten.avg_pool2d.default: _pool_without_ceil(2, _pool_with_divisor),
    aten.avg_pool3d.default: _pool_without_ceil(3, _pool_with_divisor),
    aten.__and__.Tensor: _renamed(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: _renamed(aten.bitwise_or.Tensor),
    aten.__xor__.Tensor: _renamed(aten.bitwise_xor.Tensor),
    aten.type_as.default: _type_as,
    aten.view_as_real.default: _parts_of_conjugate,
    aten.diagonal_copy.default: _renamed(aten.diagonal.default),
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _constant_pad,
}
