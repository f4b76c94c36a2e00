"""Columns that a matrix product reads are gathered as rows: the same result, and only where it pays."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from sbp_compile.emit.onnx_gathers import gather_rows

COLUMNS, TAKEN, OUTPUTS = 200, 80, 7


def graph(operator="Gemm", axis=1, taken=TAKEN, columns=COLUMNS, twice=False, transposed=True):
    """x (batch, columns) -> Gather -> product -> y, and what else reads the gather's result."""
    generator = np.random.default_rng(0)
    index = gs.Constant("index", np.sort(generator.permutation(columns)[:taken]))
    shape = (OUTPUTS, taken) if operator == "Gemm" and transposed else (taken, OUTPUTS)
    weight = gs.Constant("weight", generator.standard_normal(shape).astype(np.float32))
    x = gs.Variable("x", np.float32, ("batch", columns))
    read = gs.Variable("read", np.float32, ("batch", taken))
    y = gs.Variable("y", np.float32, ("batch", OUTPUTS))
    attributes = {"transB": int(transposed)} if operator == "Gemm" else {}
    nodes = [
        gs.Node("Gather", "gather", {"axis": axis}, [x, index], [read]),
        gs.Node(operator, "product", attributes, [read, weight], [y]),
    ]
    outputs = [y]
    if twice:
        other = gs.Variable("other", np.float32, ("batch", taken))
        nodes.append(gs.Node("Relu", "relu", {}, [read], [other]))
        outputs.append(other)
    return gs.Graph(nodes, [x], outputs, opset=20)


def run(made, batch):
    made.cleanup().toposort()
    model = gs.export_onnx(made)
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(batch).standard_normal((batch, COLUMNS)).astype(np.float32)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})


def operators(made):
    return [node.op for node in made.nodes]


@pytest.mark.parametrize(
    "options",
    [{}, {"axis": -1}, {"operator": "MatMul"}, {"transposed": False}],
    ids=["gemm", "last axis", "matmul", "not transposed"],
)
@pytest.mark.parametrize("batch", [1, 5])
def test_rows_are_gathered_instead_and_nothing_else_changes(options, batch):
    before, after = graph(**options), graph(**options)
    gather_rows(after)
    wanted, found = run(before, batch), run(after, batch)
    assert sorted(operators(after)) == ["Gather", "Gemm", "Transpose"]
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"taken": 20}, {"columns": 2000}, {"twice": True}, {"axis": 0, "columns": COLUMNS}],
    ids=["few columns", "mostly transposing", "another reader", "rows already"],
)
def test_a_gather_stays_where_it_would_not_pay(options):
    made = graph(**options)
    before = operators(made)
    gather_rows(made)
    assert operators(made) == before


def test_a_gather_that_is_an_output_stays():
    made = graph()
    made.outputs.append(made.nodes[0].outputs[0])
    gather_rows(made)
    assert operators(made) == ["Gather", "Gemm"]


def test_names_in_the_graph_stay_unique():
    made = graph()
    made.inputs[0].name = "read.columns"
    gather_rows(made)
    assert len(made.tensors(check_duplicates=True)) == 6
