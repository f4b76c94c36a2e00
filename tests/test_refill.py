"""Padded widths filled with the best pruned channels: the function of the network with these channels on, no other."""

import json

import pytest
import torch
from torch import nn

import sbp_compile
from passes import TARGETS, default_pipeline
from passes.network import layers
from sbp_compile.cli import main
from sbp_compile.errors import UsageError
from sbp_compile.nn import LogNormalNoise

CHANNELS = 48
AVX512 = default_pipeline(target=TARGETS["cpu-avx512"])


def noise(alive, seed):
    """Noise with that many channels above a ratio of 1, the others below it by different amounts."""
    generator = torch.Generator().manual_seed(seed)
    layer = LogNormalNoise(CHANNELS)
    order = torch.randperm(CHANNELS, generator=generator)
    with torch.no_grad():
        layer.mu.fill_(-1.0)
        layer.log_sigma[order[:alive]] = -1.5
        layer.log_sigma[order[alive:]] = torch.linspace(1.0, 3.0, CHANNELS - alive)
    assert int(layer.mask().sum()) == alive
    return layer


class Chain(nn.Module):
    def __init__(self, first=37, second=21) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, CHANNELS, 3, bias=False), nn.Conv2d(CHANNELS, CHANNELS, 3)
        self.noise, self.other = noise(first, 1), noise(second, 2)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.last = nn.Conv2d(CHANNELS, 4, 1)
        self.norm.running_mean.normal_()

    def forward(self, x):
        x = self.norm(self.noise(self.first(x))).relu()
        return self.last(self.other(self.second(x)).relu())


class Residual(Chain):
    def forward(self, x):
        x = self.noise(self.first(x))
        y = torch.nn.functional.pad(x, (0, 0, 0, 0))
        y = y + self.other(nn.functional.conv2d(x, self.second.weight, padding=1))
        return self.last(y.relu())


def images():
    torch.manual_seed(3)
    return torch.rand(2, 3, 16, 16)


def with_channels_on(network, numbers):
    """The network with the pruned channels of the highest ratio on, so many at each noise layer."""
    for layer, number in numbers.items():
        ratios = layer.snr().detach()[~layer.mask()].sort(descending=True).values
        layer.threshold = float((ratios[number - 1] + ratios[number]) / 2)
    return network


def widths(compiled):
    return [this.out_channels for this in layers(compiled.program)]


def test_the_best_pruned_channels_take_the_places_of_constants():
    network = Chain().eval()
    plain = sbp_compile.compile(network, images(), pipeline=AVX512)
    filled = sbp_compile.compile(network, images(), pipeline=AVX512, fill=True)
    assert widths(plain) == widths(filled) == [40, 24, 4]
    wanted = with_channels_on(Chain().eval(), {})
    with_channels_on(wanted, {wanted.noise: 3, wanted.other: 3})
    torch.testing.assert_close(filled.module(images()), wanted(images()), rtol=1e-4, atol=1e-5)
    assert (filled.module(images()) - network(images())).abs().max() > 1e-3
    torch.testing.assert_close(plain.module(images()), network(images()), rtol=1e-4, atol=1e-5)


def test_the_report_names_the_layers_and_the_ratios_and_the_file_is_proven(tmp_path):
    filled = sbp_compile.compile(Chain().eval(), images(), pipeline=AVX512, fill=True)
    notes = [note.text for note in filled.report.notes if note.where == "fill"]
    assert len(notes) == 2
    assert all("3 pruned channels are on again (ratios 0." in note for note in notes)
    filled.save(tmp_path / "small.onnx")
    assert filled.report.verification.file_error < 1e-5


def test_layers_that_are_added_get_the_same_channels():
    network = Residual().eval()
    filled = sbp_compile.compile(network, images(), pipeline=AVX512, fill=True)
    notes = [note.text for note in filled.report.notes if note.where == "fill"]
    assert filled.report.verification.float64_error < 1e-12
    assert len(notes) == 1
    assert "noise" in notes[0]


def test_a_network_without_padded_widths_stays_what_it_is():
    network = Chain(40, 24).eval()
    filled = sbp_compile.compile(network, images(), pipeline=AVX512, fill=True)
    torch.testing.assert_close(filled.module(images()), network(images()), rtol=1e-4, atol=1e-5)
    assert "no width is padded behind noise" in filled.report.notes[0].text


def test_a_network_without_noise_is_told_so():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    filled = sbp_compile.compile(network, images(), pipeline=AVX512, fill=True)
    assert any("nothing to restore" in note.text for note in filled.report.notes)


def test_without_a_target_there_is_nothing_to_fill():
    with pytest.raises(UsageError, match="needs a target"):
        sbp_compile.compile(Chain().eval(), images(), pipeline=default_pipeline(), fill=True)


def test_the_command_line_fills_and_says_so(tmp_path, capsys):
    sbp_compile.save_model(Chain().eval(), images(), tmp_path / "model.pt")
    arguments = [
        tmp_path / "model.pt",
        "-o",
        tmp_path / "small.onnx",
        "--fill",
        "best",
        "--target",
        "cpu-avx512",
    ]
    report = tmp_path / "report.json"
    assert main([*map(str, arguments), "--json", str(report)]) == 0
    assert "3 pruned channels are on again" in " ".join(capsys.readouterr().out.split())
    assert [note["where"] for note in json.loads(report.read_text())["notes"]].count("fill") == 2
    assert main([*map(str, arguments[:-1]), "none"]) == 2
