"""Layers that read what others give are written as products of matrices, and only where nothing else reads that."""

from collections import Counter

import onnx
import pytest
import torch
from torch import nn

import sbp_compile

X = torch.randn(2, 5, 8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def operators(network, path, *inputs, **options):
    """How often each operator is in the file, which was compared in onnxruntime when it was written."""
    sbp_compile.compile(network.eval(), inputs or X, **options).save(path)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


class Applied(nn.Module):
    """Layers, and what a function makes of them and the input."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.ReLU6()])
def test_a_perceptron_is_products_of_matrices(act, tmp_path):
    network = nn.Sequential(nn.Linear(8, 16), act, nn.Linear(16, 7), nn.ReLU())
    found = operators(network, tmp_path / "small.onnx")
    assert (found["Reshape"], found["Gemm"], found["MatMul"]) == (2, 2, 0)


def test_what_is_done_behind_the_last_layer_stays_where_it_can_be_fused(tmp_path):
    network = Applied(lambda x, *f: x + f[1](f[0](x).relu()), nn.Linear(8, 16), nn.Linear(16, 8))
    sbp_compile.compile(network.eval(), X).save(tmp_path / "small.onnx")
    names = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert names == ["Reshape", "Gemm", "Relu", "Gemm", "Reshape", "Add"]


def test_layers_that_gate_each_other_read_one_matrix(tmp_path):
    layers = nn.Linear(8, 16), nn.Linear(8, 16, bias=False), nn.Linear(16, 8)
    network = Applied(lambda x, a, b, c: c(torch.sigmoid(a(x)) * b(x)), *layers)
    found = operators(network, tmp_path / "small.onnx")
    assert (found["Reshape"], found["Gemm"], found["MatMul"]) == (2, 3, 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, a, b: (b(a(x).relu()), a(x).relu().mean(1)),
        lambda x, a, b: b(torch.softmax(a(x), 1)),
        lambda x, a, b: b(a(x) + x.mean(1, keepdim=True).repeat(1, 1, 2)),
        lambda x, a, b: a(x).relu(),
        lambda x, a, b: b(torch.cat([x, x], -1)),
    ],
    ids=["another reader", "no pointwise call", "broadcast", "one layer", "no layer in front"],
)
def test_other_layers_stay(function, tmp_path):
    network = Applied(function, nn.Linear(8, 16), nn.Linear(16, 8))
    found = operators(network, tmp_path / "small.onnx")
    assert found["Gemm"] == 0
    assert found["MatMul"] >= 1


def test_a_layer_in_a_chain_and_one_beside_it_share_what_they_read(tmp_path):
    layers = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 4)
    network = Applied(lambda x, a, b, c: (b(h := a(x).relu()), c(h * 2.0)), *layers)
    found = operators(network, tmp_path / "small.onnx")
    assert (found["Reshape"], found["Gemm"], found["MatMul"]) == (3, 3, 0)


def test_two_dynamic_axes_leave_it_as_it_is(tmp_path):
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 7))
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=64)},)
    found = operators(network, tmp_path / "small.onnx", X, dynamic_shapes=shapes)
    assert found["MatMul"] == 2


def test_an_old_opset_has_the_same_matrices(tmp_path):
    network = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 7))
    sbp_compile.compile(network.eval(), X).save(tmp_path / "small.onnx", opset=13)
    found = Counter(node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node)
    assert (found["Reshape"], found["Gemm"], found["MatMul"]) == (2, 2, 0)
