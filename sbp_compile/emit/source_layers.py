"""Which calls are layers of torch.nn: their constructors, and which constants are their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir import schema
from sbp_compile.emit.source_text import call_text, literal

aten = torch.ops.aten
Constants = Mapping[fx.Node, Tensor]


@dataclass(frozen=True)
class Layer:
    """A module of torch.nn in the place of a call.

    `constructor`: its text; `tensors`: the constant of each parameter, by name; `inputs`: what it is called on;
    `pieces`: how its results are nested, for a call with several (names by position).
    """

    constructor: str
    tensors: tuple[tuple[str, fx.Node], ...]
    inputs: tuple[Any, ...]
    pieces: str = ""


def layer_of(node: fx.Node, constants: Constants, rank: int | None) -> Layer | None:
    """Return the layer that computes a call, None where torch.nn has none; `rank`: of its result."""
    if node.target not in _LAYERS:
        return None
    return _LAYERS[node.target](schema.bind(node), constants, rank)


Bound = Mapping[str, Any]


def _convolution(name: str) -> Callable[[Bound, Constants, int | None], Layer | None]:
    def build(bound: Bound, constants: Constants, _: int | None) -> Layer | None:
        parameters = _parameters(bound, constants)
        if parameters is None:
            return None
        weight, groups = constants[bound["weight"]], bound["groups"]
        outputs, inputs = weight.shape[0], weight.shape[1] * groups
        options = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
        if "output_padding" in bound:
            outputs, inputs = weight.shape[1] * groups, weight.shape[0]
        given = {
            key: _sizes(bound[key])
            for key, default in options.items()
            if key in bound and _uniform(bound[key]) != default
        }
        if groups != 1:
            given["groups"] = str(groups)
        if len(parameters) == 1:
            given["bias"] = "False"
        constructor = call_text(
            f"nn.{name}", str(inputs), str(outputs), _sizes(list(weight.shape[2:])), **given
        )
        return Layer(constructor.text, parameters, (bound["input"],))

    return build


def _linear(bound: Bound, constants: Constants, _: int | None) -> Layer | None:
    parameters = _parameters(bound, constants)
    if parameters is None or constants[bound["weight"]].ndim != 2:
        return None
    outputs, inputs = constants[bound["weight"]].shape
    given = {"bias": "False"} if len(parameters) == 1 else {}
    constructor = call_text("nn.Linear", str(inputs), str(outputs), **given)
    return Layer(constructor.text, parameters, (bound["input"],))


def _layer_norm(name: str) -> Callable[[Bound, Constants, int | None], Layer | None]:
    def build(bound: Bound, constants: Constants, _: int | None) -> Layer | None:
        parameters = _parameters(bound, constants)
        if parameters is None:
            return None
        given = _eps(bound) if name == "LayerNorm" or bound["eps"] is None else {"eps": literal(bound["eps"])}
        if name == "LayerNorm" and len(parameters) == 1:
            given["bias"] = "False"
        shape = bound["normalized_shape"]
        shape = str(shape[0]) if len(shape) == 1 else str(tuple(shape))
        return Layer(call_text(f"nn.{name}", shape, **given).text, parameters, (bound["input"],))

    return build


def _group_norm(bound: Bound, constants: Constants, _: int | None) -> Layer | None:
    parameters = _parameters(bound, constants)
    if parameters is None or len(parameters) == 1:
        return None
    channels = str(constants[bound["weight"]].numel())
    constructor = call_text("nn.GroupNorm", str(bound["num_groups"]), channels, **_eps(bound))
    return Layer(constructor.text, parameters, (bound["input"],))


def _instance_norm(bound: Bound, constants: Constants, rank: int | None) -> Layer | None:
    parameters = _parameters(bound, constants)
    if parameters is None or len(parameters) == 1 or rank not in {3, 4, 5} or not bound["use_input_stats"]:
        return None
    channels = str(constants[bound["weight"]].numel())
    constructor = call_text(f"nn.InstanceNorm{rank - 2}d", channels, **_eps(bound), affine="True")
    return Layer(constructor.text, parameters, (bound["input"],))


def _embedding(bound: Bound, constants: Constants, _: int | None) -> Layer | None:
    if bound["weight"] not in constants or bound["sparse"] or bound["scale_grad_by_freq"]:
        return None
    rows, columns = constants[bound["weight"]].shape
    given = {} if bound["padding_idx"] < 0 else {"padding_idx": str(bound["padding_idx"])}
    constructor = call_text("nn.Embedding", str(rows), str(columns), **given)
    return Layer(constructor.text, (("weight", bound["weight"]),), (bound["indices"],))


def _prelu(bound: Bound, constants: Constants, _: int | None) -> Layer | None:
    if bound["weight"] not in constants:
        return None
    number = constants[bound["weight"]].numel()
    constructor = call_text("nn.PReLU", *([str(number)] if number > 1 else []))
    return Layer(constructor.text, (("weight", bound["weight"]),), (bound["self"],))


def _recurrent(name: str, **fixed: str) -> Callable[[Bound, Constants, int | None], Layer | None]:
    def build(bound: Bound, constants: Constants, _: int | None) -> Layer | None:
        params = bound["params"]
        if any(node not in constants for node in params) or bound["train"] or bound["dropout"]:
            return None
        module, arguments = _recurrent_module(name, bound, constants, fixed)
        if module is None or [tuple(value.shape) for value in module.parameters()] != [
            tuple(constants[node].shape) for node in params
        ]:
            return None
        names = [key for key, _ in module.named_parameters()]
        tensors = tuple(zip(names, params, strict=True))
        state = bound["hx"] if name != "LSTM" else tuple(bound["hx"])
        pieces = "0, (1, 2)" if name == "LSTM" else "0, 1"
        return Layer(f"nn.{name}({arguments})", tensors, (bound["input"], state), pieces)

    return build


def _recurrent_module(
    name: str, bound: Bound, constants: Constants, fixed: Mapping[str, str]
) -> tuple[torch.nn.RNNBase | None, str]:
    """Return torch's own layer of these sizes (None where there is none) and its arguments as text."""
    first, second = (constants[node] for node in bound["params"][:2])
    inputs, hidden = first.shape[1], first.shape[0] // {"LSTM": 4, "GRU": 3, "RNN": 1}[name]
    options: dict[str, Any] = {}
    if bound["num_layers"] != 1:
        options["num_layers"] = bound["num_layers"]
    options |= {key: True for key in ("batch_first", "bidirectional") if bound[key]}
    if not bound["has_biases"]:
        options["bias"] = False
    if second.shape[1] != hidden:
        options["proj_size"] = second.shape[1]
    text = {key: literal(value) for key, value in options.items()}
    arguments = [str(inputs), str(hidden), *(f"{key}={value}" for key, value in {**fixed, **text}.items())]
    try:
        with torch.device("meta"):
            module = getattr(torch.nn, name)(inputs, hidden, **options)
    except (ValueError, TypeError, RuntimeError):
        return None, ""
    return module, ", ".join(arguments)


def _parameters(bound: Bound, constants: Constants) -> tuple[tuple[str, fx.Node], ...] | None:
    """Return weight and bias; None unless the weight is a constant, and the bias one or absent."""
    weight, bias = bound["weight"], bound.get("bias")
    if weight not in constants or (bias is not None and bias not in constants):
        return None
    return (("weight", weight), *([] if bias is None else [("bias", bias)]))


def _eps(bound: Bound) -> dict[str, str]:
    """Return eps where it is not what torch.nn takes by default."""
    return {} if bound["eps"] in {None, 1e-5} else {"eps": literal(bound["eps"])}


def _uniform(value: Any) -> Any:
    """Return the one number that a list repeats, or the value as it is."""
    return value[0] if isinstance(value, (list, tuple)) and len(set(value)) == 1 else value


def _sizes(value: Any) -> str:
    single = _uniform(value)
    return str(tuple(single)) if isinstance(single, (list, tuple)) else literal(single)


_LAYERS: dict[Any, Callable[[Bound, Constants, int | None], Layer | None]] = {
    aten.conv1d.default: _convolution("Conv1d"),
    aten.conv2d.default: _convolution("Conv2d"),
    aten.conv3d.default: _convolution("Conv3d"),
    aten.conv1d.padding: _convolution("Conv1d"),
    aten.conv2d.padding: _convolution("Conv2d"),
    aten.conv3d.padding: _convolution("Conv3d"),
    aten.conv_transpose1d.default: _convolution("ConvTranspose1d"),
    aten.conv_transpose2d.input: _convolution("ConvTranspose2d"),
    aten.conv_transpose3d.input: _convolution("ConvTranspose3d"),
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm("LayerNorm"),
    aten.rms_norm.default: _layer_norm("RMSNorm"),
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.embedding.default: _embedding,
    aten.prelu.default: _prelu,
    aten.lstm.input: _recurrent("LSTM"),
    aten.gru.input: _recurrent("GRU"),
    aten.rnn_tanh.input: _recurrent("RNN"),
    aten.rnn_relu.input: _recurrent("RNN", nonlinearity='"relu"'),
}
