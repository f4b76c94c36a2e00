"""ONNX files as a way in: what they compute is what is compiled, and what they say beside it is kept."""
# ruff: noqa: E501  (graphs and tables are read better in one line)

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sbp_compile.capture import load_model
from sbp_compile.capture.from_onnx import node, onnx_network
from sbp_compile.cli import main
from sbp_compile.compiler import Compiled, compile_file
from sbp_compile.emit import opsets
from sbp_compile.errors import BatchPinnedWarning, InputError, OpsetWarning, UnsupportedModelError, UsageError
from tests.capture.onnx_models import masked_model, parsed


def saved(model: onnx.ModelProto, folder: Path, name: str = "model.onnx", **options: object) -> Path:
    path = folder / name
    onnx.save(model, str(path), **options)
    return path


def compiled(path: Path, **options: object) -> Compiled:
    return compile_file(load_model(path, **options))


def run(path: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, dict(zip(names, feeds.values(), strict=True)))


def dimensions(value: onnx.ValueInfoProto) -> list[str | int]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def test_masked_channels_go_and_the_function_stays(tmp_path: Path) -> None:
    path = saved(masked_model(), tmp_path)
    small = compiled(path)
    small.save(tmp_path / "small.onnx")
    assert small.report.after.macs < 0.6 * small.report.before.macs
    images = np.random.default_rng(1).standard_normal((3, 3, 8, 8)).astype(np.float32)
    [wanted], [got] = run(path, x=images), run(tmp_path / "small.onnx", x=images)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_names_sizes_texts_and_opset_are_kept(tmp_path: Path) -> None:
    model = masked_model(opset=11)
    renamed = {"x": "image.1", "scores": "Bewertung für/alle"}
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "how many"
    for entry in (*model.graph.input, *model.graph.output):
        entry.name, entry.doc_string = renamed[entry.name], f"about {entry.name}"
    for call in model.graph.node:
        call.input[:] = [renamed.get(name, name) for name in call.input]
        call.output[:] = [renamed.get(name, name) for name in call.output]
    compiled(saved(model, tmp_path)).save(tmp_path / "small.onnx")
    small = onnx.load(str(tmp_path / "small.onnx"))
    assert [entry.name for entry in small.graph.input] == ["image.1"]
    assert [entry.name for entry in small.graph.output] == ["Bewertung für/alle"]
    assert [entry.doc_string for entry in small.graph.input] == ["about x"]
    assert dimensions(small.graph.input[0]) == ["how many", 3, 8, 8]
    assert dimensions(small.graph.output[0]) == ["how many", 5]
    assert small.opset_import[0].version == 11
    found = {entry.key: entry.value for entry in small.metadata_props}
    assert found["license"] == "mine"
    assert found["sbp_compile.source_producer"] == "factory 3"
    assert (small.doc_string, small.model_version, small.graph.name) == ("a model", 7, "network")


def test_an_opset_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = compiled(saved(masked_model(opset=11), tmp_path))
    lowered = opsets.lowered

    def only_from_15(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
        if opset < 15:
            raise UsageError("no way there")
        return lowered(model, opset)

    monkeypatch.setattr(opsets, "lowered", only_from_15)
    with pytest.warns(OpsetWarning, match="in opset 11, which the file has; it is written in opset 15"):
        small.save(tmp_path / "small.onnx")


def test_every_other_kind_of_output_can_be_written(tmp_path: Path) -> None:
    small = compiled(saved(masked_model(), tmp_path))
    for suffix in (".pt2", ".ts", ".safetensors"):
        small.save(tmp_path / f"small{suffix}")
        assert (tmp_path / f"small{suffix}").exists()


def test_weights_may_lie_beside_the_file(tmp_path: Path) -> None:
    path = saved(masked_model(), tmp_path, save_as_external_data=True, location="weights", size_threshold=0)
    assert (
        compiled(path).report.after.macs
        == compiled(saved(masked_model(), tmp_path, "whole.onnx")).report.after.macs
    )


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    path = saved(masked_model(opset=18), tmp_path)
    for name in ("a.onnx", "b.onnx"):
        compiled(path).save(tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    small = compiled(saved(masked_model(batch="4"), tmp_path))
    assert small.program.inputs[0].sizes == small.program.inputs[0].other_sizes == (4, 3, 8, 8)


def test_a_fixed_size_cannot_be_made_dynamic(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--dynamic x:0: the file fixes that size to 4"):
        load_model(saved(masked_model(batch="4"), tmp_path), dynamic_axes={"x": {0: "batch"}})


PICTURES = """g (float[N, 3, H, W] x) => (float[N, 4, H, W] y) <float[4, 3, 1, 1] w = {1,2,3,4,5,6,7,8,9,1,2,3}>
{ c = Conv(x, w) y = Relu(c) }"""


def test_sizes_that_only_the_user_knows_are_asked_for_by_name(tmp_path: Path) -> None:
    path = saved(parsed(PICTURES), tmp_path)
    with pytest.raises(InputError, match=r"add --input x=2x3xHxW:float32"):
        load_model(path)
    small = compiled(path, example_inputs={"x": torch.randn(1, 3, 16, 20)})
    small.save(tmp_path / "small.onnx")
    assert dimensions(onnx.load(str(tmp_path / "small.onnx")).graph.input[0]) == ["N", 3, "H", "W"]


def test_an_example_must_fit_the_file(tmp_path: Path) -> None:
    path = saved(parsed(PICTURES), tmp_path)
    with pytest.raises(InputError, match=r"given as \[1, 5, 4, 4\] of float32, the file takes"):
        load_model(path, example_inputs=torch.randn(1, 5, 4, 4))


def test_indices_of_a_table_are_drawn_from_all_of_it(tmp_path: Path) -> None:
    text = "g (int64[N, 7] tokens) => (float[N, 7, 2] y) { y = Gather(table, tokens) }"
    model = parsed(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((50, 2), np.float32), "table"))
    [tokens] = load_model(saved(model, tmp_path)).example_inputs
    assert 40 < int(tokens.max()) < 50


def test_a_graph_that_fixes_its_batch_is_captured_with_it(tmp_path: Path) -> None:
    text = "g (float[N, 4] x) => (float[2, 4] y) <int64[2] s = {2, 4}> { r = Reshape(x, s) y = Relu(r) }"
    with pytest.warns(BatchPinnedWarning, match="fixes sizes that the file leaves open"):
        small = compiled(saved(parsed(text), tmp_path))
    assert small.program.inputs[0].sizes == small.program.inputs[0].other_sizes


BRANCH = """g (float[N, 4] x) => (float[N, 4] y)
{ y = If (condition) <then_branch = a () => (float[N, 4] t) { t = Relu(x) }, else_branch = b () => (float[N, 4] e) { e = Neg(x) }> }"""


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_on_a_constant_is_taken(taken: bool, tmp_path: Path) -> None:
    model = parsed(BRANCH)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(taken), "condition"))
    small = compiled(saved(model, tmp_path))
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    assert torch.equal(small.module(x), x.relu() if taken else -x)


def test_a_branch_on_data_is_refused_by_name(tmp_path: Path) -> None:
    model = parsed(BRANCH.replace("float[N, 4] x)", "float[N, 4] x, bool condition)", 1))
    with pytest.raises(UnsupportedModelError, match=r"ONNX operator If .*depends on the values of a tensor"):
        load_model(saved(model, tmp_path))


def test_a_loop_of_known_length_is_unrolled(tmp_path: Path) -> None:
    model = parsed(
        """g (float[N, 4] x) => (float[N, 4] y) <int64 n = {3}, bool go = {1}>
        { y = Loop (n, go, x) <body = b (int64 i, bool c, float[N, 4] s) => (bool d, float[N, 4] t)
          { d = Identity(c) t = Add(s, x) }> }"""
    )
    x = torch.randn(2, 4)
    torch.testing.assert_close(compiled(saved(model, tmp_path)).module(x), 4 * x)


def test_functions_of_the_file_are_inlined(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 15, "own" : 1]>
        g (float[N, 4] x) => (float[N, 4] y) { y = own.twice(x) }
        <domain: "own", opset_import: ["" : 15]> twice (a) => (b) { b = Add(a, a) }"""
    )
    x = torch.randn(2, 4)
    torch.testing.assert_close(compiled(saved(model, tmp_path)).module(x), 2 * x)


def test_weights_that_are_inputs_too_are_weights(tmp_path: Path) -> None:
    model = masked_model()
    model.ir_version = 8
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, 1, list(tensor.dims)))
    assert len(compiled(saved(model, tmp_path)).program.inputs) == 1


def test_an_older_opset_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"opset 9; opsets from 11 on are read.*convert_version"):
        load_model(saved(masked_model(opset=9), tmp_path))


def test_a_translation_that_computes_something_else_is_noticed_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = node.TRANSLATIONS["Relu"]
    monkeypatch.setitem(node.TRANSLATIONS, "Relu", lambda call, x: right(call, x) * 1.0001)
    with pytest.raises(UnsupportedModelError, match=r"onnxruntime computes it differs by .* part at 'r'"):
        compiled(saved(masked_model(), tmp_path))


def test_weights_keep_their_names(tmp_path: Path) -> None:
    model = masked_model()
    for tensor in model.graph.initializer:
        if tensor.name == "first":
            tensor.name = "stem.0/class.weight"
    model.graph.node[0].input[1] = "stem.0/class.weight"
    from sbp_compile.capture.from_onnx import load_onnx

    network = onnx_network(load_onnx(saved(model, tmp_path)))
    assert "stem._0._class.weight" in dict(network.named_parameters())


def test_the_command_line_takes_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, small = saved(masked_model(opset=18), tmp_path), tmp_path / "small.onnx"
    assert main([str(path), "-o", str(small), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert onnx.load(str(small)).opset_import[0].version == 18


def test_inputs_to_verify_on_have_the_names_of_the_file(tmp_path: Path) -> None:
    model = parsed(
        PICTURES.replace("float[N, 3, H, W] x", "float[N, 3, H, W] images").replace("Conv(x", "Conv(images")
    )
    model.graph.input[0].name = model.graph.node[0].input[0] = "images:0"
    path = saved(model, tmp_path)
    np.savez(tmp_path / "data.npz", **{"images:0": np.ones((2, 3, 8, 8), np.float32)})
    arguments = ["--inputs", str(tmp_path / "data.npz"), "--quiet"]
    assert main([str(path), "-o", str(tmp_path / "small.onnx"), *arguments]) == 0
