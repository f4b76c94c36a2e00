"""Files in 8 bits: made of a proven float file, told apart from it, named like it, and refused where they cannot be."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import sbp_compile
from sbp_compile import load_model
from sbp_compile.cli import main
from sbp_compile.compiler import compile_file
from sbp_compile.errors import InputError, OpsetWarning, UnsupportedModelError, UsageError


class Masked(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 5)
        )
        with torch.no_grad():
            self[0].weight[::2] = 0.0


@pytest.fixture(scope="module")
def compiled() -> sbp_compile.Compiled:
    return sbp_compile.compile(Masked(), torch.rand(2, 3, 8, 8))


def calibration(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "calibration.npz"
    generator = np.random.default_rng(0)
    np.savez(path, **(arrays or {"input": generator.random((70, 3, 8, 8), np.float32)}))
    return path


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path)).run(None, {"input": x})[0]


def test_layers_are_quantised_and_the_interface_stays(compiled, tmp_path):
    compiled.save(tmp_path / "float.onnx")
    compiled.save(tmp_path / "int8.onnx", int8=calibration(tmp_path))
    exact, model = onnx.load(tmp_path / "float.onnx"), onnx.load(tmp_path / "int8.onnx")
    onnx.checker.check_model(model)
    operators = [node.op_type for node in model.graph.node]
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(operators)
    kinds = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    assert kinds == {onnx.TensorProto.INT8}
    assert model.graph.input == exact.graph.input
    assert [value.name for value in model.graph.output] == [value.name for value in exact.graph.output]
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        entry.key: entry.value for entry in exact.metadata_props
    }
    x = np.random.default_rng(1).random((3, 3, 8, 8), np.float32)
    wanted, found = run(tmp_path / "float.onnx", x), run(tmp_path / "int8.onnx", x)
    assert 0 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_the_note_says_how_far_it_is_from_the_exact_file(tmp_path):
    compiled = sbp_compile.compile(Masked(), torch.rand(2, 3, 8, 8))
    x = np.random.default_rng(0).random((70, 3, 8, 8), np.float32)
    compiled.save(tmp_path / "float.onnx")
    labels = run(tmp_path / "float.onnx", x).argmax(1)
    labels[:35] = (labels[:35] + 1) % 5
    compiled.save(tmp_path / "int8.onnx", int8=calibration(tmp_path, input=x, labels=labels))
    (note,) = [note.text for note in compiled.report.notes if note.where == "int8"]
    found = run(tmp_path / "int8.onnx", x).argmax(1)
    assert "70 calibration examples, outputs differ by" in note
    assert f"the same class for {np.mean(found == run(tmp_path / 'float.onnx', x).argmax(1)):.1%}" in note
    assert f"accuracy {np.mean(found == labels):.1%} (float: 50.0%)" in note


def test_the_same_network_and_examples_give_the_same_bytes(compiled, tmp_path):
    path = calibration(tmp_path)
    for name in ("a.onnx", "b.onnx"):
        compiled.save(tmp_path / name, int8=path)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_the_command_line_tells_and_times_it(tmp_path, capsys):
    sbp_compile.save_model(Masked(), torch.rand(2, 3, 8, 8), tmp_path / "model.pt")
    arguments = [tmp_path / "model.pt", "-o", tmp_path / "small.onnx", "--int8", calibration(tmp_path)]
    assert main([str(argument) for argument in arguments]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "int8: 70 calibration examples" in printed
    assert "the float file that the 8-bit one is made of" in printed


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros((2, 3, 8, 8), np.float32), "more": np.zeros(2)}, "are named"),
        ({"input": np.zeros((2, 3, 9, 9), np.float32)}, "has shape"),
        (
            {"input": np.full((2, 3, 8, 8), np.nan, np.float32)},
            "values that are NaN or infinite, and no range",
        ),
        ({"input": np.zeros((2, 3, 8, 8), np.float32), "labels": np.zeros(3, np.int64)}, "'labels' in"),
        ({"input": np.zeros((2, 3, 8, 8), np.float32), "labels": np.zeros(2)}, "'labels' in"),
    ],
)
def test_examples_that_do_not_fit_are_refused(arrays, message, compiled, tmp_path):
    with pytest.raises(InputError, match=message):
        compiled.save(tmp_path / "int8.onnx", int8=calibration(tmp_path, **arrays))
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.npz"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.pt2", {}, "--int8 is for .onnx outputs"),
        ("a.onnx", {"opset": 12}, "int8 needs opset 13 or newer"),
        ("a.onnx", {"fp16": True}, "int8 and fp16 exclude each other"),
        ("a.onnx", {"external_data": True}, "int8 and external_data exclude each other"),
    ],
)
def test_what_goes_with_8_bits_is_said(name, options, message, compiled, tmp_path):
    with pytest.raises(UsageError, match=message):
        compiled.save(tmp_path / name, int8=tmp_path / "calibration.npz", **options)


def test_a_file_of_an_older_opset_gets_one_that_has_8_bits(compiled, tmp_path):
    compiled.save(tmp_path / "old.onnx", opset=11)
    old = compile_file(load_model(tmp_path / "old.onnx"))
    with pytest.warns(
        OpsetWarning, match="cannot be written in opset 11, which the file has; it is written in opset 13"
    ):
        old.save(tmp_path / "int8.onnx", int8=calibration(tmp_path))
    assert onnx.load(tmp_path / "int8.onnx").opset_import[0].version == 13


def test_a_network_without_layers_is_refused(tmp_path):
    compiled = sbp_compile.compile(nn.ReLU(), torch.rand(2, 3))
    with pytest.raises(UnsupportedModelError, match="no layer to quantise"):
        compiled.save(tmp_path / "a.onnx", int8=calibration(tmp_path, input=np.zeros((2, 3), np.float32)))
