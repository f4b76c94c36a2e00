"""Sequence models with recurrence, and text models without attention."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import Architecture, floats, tokens
from tests.zoo.places import Places
from tests.zoo.units import Dense, Unit

WORDS = 60


class LSTMTagger(nn.Module):
    """Embedding, bidirectional LSTM, a hidden layer, tags for each step."""

    def __init__(self, places: Places, width: int = 24, hidden: int = 32, tags: int = 9):
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.words = places.noise("hidden", width, -1)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True, bidirectional=True, dropout=0.3)
        self.states = places.noise("hidden", 2 * hidden, -1)
        self.head = nn.Sequential(Dense(places, 2 * hidden, 32, nn.Tanh), nn.Linear(32, tags))

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.lstm(self.words(self.embed(words)))
        return self.head(self.states(states))


class GRUClassifier(nn.Module):
    """A projection of the input, a GRU, its last state through a hidden layer."""

    def __init__(self, places: Places, hidden: int = 32):
        super().__init__()
        self.entry = Dense(places, 12, 24)
        self.gru = nn.GRU(24, hidden, batch_first=True)
        self.state = places.noise("hidden", hidden)
        self.head = nn.Sequential(Dense(places, hidden, 24), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        _, last = self.gru(self.entry(x))
        return self.head(self.state(last[-1]))


class UnrolledGRU(nn.Module):
    """A GRU written out cell by cell with linear layers, four steps."""

    def __init__(self, places: Places, inputs: int = 8, hidden: int = 24):
        super().__init__()
        self.entry = Dense(places, inputs, 16)
        self.inner, self.outer = nn.Linear(hidden, 3 * hidden), nn.Linear(16, 3 * hidden)
        self.state = places.noise("hidden", hidden)
        self.head = nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], self.inner.in_features, dtype=x.dtype)
        for step in self.entry(x).unbind(1):
            reset, update, new = self.outer(step).chunk(3, 1)
            from_reset, from_update, from_new = self.inner(self.state(h)).chunk(3, 1)
            update = torch.sigmoid(update + from_update)
            new = torch.tanh(new + torch.sigmoid(reset + from_reset) * from_new)
            h = (1 - update) * new + update * h
        return self.head(self.state(h))


class CRNN(nn.Module):
    """Text in images: a convolutional trunk that flattens the height, then an LSTM over columns."""

    def __init__(self, places: Places):
        super().__init__()
        self.trunk = nn.Sequential(
            places.noise("on input", 1), Unit(places, 1, 16), nn.MaxPool2d(2, 2), Unit(places, 16, 24),
            nn.MaxPool2d((2, 1), (2, 1)), Unit(places, 24, 32), nn.MaxPool2d((2, 1), (2, 1)),
            Unit(places, 32, 32, (2, 3), padding=(0, 1)),
        )  # fmt: skip
        self.lstm = nn.LSTM(32, 24, bidirectional=True)
        self.head = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.trunk(x).squeeze(2).permute(2, 0, 1)
        states, _ = self.lstm(columns)
        return F.log_softmax(self.head(states), dim=2)


class Attention2Seq(nn.Module):
    """An encoder and a decoder GRU with dot-product attention between them, teacher-forced."""

    def __init__(self, places: Places, width: int = 24):
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, width), nn.Embedding(WORDS, width)
        self.encoder, self.decoder = (nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.noise = places.noise("hidden", width, -1)
        self.join = Dense(places, 2 * width, width, nn.Tanh)
        self.out = nn.Linear(width, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, last = self.encoder(self.source(source))
        memory = self.noise(memory)
        states, _ = self.decoder(self.target(target), last)
        weights = torch.bmm(states, memory.transpose(1, 2)).softmax(-1)
        return self.out(self.join(torch.cat([torch.bmm(weights, memory), states], -1)))


class TextCNN(nn.Module):
    """Convolutions of three widths over embeddings, maxima over time."""

    def __init__(self, places: Places, width: int = 24):
        super().__init__()
        self.embed = nn.Embedding(WORDS, width, padding_idx=0)
        self.convs = nn.ModuleList(
            Unit(places, width, 16, kernel, dims=1, norm=None, padding=0) for kernel in (3, 4, 5)
        )
        self.noise = places.noise("hidden", 48)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(48, 4))

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words).transpose(1, 2)
        pooled = [F.max_pool1d(y, y.size(2)).squeeze(2) for y in (conv(x) for conv in self.convs)]
        return self.head(self.noise(torch.cat(pooled, 1)))


class FastText(nn.Module):
    """The mean of the embeddings of words that are not padding, through a hidden layer."""

    def __init__(self, places: Places, width: int = 32):
        super().__init__()
        self.embed = nn.Embedding(WORDS, width, padding_idx=0)
        self.mean = places.noise("hidden", width)
        self.head = nn.Sequential(Dense(places, width, 24), nn.Linear(24, 4))

    def forward(self, words: Tensor) -> Tensor:
        there = (words != 0).unsqueeze(-1).float()
        mean = (self.embed(words) * there).sum(1) / there.sum(1).clamp(min=1.0)
        return self.head(self.mean(mean))


class GatedCNN(nn.Module):
    """Language model of causal convolutions with gated linear units; input and output embeddings tied."""

    def __init__(self, places: Places, width: int = 24, layers: int = 2):
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        unit = partial(
            Unit, places, width, 2 * width, 3, dims=1, norm=None, padding=0, act=partial(nn.GLU, dim=1)
        )
        self.layers = nn.ModuleList(unit() for _ in range(layers))
        self.gated = nn.ModuleList(places.noise("hidden", width) for _ in range(layers))
        self.head = Dense(places, width, width, act=None)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words).transpose(1, 2)
        for layer, noise in zip(self.layers, self.gated, strict=True):
            x = x + noise(layer(F.pad(x, (2, 0))))
        return F.linear(self.head(x.transpose(1, 2)), self.embed.weight)


ARCHITECTURES = (
    Architecture("lstm_tagger", "LSTM", LSTMTagger, tokens(WORDS, (12,))),
    Architecture("gru_classifier", "GRU", GRUClassifier, floats((10, 12))),
    Architecture("unrolled_gru", "GRU", UnrolledGRU, floats((4, 8))),
    Architecture("crnn", "CRNN", CRNN, floats((1, 16, 32))),
    Architecture("attention_seq2seq", "Seq2seq", Attention2Seq, tokens(WORDS, (10,), (8,))),
    Architecture("text_cnn", "TextCNN", TextCNN, tokens(WORDS, (16,))),
    Architecture("fasttext", "FastText", FastText, tokens(WORDS, (16,))),
    Architecture("gated_cnn", "Gated CNN", GatedCNN, tokens(WORDS, (12,))),
)
