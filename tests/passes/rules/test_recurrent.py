"""Recurrent layers and cells: inputs that are known or unread go, and so do units that nobody reads or that stay 0."""

import pytest
import torch
from torch import Tensor, nn

from passes import Program
from tests.passes.support import check, shapes_of, targets_of

aten = torch.ops.aten
LAYERS = {"lstm": (nn.LSTM, 4), "gru": (nn.GRU, 3), "tanh": (nn.RNN, 1)}
CELLS = {"lstm": (nn.LSTMCell, 4), "gru": (nn.GRUCell, 3), "tanh": (nn.RNNCell, 1)}
KINDS = sorted(LAYERS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def silence(layer: nn.Module, units: list[int], size: int) -> None:
    """Zero everything that these units hear, and what other units hear of them stays."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("weight_ih", "weight_hh", "bias")):
                for gate in range(parameter.shape[0] // size):
                    parameter[[gate * size + unit for unit in units]] = 0.0


def forget(layer: nn.Module, units: list[int]) -> None:
    """Zero what other units hear of these."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("weight_hh"):
                parameter[:, units] = 0.0


class Tagger(nn.Module):
    """Features, a mask with a constant behind it, a recurrent network, a mask, a linear layer."""

    def __init__(self, kind: str, size: int = 8, shift: float = 0.5, **options: object) -> None:
        super().__init__()
        self.features = nn.Linear(5, 6)
        self.recurrent = LAYERS[kind][0](6, size, batch_first=True, **options)
        width = size * (2 if options.get("bidirectional") else 1)
        self.last = nn.Linear(width, 3)
        self.register_buffer("before", torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 0.0]))
        self.register_buffer("shift", torch.linspace(0.1, 1.0, 6) * shift)
        self.register_buffer("after", (torch.arange(width) % 2).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(self.features(x) * self.before + self.shift)[0] * self.after)


def rows_and_columns(result: Program, kind: str, name: str = "recurrent.weight_ih_l0") -> tuple[int, int]:
    """(units, inputs) of a recurrent layer of the result."""
    rows, columns = shapes_of(result)[name]
    return rows // LAYERS[kind][1], columns


@pytest.mark.parametrize("kind", KINDS)
def test_constant_inputs_go_into_the_bias(kind):
    result = check(Tagger(kind), torch.randn(2, 4, 5))
    assert rows_and_columns(result, kind) == (8, 3)
    assert shapes_of(result)["features.weight"] == (3, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_inputs_make_a_bias_where_there_is_none(kind):
    result = check(Tagger(kind, bias=False), torch.randn(2, 4, 5))
    assert rows_and_columns(result, kind) == (8, 3)
    assert "recurrent.bias_ih_l0" in shapes_of(result)
    without = check(Tagger(kind, bias=False, shift=0.0), torch.randn(2, 4, 5))
    assert rows_and_columns(without, kind) == (8, 3)
    assert "recurrent.bias_ih_l0" not in shapes_of(without)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_no_unit_reads_are_dead(kind):
    network = Tagger(kind)
    with torch.no_grad():
        network.recurrent.weight_ih_l0[:, [0, 3]] = 0.0
    assert rows_and_columns(check(network, torch.randn(2, 4, 5)), kind) == (8, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_nobody_reads_go(kind):
    network = Tagger(kind)
    forget(network.recurrent, [0, 2, 4])
    result = check(network, torch.randn(2, 4, 5))
    assert rows_and_columns(result, kind) == (5, 3)
    assert shapes_of(result)["last.weight"][1] == 5


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_only_dead_units_read_go_too(kind):
    network = Tagger(kind)
    with torch.no_grad():
        network.recurrent.weight_hh_l0.zero_()
        network.recurrent.weight_hh_l0[0, 2] = 1.0  # unit 0, unread, hears 2
        network.recurrent.weight_hh_l0[1, 4] = 1.0  # unit 1, read, hears 4
    assert rows_and_columns(check(network, torch.randn(2, 4, 5)), kind) == (5, 3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_units_that_hear_nothing_stay_zero_and_go(kind, bias):
    network = Tagger(kind, bias=bias)
    silence(network.recurrent, [1, 3, 5], 8)
    result = check(network, torch.randn(2, 4, 5))
    assert rows_and_columns(result, kind) == (5, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_hear_each_other_alone_stay_zero_and_go(kind):
    network = Tagger(kind)
    silence(network.recurrent, [1, 3], 8)
    with torch.no_grad():
        for gate in range(LAYERS[kind][1]):
            network.recurrent.weight_hh_l0[8 * gate + 1, 3] = 1.0
            network.recurrent.weight_hh_l0[8 * gate + 3, 1] = 1.0
    assert rows_and_columns(check(network, torch.randn(2, 4, 5)), kind) == (6, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_keep_equally_many_units(kind):
    network = Tagger(kind, bidirectional=True)
    forget(network.recurrent, list(range(8)))
    with torch.no_grad():
        network.after[:] = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0])
    result = check(network, torch.randn(2, 4, 5))
    assert rows_and_columns(result, kind) == (4, 3)
    assert rows_and_columns(result, kind, "recurrent.weight_ih_l0_reverse") == (4, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_units_between_two_levels_go(kind):
    network = Tagger(kind, num_layers=3, bidirectional=True)
    with torch.no_grad():
        for suffix in ("l0", "l0_reverse"):
            getattr(network.recurrent, f"weight_hh_{suffix}")[:, 4:] = 0.0
        for suffix in ("l1", "l1_reverse"):
            getattr(network.recurrent, f"weight_ih_{suffix}")[:, [4, 5, 6, 7, 12, 13, 14, 15]] = 0.0
    result = check(network, torch.randn(2, 4, 5))
    assert rows_and_columns(result, kind) == (4, 3)
    assert rows_and_columns(result, kind, "recurrent.weight_ih_l1") == (8, 8)


class Last(nn.Module):
    """The last states of a network of two levels, both of them read."""

    def __init__(self, kind: str, **options: object) -> None:
        super().__init__()
        self.recurrent = LAYERS[kind][0](6, 8, num_layers=2, **options)
        self.out = nn.Linear(8, 3)
        with torch.no_grad():
            self.out.weight[:, 1::2] = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = self.recurrent(x)[1]
        states = states if isinstance(states, tuple) else (states,)
        return tuple(self.out(state) for state in states)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_last_states_lose_the_units_that_nobody_reads(kind, bidirectional):
    network = Last(kind, bidirectional=bidirectional)
    forget(network.recurrent, [1, 3, 5, 7])
    with torch.no_grad():
        for name, parameter in network.recurrent.named_parameters():
            if name.startswith("weight_ih_l1"):
                parameter[:, [1, 3, 5, 7]] = 0.0
                if bidirectional:
                    parameter[:, [9, 11, 13, 15]] = 0.0
    result = check(network, torch.randn(4, 3, 6), dynamic=({1: torch.export.Dim("batch")},))
    assert rows_and_columns(result, kind) == (4, 6)
    assert rows_and_columns(result, kind, "recurrent.weight_ih_l1") == (4, 8 if bidirectional else 4)


class Given(nn.Module):
    """Initial states that are inputs, last states that are outputs."""

    def __init__(self, kind: str, returns: bool) -> None:
        super().__init__()
        self.recurrent, self.returns = LAYERS[kind][0](5, 8), returns
        self.out = nn.Linear(8, 3)
        with torch.no_grad():
            self.out.weight[:, 1::2] = 0.0

    def forward(self, x: Tensor, h: Tensor, c: Tensor | None = None) -> tuple[Tensor, ...]:
        y, last = self.recurrent(x, h if c is None else (h, c))
        last = last if isinstance(last, tuple) else (last,)
        return (self.out(y), *last) if self.returns else (self.out(y),)


def with_states(kind: str) -> tuple[list[Tensor], tuple[dict[int, object], ...]]:
    count = 3 if kind == "lstm" else 2
    inputs = [torch.randn(4, 3, 5), *(torch.randn(1, 3, 8) for _ in range(count - 1))]
    return inputs, tuple({1: torch.export.Dim("batch")} for _ in inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_of_given_states_only_the_kept_units_are_read(kind):
    network = Given(kind, returns=False)
    forget(network.recurrent, [1, 3, 5])
    inputs, dynamic = with_states(kind)
    result = check(network, *inputs, dynamic=dynamic)
    assert rows_and_columns(result, kind) == (5, 5)
    assert aten.index_select.default in targets_of(result)


@pytest.mark.parametrize("kind", KINDS)
def test_returned_states_are_whole(kind):
    network = Given(kind, returns=True)
    forget(network.recurrent, [1, 3, 5])
    inputs, dynamic = with_states(kind)
    assert rows_and_columns(check(network, *inputs, dynamic=dynamic), kind) == (8, 5)


class Unrolled(nn.Module):
    """A cell called step by step, and a linear layer on what it gives last."""

    def __init__(self, kind: str, bias: bool = True) -> None:
        super().__init__()
        self.features, self.cell = nn.Linear(5, 6), CELLS[kind][0](6, 8, bias=bias)
        self.out = nn.Linear(8, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 0.0]))
        self.register_buffer("shift", torch.linspace(0.1, 1.0, 6))

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in range(3):
            state = self.cell(self.features(x[:, step]) * self.mask + self.shift, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_cells_lose_constant_inputs_and_unread_units(kind, bias):
    network = Unrolled(kind, bias)
    with torch.no_grad():
        network.cell.weight_hh[:, [0, 6]] = 0.0
        network.out.weight[:, [0, 6]] = 0.0
    result = check(network, torch.randn(2, 3, 5))
    assert rows_and_columns(result, kind, "cell.weight_ih") == (6, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_lose_units_that_stay_zero(kind):
    network = Unrolled(kind)
    silence(network.cell, [1, 3, 5], 8)
    assert rows_and_columns(check(network, torch.randn(2, 3, 5)), kind, "cell.weight_ih") == (5, 3)


def test_a_projection_keeps_the_layer_whole():
    network = Tagger("lstm", size=8)
    network.recurrent = nn.LSTM(6, 10, proj_size=8, batch_first=True)
    result = check(network, torch.randn(2, 4, 5))
    assert shapes_of(result)["recurrent.weight_ih_l0"] == (40, 6)


@pytest.mark.parametrize("seed", range(8))
def test_random_recurrent_networks_with_random_zeros_stay_what_they_are(seed):
    torch.manual_seed(seed)

    def flip() -> bool:
        return bool(torch.rand(()) < 0.5)

    kind = KINDS[int(torch.randint(3, ()))]
    network = Tagger(kind, bias=flip(), bidirectional=flip(), num_layers=1 + flip(), shift=float(flip()))
    with torch.no_grad():
        for name, parameter in network.recurrent.named_parameters():
            size = parameter.shape[0] // 8
            parameter.view(size, 8, -1)[:, torch.rand(8) < 0.3] = 0.0
            if name.startswith("weight"):
                parameter[:, torch.rand(parameter.shape[1]) < 0.4] = 0.0
        network.after.copy_((torch.rand(network.after.shape) < 0.5).float())
    check(network, torch.randn(2, 4, 5))
