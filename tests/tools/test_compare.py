import importlib
import math
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from sbp_compile.nn import LogNormalNoise

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

compare = importlib.import_module("compare")
compare_page = importlib.import_module("compare_page")
fold_noise = importlib.import_module("fold_noise")
onnx_cost = importlib.import_module("onnx_cost")
peer_case = importlib.import_module("peer_case")
peers = importlib.import_module("peers")

PERCEPTRON = peer_case.Spec("tools", "LeNet-500-300", "after activation", 0.5)


def onnx_model(nodes, weights, inputs, outputs):
    initializers = [
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "graph", values, results, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("node", "weight", "shape", "macs"),
    [
        (helper.make_node("Conv", ["x", "w"], ["y"]), (5, 3, 3, 3), (1, 3, 8, 8), 5 * 6 * 6 * 27),
        (helper.make_node("Conv", ["x", "w"], ["y"], group=2), (4, 1, 3), (1, 2, 8), 4 * 6 * 3),
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]), (3, 5, 2, 2), (1, 3, 4, 4), 48 * 20),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), (5, 7), (1, 7), 35),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transA=1), (7, 5), (7, 2), 70),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (7, 5), (1, 4, 7), 4 * 35),
        (helper.make_node("Einsum", ["x", "w"], ["y"], equation="bij,jk->bik"), (7, 5), (1, 4, 7), 4 * 35),
        (helper.make_node("LSTM", ["x", "w", "w"], ["y"], hidden_size=3), (1, 12, 3), (6, 1, 3), 6 * 72),
        (helper.make_node("Mul", ["x", "w"], ["y"]), (7, 5), (7, 5), 0),
    ],
)  # fmt: skip
def test_multiply_adds_are_counted_from_the_shapes_that_run(node, weight, shape, macs):
    model = onnx_model([node], {"w": np.ones(weight)}, {"x": shape}, ["y"])
    assert onnx_cost.cost(model, [torch.ones(shape)]) == onnx_cost.Cost(macs, math.prod(weight))


def test_contractions_inside_a_graph_are_counted_too():
    nodes = [helper.make_node("Gemm", ["x", "a"], ["h"]), helper.make_node("Gemm", ["h", "b"], ["y"])]
    model = onnx_model(nodes, {"a": np.ones((3, 4)), "b": np.ones((4, 2))}, {"x": ("batch", 3)}, ["y"])
    pinned = onnx_cost.pin_batch(model, [torch.ones(1, 3)])
    assert [d.dim_value for d in pinned.graph.input[0].type.tensor_type.shape.dim] == [1, 3]
    assert onnx_cost.cost(pinned, [torch.ones(1, 3)]).macs == 12 + 8


def test_an_input_that_a_tool_dropped_is_left_out_by_its_name():
    model = onnx_model([helper.make_node("Relu", ["input_1"], ["y"])], {}, {"input_1": (2,)}, ["y"])
    [found] = onnx_cost.run(model, [torch.zeros(3), torch.tensor([-1.0, 2.0])])
    assert found.tolist() == [0.0, 2.0]


def test_the_error_is_the_worst_of_all_outputs_on_all_inputs():
    wanted = [
        [torch.tensor([1.0, -4.0]), torch.tensor([2.0])],
        [torch.tensor([1.0, 1.0]), torch.tensor([1.0])],
    ]
    found = [
        [torch.tensor([1.0, -4.0]), torch.tensor([2.5])],
        [torch.tensor([1.1, 1.0]), torch.tensor([1.0])],
    ]
    assert peer_case.worst(wanted, wanted) == 0.0
    assert peer_case.worst(wanted, found) == pytest.approx(0.25)
    assert peer_case.worst(wanted, [found[0], found[1][:1]]) == math.inf


def test_inputs_are_small_and_large_and_tokens_stay_within_their_range(tmp_path):
    example = (torch.randn(2, 3), torch.tensor([[1, 5, 5], [0, 2, 4]]))
    case = peer_case.Case(PERCEPTRON, nn.Identity(), example, tmp_path)
    assert all(values.shape == (1, 3) and tokens.shape == (1, 3) for values, tokens in case.inputs)
    assert max(values.abs().max() for values, _ in case.inputs) > 100
    assert all(set(tokens.flatten().tolist()) == {1, 5} for _, tokens in case.inputs)


class Noisy(nn.Module):
    """Every place that noise can have around two layers."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.before = LogNormalNoise(6)
        self.bias = nn.Parameter(torch.randn(6, 1, 1))
        self.norm = nn.BatchNorm2d(6)
        self.after = LogNormalNoise(6)
        self.act = activation()
        self.hidden = LogNormalNoise(6)
        self.second = nn.Conv2d(6, 3, 3)

    def forward(self, x):
        x = self.before(self.first(x)) + self.bias
        return self.second(self.hidden(self.act(self.after(self.norm(x)))))


def noisy(activation=nn.ReLU):
    torch.manual_seed(0)
    network = Noisy(activation).double().eval()
    with torch.no_grad():
        network.norm.running_mean.normal_()
        for position, layer in enumerate((network.before, network.after, network.hidden)):
            layer.mu.normal_(-0.3, 0.2)
            layer.log_sigma[position] = 5.0  # masked
    return network


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Sigmoid])
def test_folded_noise_is_the_same_function(activation):
    network, x = noisy(activation), torch.randn(1, 2, 5, 5, dtype=torch.float64)
    folded = fold_noise.fold_noise(network, (x,))
    assert torch.allclose(folded(x), network(x), rtol=0, atol=1e-12)
    assert not any(isinstance(module, LogNormalNoise) for module in folded.modules())


def test_folding_leaves_a_zero_filter_for_each_masked_channel_and_nothing_else_between_the_layers():
    network, x = noisy(), torch.randn(1, 2, 5, 5, dtype=torch.float64)
    folded = fold_noise.fold_noise(network, (x,))
    layers = [module for module in folded.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    assert len(layers) == 2
    zero = [not filters.any() for filters in folded.first.weight]
    assert zero == [True, True, True, False, False, False]
    assert folded.first.bias[0] != 0
    assert folded.first.bias[1:3].tolist() == [0.0, 0.0]


def test_folding_leaves_a_layer_alone_that_is_called_twice():
    class Twice(Noisy):
        def forward(self, x):
            return self.after(self.first(x)) + self.first(x + 1)

    network, x = Twice().double().eval(), torch.randn(1, 2, 5, 5, dtype=torch.float64)
    folded = fold_noise.fold_noise(network, (x,))
    assert torch.allclose(folded(x), network(x), rtol=0, atol=1e-12)
    assert any(isinstance(module, fold_noise.Scale) for module in folded.modules())


def test_where_the_network_cannot_be_traced_its_noise_becomes_factors(tmp_path):
    class Branching(Noisy):
        def forward(self, x):
            return super().forward(x if x.shape[0] == 1 and bool(x.sum() < math.inf) else -x)

    network = Branching().double().eval()
    case = peer_case.Case(PERCEPTRON, network, (torch.randn(2, 2, 5, 5, dtype=torch.float64),), tmp_path)
    folded = case.folded()
    assert case.note.startswith("noise is not folded")
    assert sum(isinstance(module, fold_noise.Scale) for module in folded.modules()) == 3


def test_a_tool_that_is_not_installed_is_a_row(monkeypatch):
    monkeypatch.setattr(compare, "version", lambda package: None)
    [row] = compare.compared(PERCEPTRON, ["torch-simplify"], limit=60, budget=0)
    assert row["failure"] == "not installed"
    assert compare_page.cells(row).endswith("| - |  |  |  |  | not installed |")
    assert compare_page.violations([row]) == []


def test_a_tool_that_takes_too_long_is_a_row():
    [row] = compare.compared(PERCEPTRON, ["masked"], limit=0.01, budget=0)
    assert row["failure"] == "took longer than 0.01 s"


def test_a_worker_that_dies_is_a_row():
    row = compare.measured(PERCEPTRON, "no such tool", Path("/nonexistent"), limit=600)
    assert row["failure"].startswith("crashed with exit code 1")


def test_what_a_tool_raises_is_told_in_one_line():
    assert peers.reason(ValueError("\nno such layer\nmore")) == "ValueError: no such layer"
    assert len(peers.reason(ValueError("x" * 1000))) == 160


def test_our_row_is_exact_and_smaller_than_the_masked_network(tmp_path):
    (tmp_path / "ours").mkdir()
    case = peer_case.build(PERCEPTRON, tmp_path / "ours")
    row = peers.measured(case, peers.TOOLS["sbp_compile"])
    assert row["error"] <= row["bound"] == 1e-12
    assert row["measured"] == "float64"
    assert row["macs"] < 0.6 * (784 * 500 + 500 * 300 + 300 * 10)
    written = onnx.load(str(tmp_path / "ours" / "result.onnx"))
    assert case.error_of_file(written) <= case.bound32


def rows_of(**tools):
    return [{"network": "net", "tool": tool, "note": "", **row} for tool, row in tools.items()]


EXACT = {"error": 1e-15, "bound": 1e-12, "measured": "float64"}


def test_a_smaller_exact_result_is_a_violation_and_a_smaller_wrong_one_is_not():
    rows = rows_of(
        sbp_compile={**EXACT, "macs": 100},
        wrong={**EXACT, "error": 0.1, "macs": 50},
        same={**EXACT, "macs": 100},
        failed={"failure": "ValueError: no"},
    )
    assert compare_page.violations(rows) == []
    [line] = compare_page.violations([*rows, *rows_of(better={**EXACT, "macs": 80})])
    assert line.endswith("better is exact and has 80 multiply-adds, sbp_compile 100 (1.250 times as many)")
    rows = rows_of(
        sbp_compile={**EXACT, "macs": 100, "latency_us": 9.0}, slow={**EXACT, "macs": 80, "latency_us": 12.0}
    )
    [line] = compare_page.violations(rows)
    assert line.endswith("(1.250 times as many); 12 us against our 9 us")


def test_ours_being_wrong_or_failing_is_a_violation():
    [line] = compare_page.violations(rows_of(sbp_compile={**EXACT, "error": 1e-3, "macs": 1}))
    assert line.endswith("sbp_compile is not exact: error 1.0e-03")
    [line] = compare_page.violations(rows_of(sbp_compile={"failure": "ValueError: no"}))
    assert line.endswith("sbp_compile is not exact: ValueError: no")


def test_a_module_whose_file_differs_is_not_exact():
    assert compare_page.exact({**EXACT, "file_error": 1e-6, "file_bound": 1e-5})
    assert not compare_page.exact({**EXACT, "file_error": 1e-3, "file_bound": 1e-5})


def test_the_page_sums_up_each_tool_where_it_is_exact():
    rows = rows_of(
        sbp_compile={**EXACT, "macs": 100, "latency_us": 10.0},
        other={**EXACT, "macs": 200, "latency_us": 15.0},
        wrong={**EXACT, "error": 0.1, "macs": 50},
    )
    text = compare_page.page(rows, [], 0.5)
    assert "| other | 1 of 1 | 0 | 0 | 1 / 0 / 0 | 2.00 | 1.50 |" in text
    assert "| wrong | 0 of 1 | 1 | 0 | 0 / 0 / 0 |  |  |" in text
    assert "Both goals hold" in text


def test_networks_are_named_with_their_source_and_placement():
    assert compare.spec_of("vgg11:hidden", 0.3, 1) == peer_case.Spec("zoo", "vgg11", "hidden", 0.3, 1)
    assert compare.spec_of("tools/LeNet-500-300:hidden", 0.5, 0) == PERCEPTRON


def test_the_default_list_names_networks_of_the_zoo():
    zoo = pytest.importorskip("tests.zoo")
    specs = [compare.spec_of(text, 0.5, 0) for text in compare.DEFAULT]
    assert {spec.network for spec in specs} <= zoo.ZOO.keys()
    assert {spec.placement for spec in specs} <= set(zoo.PLACEMENTS)


def test_the_page_names_exact_results_that_are_faster_than_the_default():
    def row(tool, latency, error=0.0):
        return {
            "network": "net",
            "tool": tool,
            "error": error,
            "bound": 1e-5,
            "macs": 1,
            "latency_us": latency,
        }

    own = row("sbp_compile", 100.0)
    assert compare_page.faster([own, row("other", 99.0)]) == compare_page.NONE_FASTER
    assert compare_page.faster([own, row("other", 50.0, error=1.0)]) == compare_page.NONE_FASTER
    assert "- net: other; 90 us against our 100 us" in compare_page.faster([own, row("other", 90.0)])
