"""Output padding that ONNX cannot say is written as pads."""

import onnx
import pytest
import torch
from torch import nn

import sbp_compile


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.ConvTranspose2d(4, 3, 3, padding=1, dilation=2, output_padding=(0, 1)), (6, 7)),
        (
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=0, dilation=3, output_padding=(2, 1), groups=2),
            (5, 4),
        ),
        (nn.ConvTranspose1d(4, 3, 2, padding=1, dilation=4, output_padding=3), (9,)),
        (nn.ConvTranspose3d(4, 3, 2, dilation=(1, 2, 2), output_padding=(0, 1, 1)), (3, 4, 5)),
    ],
)
def test_output_padding_of_a_stride_or_more_reaches_onnxruntime(layer, sizes, tmp_path):
    network = nn.Sequential(layer, nn.ReLU())
    example = torch.randn(2, 4, *sizes)
    sbp_compile.compile(network, (example,)).save(tmp_path / "small.onnx")  # compared in onnxruntime
    (node,) = [n for n in onnx.load(tmp_path / "small.onnx").graph.node if n.op_type == "ConvTranspose"]
    assert "output_padding" not in {attribute.name for attribute in node.attribute}


def test_output_padding_below_the_stride_stays(tmp_path):
    network = nn.Sequential(nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1))
    sbp_compile.compile(network, (torch.randn(2, 4, 5, 5),)).save(tmp_path / "small.onnx")
    (node,) = [n for n in onnx.load(tmp_path / "small.onnx").graph.node if n.op_type == "ConvTranspose"]
    assert "output_padding" in {attribute.name for attribute in node.attribute}
