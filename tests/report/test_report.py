"""The report: what was removed, why the rest stayed, on 80 columns and as data."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import sbp_compile
from passes import FewestMacs, Note, default_pipeline
from passes.ir.cost import Cost
from sbp_compile.report import Layer, Report
from tests.networks import MASK, Masked


def printed(report: Report, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(report)
    text = console.file.getvalue()
    assert isinstance(text, str)
    return text


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    return sbp_compile.compile(Masked(), torch.randn(4, 6)).report


def test_each_layer_has_channels_masked_and_kept(report: Report) -> None:
    first, second = report.layers
    assert (first.name, first.kind, first.channels, first.masked, first.kept) == ("first", "linear", 8, 4, 4)
    assert (second.inputs, second.inputs_kept, second.channels, second.kept) == (8, 4, 3, 3)
    assert first.reason == second.reason == ""


def test_totals_are_of_the_plain_dense_network(report: Report) -> None:
    assert report.before == Cost(macs=72, parameters=6 * 8 + 8 + 8 * 3 + 3, bytes=4 * 83)
    assert report.after == Cost(macs=36, parameters=6 * 4 + 4 + 4 * 3 + 3, bytes=4 * 43)


def test_stages_are_timed_apart(report: Report) -> None:
    assert set(report.seconds) == {"capture", "passes", "verification"}
    assert all(seconds >= 0 for seconds in report.seconds.values())


class ResidualMasks(nn.Module):
    """Two branches whose masks differ, added: each keeps what the other needs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 8, bias=False)
        self.right = nn.Linear(6, 8, bias=False)
        self.head = nn.Linear(8, 2)
        self.register_buffer("mask", MASK)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left(x) * self.mask + self.right(x.sin()) * self.mask.flip(0)).relu())


def test_why_more_were_kept_than_had_to_be_is_said() -> None:
    torch.manual_seed(0)
    report = sbp_compile.compile(ResidualMasks(), torch.randn(4, 6)).report
    left = report.layers[0]
    assert left.kept > left.channels - left.masked
    assert "for" in left.reason
    assert "Why more channels were kept than had to be" in printed(report)


def test_a_layer_that_became_part_of_another_is_named() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    report = sbp_compile.compile(network, torch.randn(4, 6)).report
    assert [layer.kept for layer in report.layers] == [0, 2]
    assert "1: is one layer with 0, in front of it" in printed(report)


def test_a_layer_to_which_constants_are_added_still_has_its_row() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    ).eval()  # fmt: skip
    with torch.no_grad():
        network[0].weight[5:] = 0.0
        network[1].bias.fill_(0.5)
    pipeline = default_pipeline(FewestMacs())
    found = sbp_compile.compile(network, torch.randn(2, 3, 8, 8), pipeline=pipeline).report
    assert any("differ by position" in note.text for note in found.notes)
    rows = [(row.kind, row.masked, row.kept, row.inputs_kept) for row in found.layers]
    assert rows == [("conv2d", 3, 5, 3), ("conv2d", 0, 4, 5), ("conv2d", 0, 2, 4)]
    assert sum(row.macs_kept for row in found.layers) == found.after.macs


def test_operators_without_a_rule_are_named_with_their_number() -> None:
    class Opaque(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.renorm(torch.renorm(x, 2, 1, 5.0), 2, 1, 5.0))

    report = sbp_compile.compile(Opaque(), torch.randn(4, 6)).report
    [note] = report.notes
    assert note.where == "aten.renorm.default"
    assert note.text.startswith("no rule covers it")
    assert "(2 in the network)" in note.text


def test_a_shared_weight_that_is_written_twice_is_named() -> None:
    class Towers(Masked):
        def __init__(self, same: bool) -> None:
            super().__init__()
            self.register_buffer("other", self.mask if same else self.mask.roll(1))

        def forward(self, x: Tensor) -> Tensor:
            second = self.second(torch.relu(self.first(x.abs())) * self.other)
            return super().forward(x) + second

    notes = sbp_compile.compile(Towers(same=False), torch.randn(4, 6)).report.notes
    assert {note.where for note in notes} == {"first.weight", "first.bias", "second.weight"}
    assert all("written 2 times" in note.text for note in notes)
    assert not sbp_compile.compile(Towers(same=True), torch.randn(4, 6)).report.notes


def large_report(report: Report) -> Report:
    name = "encoder.stages.3.blocks.11.attention.projection.output[dense]"
    layer = Layer(name, "conv2d", 4096, 2048, 2100, 4096, 2048, 123_456_789_012, 61_728_394_506, "52 for it")
    return replace(report, layers=(*report.layers, layer), notes=(Note("a[b]", "text [with] brackets"),))


@pytest.mark.parametrize("width", [80, 100])
def test_numbers_are_never_cut_and_long_names_fold(report: Report, width: int) -> None:
    text = printed(large_report(report), width)
    assert "…" not in text
    for number in ("123,456,789,012", "61,728,394,506", "4,096", "2,048", "2,100"):
        assert number in text
    assert max(len(line) for line in text.splitlines()) <= width
    table = text.split("before    after")[0]
    folded = "".join(
        line.split("  ")[1] for line in table.splitlines() if line.startswith("  ") and "─" not in line
    )
    assert "encoder.stages.3.blocks.11.attention.projection.output[dense]" in folded


def test_brackets_are_printed_as_they_are(report: Report) -> None:
    assert "a[b]: text [with] brackets" in printed(large_report(report), 200)


def test_as_data_it_goes_through_json(report: Report) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"][0]["masked"] == 4
    assert data["verification"]["float64_error"] <= 1e-12
    assert data["notes"] == []
