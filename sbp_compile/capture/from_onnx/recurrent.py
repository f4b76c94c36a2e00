"""LSTM, GRU and plain recurrent layers: torch's own, with gates and directions in torch's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sbp_compile.capture.from_onnx.node import Node, translates
from sbp_compile.capture.from_onnx.values import Known, Value, optional_tensor, tensor

aten = torch.ops.aten
# Which of ONNX's gates (iofc, zrh) comes first, second, ... in torch (ifgo, rzn).
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_ACTIVATIONS = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}


@translates("LSTM", "GRU", "RNN")
def _recurrent(
    node: Node,
    x: Value,
    w: Value,
    r: Value,
    b: Value = None,
    lengths: Value = None,
    initial_h: Value = None,
    initial_c: Value = None,
    peepholes: Value = None,
) -> Any:
    value = tensor(x)
    batch_first = bool(node.get("layout", 0))
    value = value.transpose(0, 1) if batch_first else value
    activation = _refuse_unlike_torch(node, value, lengths, peepholes)
    weights = _weights(node, tensor(w), tensor(r), optional_tensor(b))
    directions, hidden = tensor(w).shape[0], tensor(r).shape[-1]
    states = [optional_tensor(initial_h), *([optional_tensor(initial_c)] if node.op == "LSTM" else [])]
    begun = [_state(state, value, directions, hidden, batch_first) for state in states]
    backwards = node.get("direction", "forward") == "reverse"
    value = value.flip(0) if backwards else value
    result, *last = _run(node, activation, value, begun, weights, directions == 2)
    result = result.flip(0) if backwards else result
    steps, batch = result.shape[:2]
    split = result.reshape(steps, batch, directions, hidden)
    if batch_first:
        return (split.transpose(0, 1), *(state.transpose(0, 1) for state in last))
    return (split.transpose(1, 2), *last)


def _refuse_unlike_torch(node: Node, x: Tensor, lengths: Value, peepholes: Value) -> str:
    """Return the activation of a plain layer; refuse what torch's layers do not compute."""
    if peepholes is not None:
        raise node.refusal("peephole weights are not supported")
    if node.get("clip") is not None or node.get("input_forget", 0):
        raise node.refusal("clip and input_forget are not supported")
    if node.op == "GRU" and not node.get("linear_before_reset", 0):
        raise node.refusal("linear_before_reset 0 is not supported (torch's GRU is of the other kind)")
    if lengths is not None and not _covers(lengths, x):
        raise node.refusal("sequences of different lengths are not supported; leave sequence_lens away")
    usual = _ACTIVATIONS[node.op]
    given = [name.lower() for name in node.get("activations") or []]
    directions = max(len(given) // len(usual), 1)
    if node.op == "RNN" and given in (["relu"], ["relu", "relu"]):
        return "relu"
    if given and given != usual * directions:
        raise node.refusal(f"activations {', '.join(given)} are not supported, only {', '.join(usual)}")
    return "tanh"


def _covers(lengths: Value, x: Tensor) -> bool:
    return isinstance(lengths, Known) and all(str(length) == str(x.shape[0]) for length in lengths.numbers)


def _weights(node: Node, w: Tensor, r: Tensor, b: Tensor | None) -> list[Tensor]:
    """Return, for each direction, weights of input and state, and biases of both, as torch orders gates."""
    order, found = _GATES[node.op], []
    for direction in range(w.shape[0]):
        found += [_gates(w[direction], order), _gates(r[direction], order)]
        if b is not None:
            own, state = b[direction].chunk(2)
            found += [_gates(own, order), _gates(state, order)]
    return found


def _gates(rows: Tensor, order: Sequence[int]) -> Tensor:
    if len(order) == 1:
        return rows
    parts = rows.chunk(len(order))
    return torch.cat([parts[gate] for gate in order])


def _state(state: Tensor | None, x: Tensor, directions: int, hidden: int, batch_first: bool) -> Tensor:
    if state is None:
        return x.new_zeros(directions, x.shape[1], hidden)
    return state.transpose(0, 1) if batch_first else state


def _run(
    node: Node, activation: str, x: Tensor, states: list[Tensor], weights: list[Tensor], both: bool
) -> Sequence[Tensor]:
    biased = len(weights) % 4 == 0 and weights[2].ndim == 1
    if node.op == "LSTM":
        return torch.lstm(x, states, weights, biased, 1, 0.0, False, both, False)
    function: Any = (
        torch.gru if node.op == "GRU" else torch.rnn_relu if activation == "relu" else torch.rnn_tanh
    )
    output, last = function(x, states[0], weights, biased, 1, 0.0, False, both, False)
    return output, last
