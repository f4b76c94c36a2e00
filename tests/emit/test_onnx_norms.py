"""A product and a sum for each channel become one node, and only where that is the same."""

from collections import Counter

import onnx
import pytest
import torch
from torch import nn

import sbp_compile


class Around(nn.Module):
    """A sum of two branches, scaled and shifted by channel before an activation."""

    def __init__(self, scale, shift, also=False):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.also = also

    def forward(self, x):
        y = torch.relu(self.first(x)) + torch.relu(self.second(x))
        scaled = y * self.scale
        shifted = torch.relu(scaled + self.shift)
        return (shifted, scaled) if self.also else shifted


def operators(network, path, **options):
    """How often each operator is in the file, which was compared in onnxruntime when it was written."""
    torch.manual_seed(0)
    compiled = sbp_compile.compile(network, torch.randn(2, 3, 9, 9))
    compiled.save(path, **options)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def by_channel():
    return torch.rand(8, 1, 1) + 0.5


def test_a_scale_and_a_shift_of_each_channel_are_one_node(tmp_path):
    found = operators(Around(by_channel(), by_channel()), tmp_path / "small.onnx")
    assert found["BatchNormalization"] == 1
    assert found["Mul"] == 0
    assert found["Add"] == 1


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_it_is_one_node_in_older_opsets_as_well(opset, tmp_path):
    found = operators(Around(by_channel(), by_channel()), tmp_path / "small.onnx", opset=opset)
    assert found["BatchNormalization"] == 1


def test_a_product_that_something_else_reads_stays(tmp_path):
    found = operators(Around(by_channel(), by_channel(), also=True), tmp_path / "small.onnx")
    assert found["BatchNormalization"] == 0


@pytest.mark.parametrize("shape", [(9,), (8, 9, 9), (1, 9, 1)])
def test_what_is_not_by_channel_stays(shape, tmp_path):
    found = operators(Around(torch.rand(shape) + 0.5, by_channel()), tmp_path / "small.onnx")
    assert found["BatchNormalization"] == 0
