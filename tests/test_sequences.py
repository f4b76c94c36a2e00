"""Networks on sequences, from the module to the file: recurrent taggers, towers, sentence embeddings."""

from collections import Counter

import onnx
import pytest
import torch
from torch import Tensor, nn

import sbp_compile
from tests.networks import assert_close, run_onnx

TOKENS = torch.randint(0, 40, (2, 6))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def part(size: int, kept: int) -> Tensor:
    """A mask with `kept` entries that are not 0, at random places."""
    return torch.zeros(size).index_fill(0, torch.randperm(size)[:kept], 1.0) * (torch.rand(size) + 0.5)


def compiled(network: nn.Module, path: object, *inputs: Tensor) -> dict[str, tuple[int, ...]]:
    """Compile, write and run the file at another batch size; the shapes of its parameters."""
    found = sbp_compile.compile(network.eval(), inputs)
    found.save(path)
    larger = [torch.cat([value, value.flip(1), value]) for value in inputs]
    wanted = network(*larger)
    for one, other in zip(
        (wanted,) if isinstance(wanted, Tensor) else wanted, run_onnx(path, *larger), strict=True
    ):
        assert_close(one.detach(), other)
    return {name: tuple(value.shape) for name, value in found.program.constants.items()}


class Tagger(nn.Module):
    """Embedding, mask with a constant behind it, recurrent network, mask, linear layer."""

    def __init__(self, layer: type[nn.Module], kept: tuple[int, int], **options: object) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 20)
        self.recurrent = layer(20, 10, batch_first=True, **options)
        width = 20 if options.get("bidirectional") else 10
        self.tags = nn.Linear(width, 5)
        self.register_buffer("before", part(20, kept[0]))
        self.register_buffer("shift", torch.rand(20))
        self.register_buffer("units", part(10, kept[1]))
        self.register_buffer("after", self.units.repeat(width // 10))
        with torch.no_grad():
            for name, parameter in self.recurrent.named_parameters():
                if name.startswith("weight_hh"):
                    parameter *= self.units
                elif name.startswith("weight_ih") and parameter.shape[1] != 20:
                    parameter *= self.after

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tags(self.recurrent(self.words(tokens) * self.before + self.shift)[0] * self.after)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("kept", [(14, 7), (10, 5), (2, 1)])
def test_a_tagger_shrinks_to_its_masks(layer, kept, tmp_path):
    shapes = compiled(Tagger(layer, kept), tmp_path / "net.onnx", TOKENS)
    assert shapes["words.weight"] == (40, kept[0])
    assert shapes["recurrent.weight_ih_l0"][1] == kept[0]
    assert shapes["recurrent.weight_hh_l0"][1] == kept[1]
    assert shapes["tags.weight"] == (5, kept[1])


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_a_deep_tagger_of_two_directions_shrinks_to_its_masks(layer, tmp_path):
    network = Tagger(layer, (10, 5), bidirectional=True, num_layers=2)
    with torch.no_grad():
        for name, parameter in network.recurrent.named_parameters():
            if name.startswith("weight_ih_l1"):
                parameter *= network.after
    shapes = compiled(network, tmp_path / "net.onnx", TOKENS)
    assert shapes["recurrent.weight_hh_l0"][1] == 5
    assert shapes["recurrent.weight_ih_l1"][1] == 10
    assert shapes["recurrent.weight_hh_l1_reverse"][1] == 5
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds.count(layer.__name__) == 2


def test_learned_initial_states_are_cut_with_the_units(tmp_path):
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.out = nn.GRU(6, 8), nn.Linear(8, 3)
            self.start = nn.Parameter(torch.randn(1, 1, 8))
            self.register_buffer("mask", (torch.arange(8) % 2).float())
            with torch.no_grad():
                self.recurrent.weight_hh_l0.mul_(self.mask)

        def forward(self, x):
            return self.out(
                self.recurrent(x.transpose(0, 1), self.start.expand(1, x.shape[0], 8))[1][0] * self.mask
            )

    shapes = compiled(Learned(), tmp_path / "net.onnx", torch.randn(2, 5, 6))
    assert shapes["recurrent.weight_hh_l0"] == (12, 4)


def test_towers_of_one_encoder_shrink_together(tmp_path):
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.encoder = nn.Embedding(40, 12), nn.Linear(12, 16)
            self.head = nn.Linear(16, 4)
            self.register_buffer("mask", part(16, 5))

        def encode(self, tokens):
            return self.head(torch.tanh(self.encoder(self.words(tokens).mean(1))) * self.mask)

        def forward(self, a, b):
            return (self.encode(a) * self.encode(b)).sum(-1)

    shapes = compiled(Towers(), tmp_path / "net.onnx", TOKENS, TOKENS.flip(0))
    assert shapes["encoder.weight"] == (5, 12)
    assert shapes["head.weight"] == (4, 5)


def test_tied_output_words_stay_tied(tmp_path):
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.hidden = nn.Embedding(40, 12), nn.GRU(12, 12, batch_first=True)
            self.out = nn.Linear(12, 40)
            self.out.weight = self.words.weight

        def forward(self, tokens):
            return self.out(self.hidden(self.words(tokens))[0])

    shapes = compiled(Language(), tmp_path / "net.onnx", TOKENS)
    assert list(shapes.values()).count((40, 12)) == 1


def test_a_compiled_tagger_is_compiled_to_itself():
    once = sbp_compile.compile(Tagger(nn.LSTM, (10, 5)).eval(), TOKENS)
    twice = sbp_compile.compile(once.module, TOKENS)
    assert twice.report.after == once.report.after
    assert operators(once) == operators(twice)


def operators(found: sbp_compile.Compiled) -> Counter[str]:
    """How often each operator occurs; where a size is read depends on the capture."""
    size = torch.ops.aten.sym_size.int
    return Counter(str(node.target) for node in found.program.calls() if node.target is not size)
