"""How a call reads in Python: operators, torch.nn.functional, methods; anything else as torch.ops spells it, exactly.

Each spelling calls the very operator that it stands for, with every argument that is not the default. The file that
they end up in is run and compared with the original, so that a mistake here is a refusal and not a wrong network.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from passes.ir import schema
from sbp_compile.emit.source_text import ATOM, LOOSE, PRODUCT, SUM, Text, call_text, literal

aten = torch.ops.aten
Render = Callable[[fx.Node], Text]
Spelling = Callable[["Call"], Text | None]


class Call:
    """A call to spell: its bound arguments, as values and as text."""

    def __init__(self, node: fx.Node, render: Render) -> None:
        self.node = node
        self._render = render
        self.bound: Mapping[str, Any] = schema.bind(node) if schema.is_overload(node.target) else {}

    def text(self, name: str) -> str:
        """Return an argument's text."""
        return self.value(self.bound[name])

    def operand(self, name: str, level: int = ATOM) -> str:
        """Return an argument's text, in parentheses if it is looser than `level` (in front of a dot: an atom)."""
        value = self.bound[name]
        if isinstance(value, fx.Node):
            return self._render(value).at(level)
        text = literal(value)
        return f"({text})" if text.startswith("-") else text

    def value(self, value: Any) -> str:
        """Return the text of any value; `TypeError` where it cannot be written down."""
        if isinstance(value, fx.Node):
            return self._render(value).text
        if isinstance(value, list):
            return f"[{', '.join(self.value(item) for item in value)}]"
        if isinstance(value, tuple):
            return f"({', '.join(self.value(item) for item in value)}{',' if len(value) == 1 else ''})"
        if isinstance(value, slice):
            return f"slice({self.value(value.start)}, {self.value(value.stop)}, {self.value(value.step)})"
        return literal(value)

    def items(self, name: str) -> str:
        """Return a list's items as separate arguments."""
        return ", ".join(self.value(item) for item in self.bound[name])

    def size(self, name: str) -> str:
        """Return a list of equal numbers as one number, another list as a tuple."""
        value = self.bound[name]
        if isinstance(value, (list, tuple)) and value and all(item == value[0] for item in value):
            return self.value(value[0])
        return self.value(tuple(value))

    def given(self, **defaults: Any) -> dict[str, str]:
        """Return the arguments that differ from these defaults, as keyword text."""
        return {name: self.text(name) for name, default in defaults.items() if self.bound[name] != default}


def spelled(node: fx.Node, render: Render) -> Text:
    """Return the text of a call; `render`: the text of another node's value. `TypeError` where there is none."""
    call = Call(node, render)
    spelling = SPELLINGS.get(node.target)
    found = None if spelling is None else spelling(call)
    return found or _exactly(call)


def _exactly(call: Call) -> Text:
    target = call.node.target
    arguments = [call.value(value) for value in call.node.args]
    keywords = {name: call.value(value) for name, value in call.node.kwargs.items()}
    if schema.is_overload(target):
        return call_text(f"torch.ops.{target}", *arguments, **keywords)
    name = getattr(target, "__name__", "")
    if name in _SIGNS and getattr(operator, name) is target:
        return Text(f"({arguments[0]}) {_SIGNS[name]} ({arguments[1]})", LOOSE)
    raise TypeError(f"function {target!r}")


_SIGNS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}


def _infix(sign: str, level: int, first: str = "self", second: str = "other") -> Spelling:
    """Return a spelling with an operator between two operands; `level`: how tightly it binds, from the left."""

    def spell(call: Call) -> Text | None:
        if call.bound.get("alpha", 1) != 1:
            return None
        left = call.operand(first, ATOM if level == LOOSE else level)
        return Text(f"{left} {sign} {call.operand(second, min(level + 1, ATOM) if level else ATOM)}", level)

    return spell


def _prefix(sign: str) -> Spelling:
    return lambda call: Text(f"{sign}{call.operand('self')}", LOOSE)


def _function(
    name: str, *, given: Mapping[str, Any] | None = None, only: Mapping[str, Any] | None = None
) -> Spelling:
    """Return a spelling as a function of the first argument, keywords where they differ from `given`.

    Where an argument differs from `only`, there is none.
    """

    def spell(call: Call) -> Text | None:
        if any(call.bound[key] != value for key, value in (only or {}).items()):
            return None
        first = next(iter(call.bound))
        return call_text(name, call.text(first), **call.given(**(given or {})))

    return spell


def _method(name: str, *listed: str, given: Mapping[str, Any] | None = None) -> Spelling:
    """Return a spelling as a method, with these arguments by position (lists spread out)."""

    def spell(call: Call) -> Text:
        arguments = [
            call.items(key) if isinstance(call.bound[key], (list, tuple)) else call.text(key)
            for key in listed
        ]
        return call_text(f"{call.operand('self')}.{name}", *arguments, **call.given(**(given or {})))

    return spell


def _reduction(name: str, *, only: Mapping[str, Any] | None = None) -> Spelling:
    def spell(call: Call) -> Text | None:
        if any(call.bound[key] != value for key, value in (only or {}).items()):
            return None
        axes = call.bound["dim"]
        given = (
            {} if axes is None else {"dim": call.size("dim") if len(axes) == 1 else call.value(tuple(axes))}
        )
        if call.bound["keepdim"]:
            given["keepdim"] = "True"
        return call_text(f"{call.operand('self')}.{name}", **given)

    return spell


def _joined(name: str) -> Spelling:
    return lambda call: call_text(f"torch.{name}", call.text("tensors"), **call.given(dim=0))


def _slice(call: Call) -> Text:
    axis, start, end, step = (call.bound[name] for name in ("dim", "start", "end", "step"))
    first = "" if start in (None, 0) else call.value(start)
    last = "" if end is None or (isinstance(end, int) and end >= 2**62) else call.value(end)
    return _subscript(call, axis, f"{first}:{last}" + ("" if step == 1 else f":{call.value(step)}"))


def _subscript(call: Call, axis: int, text: str) -> Text:
    before = [":"] * axis if axis >= 0 else ["..."]
    after = [] if axis >= 0 else [":"] * (-axis - 1)
    return Text(f"{call.operand('self')}[{', '.join([*before, text, *after])}]")


def _pool(name: str) -> Spelling:
    defaults = {
        "padding": 0,
        "dilation": 1,
        "ceil_mode": False,
        "count_include_pad": True,
        "divisor_override": None,
    }

    def spell(call: Call) -> Text:
        arguments = [call.text("self"), call.size("kernel_size")]
        if call.bound["stride"] and list(call.bound["stride"]) != list(call.bound["kernel_size"]):
            arguments.append(call.size("stride"))
        given: dict[str, str] = {}
        for key, default in defaults.items():
            if key in call.bound:
                value = call.bound[key]
                text = call.size(key) if isinstance(value, (list, tuple)) else literal(value)
                given |= {} if text == literal(default) else {key: text}
        return call_text(f"F.{name}", *arguments, **given)

    return spell


def _adaptive_pool(name: str) -> Spelling:
    return lambda call: call_text(f"F.{name}", call.text("self"), call.size("output_size"))


def _positional(name: str) -> Spelling:
    """Return a spelling for a function that takes the operator's arguments in the operator's order."""
    return lambda call: call_text(name, *(call.value(value) for value in call.bound.values()))


def _padded(call: Call) -> Text:
    return call_text("F.pad", call.text("self"), call.value(tuple(call.bound["pad"])), **call.given(value=0))


def _mirrored(mode: str) -> Spelling:
    return lambda call: call_text(
        "F.pad", call.text("self"), call.value(tuple(call.bound["padding"])), mode=f'"{mode}"'
    )


def _resized(mode: str) -> Spelling:
    def spell(call: Call) -> Text:
        given = {}
        if call.bound["output_size"] is not None:
            given["size"] = call.value(tuple(call.bound["output_size"]))
        if call.bound["scale_factors"] is not None:
            given["scale_factor"] = call.value(tuple(call.bound["scale_factors"]))
        if call.bound.get("align_corners"):
            given["align_corners"] = "True"
        return call_text("F.interpolate", call.text("input"), **given, mode=f'"{mode}"')

    return spell


def _attention(call: Call) -> Text:
    first = [call.text(name) for name in ("query", "key", "value")]
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    return call_text("F.scaled_dot_product_attention", *first, **call.given(**defaults))


def _embedded(call: Call) -> Text | None:
    if call.bound["sparse"] or call.bound["scale_grad_by_freq"] or call.bound["padding_idx"] >= 0:
        return None
    return call_text("F.embedding", call.text("indices"), call.text("weight"))


def _cast(call: Call) -> Text | None:
    kept = {name: value for name, value in call.bound.items() if name not in {"self", "dtype"}}
    if any(value not in (None, False) for value in kept.values()):
        return None
    return call_text(f"{call.operand('self')}.to", call.text("dtype"))


def _scaled_tanh(call: Call) -> Text | None:
    bounds = float(call.bound["min_val"]), float(call.bound["max_val"])
    if bounds == (0.0, 6.0):
        return call_text("F.relu6", call.text("self"))
    return call_text("F.hardtanh", call.text("self"), *(literal(bound) for bound in bounds))


_UNARY = "sigmoid tanh exp log sqrt rsqrt sin cos abs reciprocal square erf floor ceil sign log1p expm1"
_FUNCTIONAL = "relu silu hardswish hardsigmoid mish"
_POOLS = [f"{kind}_pool{rank}d" for kind in ("max", "avg") for rank in (1, 2, 3)]
_ADAPTIVE_POOLS = [f"adaptive_avg_pool{rank}d" for rank in (1, 2, 3)]
_CONVOLUTIONS = [f"conv{rank}d" for rank in (1, 2, 3)]

SPELLINGS: dict[Any, Spelling] = {
    **{getattr(aten, name).default: _function(f"torch.{name}") for name in _UNARY.split()},
    **{getattr(aten, name).default: _function(f"F.{name}") for name in _FUNCTIONAL.split()},
    **{getattr(aten, name).default: _pool(name) for name in _POOLS},
    **{getattr(aten, name).default: _positional(f"F.{name}") for name in _CONVOLUTIONS},
    **{getattr(aten, name).default: _adaptive_pool(name) for name in _ADAPTIVE_POOLS},
    aten.linear.default: _positional("F.linear"),
    aten.prelu.default: _positional("F.prelu"),
    aten.embedding.default: _embedded,
    aten.add.Tensor: _infix("+", SUM),
    aten.sub.Tensor: _infix("-", SUM),
    aten.mul.Tensor: _infix("*", PRODUCT),
    aten.div.Tensor: _infix("/", PRODUCT),
    aten.matmul.default: _infix("@", PRODUCT),
    aten.eq.Tensor: _infix("==", LOOSE),
    aten.ne.Tensor: _infix("!=", LOOSE),
    aten.gt.Tensor: _infix(">", LOOSE),
    aten.ge.Tensor: _infix(">=", LOOSE),
    aten.lt.Tensor: _infix("<", LOOSE),
    aten.le.Tensor: _infix("<=", LOOSE),
    aten.eq.Scalar: _infix("==", LOOSE),
    aten.ne.Scalar: _infix("!=", LOOSE),
    aten.gt.Scalar: _infix(">", LOOSE),
    aten.ge.Scalar: _infix(">=", LOOSE),
    aten.lt.Scalar: _infix("<", LOOSE),
    aten.le.Scalar: _infix("<=", LOOSE),
    aten.rsub.Scalar: _infix("-", SUM, "other", "self"),
    aten.pow.Tensor_Scalar: _infix("**", LOOSE, "self", "exponent"),
    aten.neg.default: _prefix("-"),
    aten.bitwise_not.default: _prefix("~"),
    aten.gelu.default: _function("F.gelu", given={"approximate": "none"}),
    aten.leaky_relu.default: _function("F.leaky_relu", given={"negative_slope": 0.01}),
    aten.elu.default: _function("F.elu", given={"alpha": 1}, only={"scale": 1, "input_scale": 1}),
    aten.softplus.default: _function("F.softplus", given={"beta": 1, "threshold": 20}),
    aten.hardtanh.default: _scaled_tanh,
    aten.softmax.int: _function("F.softmax", given={"dim": None, "dtype": None}),
    aten.log_softmax.int: _function("F.log_softmax", given={"dim": None, "dtype": None}),
    aten.clamp.default: _method("clamp", given={"min": None, "max": None}),
    aten.clamp_min.default: _method("clamp", given={"min": None}),
    aten.reshape.default: _method("reshape", "shape"),
    aten.view.default: _method("reshape", "size"),
    aten.permute.default: _method("permute", "dims"),
    aten.transpose.int: _method("transpose", "dim0", "dim1"),
    aten.unsqueeze.default: _method("unsqueeze", "dim"),
    aten.squeeze.dim: _method("squeeze", "dim"),
    aten.squeeze.dims: lambda call: call_text(
        f"{call.operand('self')}.squeeze", call.value(tuple(call.bound["dim"]))
    ),
    aten.expand.default: _method("expand", "size"),
    aten.repeat.default: _method("repeat", "repeats"),
    aten.index_select.default: _method("index_select", "dim", "index"),
    aten.masked_fill.Scalar: _method("masked_fill", "mask", "value"),
    aten.type_as.default: _method("type_as", "other"),
    aten.clone.default: _method("clone", given={"memory_format": None}),
    aten.argmax.default: _method("argmax", given={"dim": None, "keepdim": False}),
    aten.argmin.default: _method("argmin", given={"dim": None, "keepdim": False}),
    aten._to_copy.default: _cast,
    aten.mean.dim: _reduction("mean", only={"dtype": None}),
    aten.sum.dim_IntList: _reduction("sum", only={"dtype": None}),
    aten.amax.default: _reduction("amax"),
    aten.amin.default: _reduction("amin"),
    aten.cat.default: _joined("cat"),
    aten.stack.default: _joined("stack"),
    aten.slice.Tensor: _slice,
    aten.select.int: lambda call: _subscript(call, call.bound["dim"], call.text("index")),
    aten.sym_size.int: lambda call: Text(f"{call.operand('self')}.shape[{call.text('dim')}]"),
    aten.constant_pad_nd.default: _padded,
    aten.reflection_pad1d.default: _mirrored("reflect"),
    aten.reflection_pad2d.default: _mirrored("reflect"),
    aten.replication_pad2d.default: _mirrored("replicate"),
    aten.upsample_nearest1d.vec: _resized("nearest"),
    aten.upsample_nearest2d.vec: _resized("nearest"),
    aten.upsample_bilinear2d.vec: _resized("bilinear"),
    aten.scaled_dot_product_attention.default: _attention,
    aten.pixel_shuffle.default: _positional("F.pixel_shuffle"),
    operator.getitem: lambda call: Text(f"{call.value(call.node.args[0])}[{call.value(call.node.args[1])}]"),
}
