"""Powers that roots and products give are written so, and only where that is the same."""

from collections import Counter

import onnx
import pytest
import torch
from torch import nn

import sbp_compile

OPERATORS = {
    0.25: {"Sqrt": 2},
    0.5: {"Sqrt": 1},
    -0.5: {"Sqrt": 1, "Reciprocal": 1},
    0.75: {"Sqrt": 2, "Mul": 1},
    -0.75: {"Sqrt": 2, "Mul": 1, "Reciprocal": 1},
    1.5: {"Sqrt": 1, "Mul": 1},
    4.0: {"Mul": 2},
    0.3: {"Pow": 1},
    3.0: {"Pow": 1},
}


class Power(nn.Module):
    """Powers of what is positive, or as it comes."""

    def __init__(self, exponents, positive=True):
        super().__init__()
        self.exponents, self.positive = exponents, positive

    def forward(self, x):
        x = torch.exp(x) if self.positive else x
        return tuple(torch.pow(x, exponent) for exponent in self.exponents)


def operators(network, x, path, **options):
    """How often each operator is in the file, which was compared in onnxruntime when it was written."""
    sbp_compile.compile(network.eval(), x).save(path, **options)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("opset", [None, 11])
def test_powers_that_roots_and_products_give_are_written_so(opset, tmp_path):
    found = operators(Power(list(OPERATORS)), torch.randn(2, 5), tmp_path / "small.onnx", opset=opset)
    assert found == sum(map(Counter, OPERATORS.values()), Counter({"Exp": 1}))


def test_where_a_power_is_not_a_number_neither_are_its_roots(tmp_path):
    module = Power([0.5, 0.75, 1.5, -0.5], positive=False)
    found = operators(module, torch.tensor([[-1.0, 2.0, 0.5, 3.0]]), tmp_path / "small.onnx")
    assert not found["Pow"]


def test_powers_of_integers_and_computed_exponents_stay(tmp_path):
    class Other(nn.Module):
        def forward(self, x, n):
            return torch.pow(n, 4), torch.pow(torch.exp(x), x[:, :1])

    inputs = torch.randn(2, 3), torch.arange(6).view(2, 3)
    assert operators(Other(), inputs, tmp_path / "small.onnx")["Pow"] == 2


def test_a_local_response_norm_takes_no_power(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(5))
    assert not operators(module, torch.randn(2, 3, 6, 6), tmp_path / "small.onnx")["Pow"]
