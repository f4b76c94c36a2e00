"""Networks of other packages: what needs none of them."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sbp_compile.nn import noise_layers
from tests.zoo.architecture import floats
from tests.zoo.places import Places

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("foreign")


@pytest.fixture
def places(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("foreign_places")


class Nested(nn.Module):
    """A perceptron whose first layer makes gate and value at once, called by keyword, with a result in layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"up": nn.Linear(6, 16), "down_proj": nn.Linear(8, 6)})

    def forward(self, *, x):
        gate, value = self.body["up"](x).chunk(2, -1)
        y = self.body["down_proj"](torch.sigmoid(gate) * value)
        return {"last": y, "others": (x, [y * 2], None)}


def test_every_network_is_described_without_its_package(tool):
    assert len(tool.FOREIGN) > 300
    assert {architecture.family for architecture in tool.FOREIGN.values()} == {
        "transformers", "timm", "pytorchcv", "monai",
    }  # fmt: skip
    assert not {"transformers", "timm", "pytorchcv", "monai"} & sys.modules.keys()


def test_noise_goes_in_front_of_what_reads_fused_units(places):
    described = places.foreign("nested", "ours", Nested, floats((4, 6)), ("x",))
    network = described.build(Places("hidden"))
    assert [len(layer.mu) for layer in noise_layers(network)] == [8]
    assert [tuple(y.shape) for y in network(*described.example(3))] == [(3, 4, 6)] * 3


def test_noise_goes_behind_every_convolution(places):
    def make():
        return nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 7, 1))

    described = places.foreign("plain", "ours", make, floats((3, 4, 4)))
    assert [len(layer.mu) for layer in noise_layers(described.build(Places("convolutions")))] == [5, 7]
    assert noise_layers(described.build(Places("hidden"))) == []


def test_the_page_has_rows_and_refusals(tool):
    rows = importlib.import_module("zoo_rows")
    name, other = list(tool.FOREIGN)[:2]
    good = rows.Row(
        name, "transformers", "hidden", 0.5, file_error=2e-5, file_tolerance=3e-5, macs=(30, 10),
        parameters=(20, 10), layer_macs=(30, 10), bound=10.0, opaque={"aten.index.Tensor": 2},
    )  # fmt: skip
    page = tool.page(
        [
            rows.failed(good, "ValueError: no\nmore"),
            good,
            rows.failed(rows.Row(other, "", "hidden", 0.5), "x"),
        ]
    )
    assert (
        f"| {name} | hidden | 0e+00 | 2e-05 of 3e-05 | 3.00x | 2.00x | 0% | 0% | index.Tensor (2) | 0 |"
        in page
    )
    assert "1 of 3 are exact" in page
    assert f"- {other}, hidden: x" in page
