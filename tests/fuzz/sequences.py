"""The catalogue's layers of sequences: recurrent layers, embeddings and the projections tied to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.fuzz.builder import Builder
from tests.fuzz.draw import Draw, Shape
from tests.fuzz.layers import Kind, sequence
from tests.fuzz.masks import alive, mask
from tests.fuzz.norms import shift

VOCABULARY = 12
GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}


class Recurrent(nn.Module):
    """A recurrent layer on (batch, position, channel); its states, the last ones too, or the last ones alone."""

    def __init__(self, layer: nn.RNNBase, wanted: str) -> None:
        super().__init__()
        self.layer, self.wanted = layer, wanted

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        states, last = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        last = (last[0] if isinstance(last, tuple) else last).transpose(0, 1)
        if self.wanted == "last":
            return last
        states = states if self.layer.batch_first else states.transpose(0, 1)
        return states if self.wanted == "states" else (states, last)

    def extra_repr(self) -> str:
        return self.wanted


def recurrent(draw: Draw, x: Shape) -> nn.Module | None:
    """RNN, GRU, LSTM: layers, directions, projections, with units that are constant or that nobody reads."""
    if x.rank != 3 or not x.is_static(2):
        return None
    kind = draw.one((nn.GRU, nn.LSTM, nn.LSTM, nn.RNN))
    size = draw.randint(1, 5)
    options = (
        {"proj_size": draw.randrange(1, size)} if kind is nn.LSTM and size > 1 and draw.chance(0.3) else {}
    )
    layer = kind(
        x.sizes[2], size, num_layers=draw.one((1, 1, 2)), bidirectional=draw.chance(0.35),
        batch_first=draw.chance(0.7), bias=draw.chance(0.7), **options,
    )  # fmt: skip
    _fill_recurrent(draw, layer, GATES[kind])
    return sequence(
        [
            mask(draw, x, 2) if draw.chance(0.5) else None,
            shift(draw, x, 2) if draw.chance(0.3) else None,
            Recurrent(layer, draw.one(("states", "states", "states", "both", "last"))),
        ]
    )


def _fill_recurrent(draw: Draw, layer: nn.RNNBase, gates: int) -> None:
    """Weights; dead units have no rows, perhaps a bias, and sometimes no columns either."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draw.normal(*parameter.shape, scale=0.5))
        silent, bias_too, unread = draw.chance(0.6), draw.chance(0.5), draw.chance(0.5)
        suffixes = [
            name.removeprefix("weight_ih") for name, _ in layer.named_parameters() if "weight_ih" in name
        ]
        for suffix in suffixes:
            live = alive(draw, layer.hidden_size)
            rows = live.repeat(gates)
            if silent:
                for name in ("weight_ih", "weight_hh"):
                    getattr(layer, name + suffix).mul_(rows[:, None])
                if layer.bias and bias_too:
                    for name in ("bias_ih", "bias_hh"):
                        getattr(layer, name + suffix).mul_(rows)
            if unread and not layer.proj_size:
                getattr(layer, f"weight_hh{suffix}").mul_(live)
            if layer.proj_size:
                getattr(layer, f"weight_hr{suffix}").mul_(
                    live if unread else alive(draw, layer.proj_size)[:, None]
                )


class Embedded(nn.Module):
    """An embedding of integers, clamped into its range where they are not the network's own input."""

    def __init__(self, table: nn.Embedding, clamped: bool) -> None:
        super().__init__()
        self.table, self.clamped = table, clamped

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x.clamp(0, VOCABULARY - 1) if self.clamped else x)


def embedding(draw: Draw, builder: Builder, source: int) -> bool:
    """An embedding with dead columns, its mask and perhaps positions added to it."""
    if builder.is_float(source):
        return False
    x = builder.shape(source)
    size = draw.one((2, 4, 6, 8))
    table = nn.Embedding(VOCABULARY, size, padding_idx=draw.one((None, None, 0)))
    with torch.no_grad():
        table.weight.copy_(draw.normal(VOCABULARY, size))
        if draw.chance(0.5):
            table.weight.mul_(alive(draw, size))
    y = Shape((*x.sizes, size), (*x.other, size))
    parts = [
        Embedded(table, source >= builder.inputs),
        mask(draw, y, x.rank) if draw.chance(0.6) else None,
        shift(draw, y, x.rank) if draw.chance(0.4) else None,
    ]
    return builder.add(sequence(parts), (source,))


SEQUENCES: dict[str, Kind] = {"recurrent": recurrent}
