"""The command line: exit codes, messages of one line, nothing left behind, never a traceback."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import sbp_compile
from passes import Pipeline, Program, Result, default_pipeline
from sbp_compile.cli import main
from sbp_compile.emit import onnx_file
from tests.networks import Masked, PinnedBatch, assert_close, run_onnx


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "masked.pt"
    sbp_compile.save_model(Masked(), torch.randn(4, 6), path)
    return path


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run the command line, which must fail with that code and one line; returns the line."""
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert not captured.out
    [line] = captured.err.splitlines()
    assert line.startswith("sbp_compile: error: ")
    assert "Traceback" not in line
    return line


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_becomes_an_onnx_file(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(model_file), "-o", str(tmp_path / "small.onnx")]) == 0
    printed = capsys.readouterr()
    assert names(tmp_path) == ["small.onnx"]
    assert "same function: error" in printed.out
    assert "tolerance 1e-05), on 8 examples" in printed.out
    assert not printed.err
    x = torch.randn(2, 6)
    wanted = sbp_compile.load_model(model_file).exported_program.module()(x)
    assert_close(wanted.detach(), run_onnx(tmp_path / "small.onnx", x)[0])


def test_an_exported_program_is_written_under_pt2(model_file: Path, tmp_path: Path) -> None:
    assert main([str(model_file), "-o", str(tmp_path / "small.pt2"), "-q"]) == 0
    assert sbp_compile.load_model(tmp_path / "small.pt2").example_inputs is not None


def test_every_kind_of_file_is_written_in_half_precision(model_file: Path, tmp_path: Path) -> None:
    for suffix in (".onnx", ".pt2", ".ts", ".pt", ".safetensors"):
        assert main([str(model_file), "-o", str(tmp_path / f"small{suffix}"), "-q", "--fp16"]) == 0
    wanted = ["small.onnx", "small.pt", "small.pt2", "small.py", "small.safetensors", "small.ts"]
    assert names(tmp_path) == wanted


def test_the_opset_and_separate_weights_are_passed_on(model_file: Path, tmp_path: Path) -> None:
    options = ["--opset", "18", "--external-data", "-q"]
    assert main([str(model_file), "-o", str(tmp_path / "small.onnx"), *options]) == 0
    model = onnx.load(tmp_path / "small.onnx")
    assert [entry.version for entry in model.opset_import] == [18]


def test_a_recipe_goes_from_one_checkpoint_to_another(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.json"
    assert main([str(model_file), "-o", str(tmp_path / "one.onnx"), "-q", "--recipe", str(recipe)]) == 0
    first, second = json.loads(recipe.read_text())["layers"]
    assert (first["name"], first["kept"], first["constant"]) == ("first", "0,2-3,5", "1,4,6-7")
    assert (second["name"], second["kept"]) == ("second", "0-2")
    torch.manual_seed(1)
    other = Masked().eval()
    other.mask = torch.ones(8)
    sbp_compile.save_model(other, torch.randn(4, 6), tmp_path / "other.pt")
    arguments = [tmp_path / "other.pt", "-o", tmp_path / "two.onnx", "--apply", recipe]
    assert main([str(argument) for argument in arguments]) == 0
    assert "recipe: 1 masks of the recipe were applied" in capsys.readouterr().out
    other.mask = (Masked().mask != 0).float()
    x = torch.randn(3, 6)
    assert_close(other(x).detach(), run_onnx(tmp_path / "two.onnx", x)[0])


def test_source_of_the_users_is_not_overwritten_and_said_so_before_any_work(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.py").write_text("mine")
    monkeypatch.setattr("sbp_compile.capture.load.load_model", None)
    line = fails(capsys, 7, model_file, "-o", tmp_path / "small.safetensors")
    assert "small.py' beside 'small.safetensors': there is such a file that sbp_compile did not write" in line
    assert (tmp_path / "small.py").read_text() == "mine"


def test_quiet_prints_nothing(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model_file), "-o", str(tmp_path / "small.onnx"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_report_for_machines_holds_what_the_table_shows(model_file: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert main([str(model_file), "-o", str(tmp_path / "small.onnx"), "-q", "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert [(layer["name"], layer["channels"], layer["kept"]) for layer in found["layers"]] == [
        ("first", 8, 4),
        ("second", 3, 3),
    ]
    assert found["before"]["macs"] == 72
    assert found["after"]["macs"] == 36
    assert found["verification"]["file_error"] <= 1e-5
    assert set(found["seconds"]) == {"capture", "passes", "verification", "emission"}
    assert found["timings"] == []


def test_timing_compares_the_dense_and_the_small_file(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    class Comparison:
        def to_json(self) -> dict[str, Any]:
            return asked[-1]

    def compare(models: dict[str, Path], **options: Any) -> Comparison:
        assert all(path.is_file() for path in models.values())
        asked.append({"models": list(models), "batch": options["batch"], "threads": options["threads"]})
        return Comparison()

    monkeypatch.setattr("sbp_compile.timing.compare", compare)
    report = tmp_path / "report.json"
    options = ["--time", "--batch", "1,16", "--threads", "2", "-q", "--json", str(report)]
    assert main([str(model_file), "-o", str(tmp_path / "small.onnx"), *options]) == 0
    wanted = [{"models": ["dense", "small"], "batch": batch, "threads": 2} for batch in (1, 16)]
    assert json.loads(report.read_text())["timings"] == wanted


def test_help_names_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 130, 143):
        assert f"\n  {code}  " in text


def test_the_version_is_printed_without_other_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sbp_compile ")


# Exit code 2: options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: -o/--output; --help lists the options"),
        (["-o", "small.onnx", "--batch", "0"], "argument --batch: '0' is not a positive whole number"),
        (["-o", "small.onnx", "--batch", "1,x"], "argument --batch: 'x' is not a positive whole number"),
        (["-o", "small.onnx", "--threads", "-1"], "argument --threads: '-1' is not a positive whole number"),
        (["-o", "small.onnx", "--fast"], "unrecognized arguments: --fast; --help lists the options"),
        (["-o", "small.pb"], "output 'small.pb' must end in .onnx, .pt2, .ts, .pt or .safetensors"),
        (["-o", "small.safetensors", "--json", "small.py"], "'small.py' is another output itself; give the"),
        (["-o", "small.onnx", "--recipe", "small.onnx"], "'small.onnx' is another output itself; give the"),
        (["-o", "small.onnx", "--opset", "x"], "argument --opset: 'x' is not the number of an opset"),
        (["-o", "small.pt2", "--opset", "18"], "--opset is for .onnx outputs, not for 'small.pt2'"),
        (["-o", "small.ts", "--external-data"], "--external-data is for .onnx outputs, not for 'small.ts'"),
        (["-o", "small.onnx", "--fp16-io"], "fp16_io needs fp16"),
        (["-o", "small.onnx", "--opset", "9"], "opset 9 cannot express this network"),
        (
            ["-o", "small.onnx", "--apply", "no.json"],
            "cannot read recipe 'no.json': no such file or directory",
        ),
        (["-o", "small.pt2", "--time"], "--time needs an .onnx output, not 'small.pt2'"),
        (["-o", "small.onnx", "--json", "small.onnx"], "'small.onnx' is another output itself; give the"),
    ],
)
def test_bad_options_are_named(
    options: list[str],
    message: str,
    model_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, 2, model_file, *options)
    assert not names(tmp_path)


def test_the_model_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"a trained model")
    message = fails(capsys, 2, path, "-o", tmp_path / "." / "model.pt2")
    assert "is the model itself; give the output another name" in message
    assert path.read_bytes() == b"a trained model"


# Other doors in


DOORS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "trace": (lambda path: torch.jit.save(trace(), path), []),  # type: ignore[no-untyped-call]
    "trace with inputs": (
        lambda path: torch.jit.save(trace(), path),  # type: ignore[no-untyped-call]
        ["--input", "x=3x6:float32", "--dynamic", "x:0=n"],
    ),
    "state dict": (
        lambda path: torch.save({"model": Masked().state_dict()}, path),
        ["--arch", "tests.networks:Masked", "--input", "1x6"],
    ),
    "safetensors": (
        lambda path: safetensors.torch.save_file(Masked().state_dict(), path),
        ["--arch", "tests.networks:Masked", "--arch-args", "{}", "--input", "x=1x6"],
    ),
    "module": (lambda path: torch.save(Masked(), path), ["--trust-pickle", "--input", "x=1x6"]),
}


def trace() -> Any:
    return torch.jit.trace(Masked().eval(), torch.ones(1, 6))  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", DOORS)
def test_every_format_becomes_the_same_file(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, options = DOORS[kind]
    torch.manual_seed(0)
    write(tmp_path / "model.bin")
    torch.manual_seed(0)
    wanted = Masked().eval()
    assert main([str(tmp_path / "model.bin"), "-o", str(tmp_path / "small.onnx"), *options]) == 0
    printed = capsys.readouterr()
    assert "same function" in printed.out
    assert ("warning: unpickling" in printed.err) == (kind == "module")
    x = torch.randn(4, 6)
    assert_close(wanted(x).detach(), run_onnx(tmp_path / "small.onnx", x)[0])
    [axis, _] = onnxruntime.InferenceSession(tmp_path / "small.onnx").get_inputs()[0].shape
    assert axis == ("n" if "--dynamic" in options else "batch")


def test_example_inputs_come_from_the_arrays_where_the_file_has_none(tmp_path: Path) -> None:
    torch.save(Masked().state_dict(), tmp_path / "weights.pt")
    np.savez(tmp_path / "data.npz", x=np.ones((5, 6), np.float32))
    options = ["--arch", "tests.networks:Masked", "--inputs", str(tmp_path / "data.npz"), "-q"]
    assert main([str(tmp_path / "weights.pt"), "-o", str(tmp_path / "small.onnx"), *options]) == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "is a state dict: weights without a network"),
        (["--arch", "tests.networks:Masked"], 4, "brings no example inputs: add --input x=SHAPE:DTYPE"),
        (
            ["--arch", "tests.networks:Masked", "--input", "x=1x7"],
            5,
            r"\(example inputs of shapes \[1, 7\]: do they fit",
        ),
        (
            ["--arch", "tests.networks:Images", "--input", "x=1x7"],
            4,
            "'bias' missing from the file; 'first.bias' not in the network",
        ),
        (
            ["--arch", "tests.networks:Masked", "--arch-args", "{", "--input", "1x6"],
            2,
            "--arch-args '{' is not JSON",
        ),
        (
            ["--arch", "tests.networks:Masked", "--arch-args", "3", "--input", "1x6"],
            2,
            "must be a JSON object or array",
        ),
        (["--input", "x=1x6", "--input", "x=1x6"], 2, "'x' is given twice"),
        (["--dynamic", "x=batch"], 2, "--dynamic 'x=batch' cannot be read; write NAME:AXIS=SIZE_NAME"),
    ],
)
def test_what_the_file_does_not_say_is_asked_for(
    options: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Masked().state_dict(), tmp_path / "weights.pt")
    line = fails(capsys, code, tmp_path / "weights.pt", "-o", tmp_path / "small.onnx", *options)
    assert re.search(message, line)
    assert names(tmp_path) == ["weights.pt"]


@pytest.mark.parametrize("option", ["--arch", "--checkpoint-key"])
def test_an_option_that_says_nothing_of_the_file_is_refused(
    option: str, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, 2, model_file, "-o", tmp_path / "small.onnx", option, "networks:Net")
    assert f"{option}: {str(model_file)!r} is an exported program, of which it says nothing" in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "torch.safetensors",
            "torch.py beside 'torch.safetensors' would be imported in place of the library",
        ),
        ("signal.safetensors", "signal.py beside"),
        ("small\udcff.onnx", "is no name in UTF-8"),
    ],
)
def test_a_name_that_breaks_what_reads_it_is_refused(
    name: str, message: str, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, 2, model_file, "-o", tmp_path / name)


def test_the_axes_of_an_exported_program_are_what_they_are(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, 2, model_file, "-o", tmp_path / "small.onnx", "--dynamic", "x:0=batch")
    assert "is an exported program, whose axes were chosen when it was exported" in line


def test_inputs_for_a_program_without_examples_are_taken(tmp_path: Path) -> None:
    program = torch.export.export(Masked(), (torch.randn(4, 6),))
    program.example_inputs = None
    torch.export.save(program, tmp_path / "model.pt2")
    arguments = [
        str(tmp_path / "model.pt2"),
        "-o",
        str(tmp_path / "small.onnx"),
        "-q",
        "--input",
        "x=4x6:float32",
    ]
    assert main(arguments) == 0


# Exit code 3: the model file


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no model")


BAD_FILES = {
    "missing": (lambda path: None, "there is no file '.*model.pt'"),
    "empty": (lambda path: path.touch(), "model.pt' is empty"),
    "text": (lambda path: path.write_text("hello"), "of a format that is not known; understood are"),
    "zip": (write_zip, "is a zip archive without a model in it; understood are files of"),
    "folder": (lambda path: path.mkdir(), "is a directory or a device, not a model file"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_what_is_no_model_file_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, message = BAD_FILES[kind]
    write(tmp_path / "model.pt")
    before = names(tmp_path)
    line = fails(capsys, 3, tmp_path / "model.pt", "-o", tmp_path / "small.onnx")
    assert re.search(message, line)
    assert names(tmp_path) == before


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_truncated_model_file_is_refused(
    share: float, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = model_file.read_bytes()
    (tmp_path / "model.pt").write_bytes(content[: int(len(content) * share)])
    line = fails(capsys, 3, tmp_path / "model.pt", "-o", tmp_path / "small.onnx")
    assert "is a truncated or damaged archive" in line
    assert names(tmp_path) == ["model.pt"]


# Exit code 4: inputs


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def save_objects(path: Path) -> None:
    np.savez(path, x=np.array([{"a": 1}], dtype=object))


BAD_INPUTS = {
    "missing": (lambda path: None, "no such file or directory"),
    "text": (lambda path: path.write_text("hello"), "expected an .npz file of numeric arrays"),
    "npy": (lambda path: path.write_bytes(npy_bytes()), "expected an .npz file of numeric arrays"),
    "objects": (
        save_objects,
        "'x.npy' has dtype object, not numbers; expected an .npz file of numeric arrays",
    ),
    "names": (
        lambda path: np.savez(path, y=np.zeros((1, 6)), z=np.zeros((1, 6))),
        r"are named \['y', 'z'\], the model's are \['x'\]",
    ),
    "shape": (
        lambda path: np.savez(path, x=np.zeros((1, 7), np.float32)),
        r"input 'x' has shape \[1, 7\], the model takes \['any', 6\]",
    ),
    "rank": (
        lambda path: np.savez(path, x=np.zeros(6, np.float32)),
        r"input 'x' has shape \[6\], the model takes \['any', 6\]",
    ),
    "no examples": (
        lambda path: np.savez(path, x=np.zeros((0, 6), np.float32)),
        r"input 'x' of shape \[0, 6\] is empty, and nothing can be proven on it",
    ),
    "integers": (
        lambda path: np.savez(path, x=np.zeros((1, 6), np.int64)),
        "input 'x' has dtype torch.int64, the model takes torch.float32",
    ),
    "words": (
        lambda path: np.savez(path, x=np.full((1, 6), "a")),
        "'x.npy' has dtype <U1, not numbers; expected an .npz file",
    ),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused(
    kind: str, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, message = BAD_INPUTS[kind]
    write(tmp_path / "data.npz")
    before = names(tmp_path)
    line = fails(capsys, 4, model_file, "-o", tmp_path / "small.onnx", "--inputs", tmp_path / "data.npz")
    assert re.search(message, line)
    assert names(tmp_path) == before


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
def test_inputs_of_the_user_are_verified_on(
    dtype: str, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).normal(size=(10, 6)).astype(dtype))
    arguments = [model_file, "-o", tmp_path / "small.onnx", "--inputs", tmp_path / "data.npz"]
    assert main([str(argument) for argument in arguments]) == 0
    assert "on 18 examples" in " ".join(capsys.readouterr().out.split())


def test_a_pt2_file_without_examples_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(Masked(), (torch.randn(4, 6),))
    program.example_inputs = None
    torch.export.save(program, tmp_path / "model.pt2")
    line = fails(capsys, 4, tmp_path / "model.pt2", "-o", tmp_path / "small.onnx")
    assert "brings no example inputs: add --input x=4x6:float32, or --inputs data.npz" in line


# Exit codes 5 and 6: the network


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Masked()
    with torch.no_grad():
        module.second.bias[1] = value
    sbp_compile.save_model(module, torch.randn(4, 6), tmp_path / "model.pt")
    line = fails(capsys, 5, tmp_path / "model.pt", "-o", tmp_path / "small.onnx")
    assert "'second.bias' has 1 of 3 values that are NaN or infinite" in line
    assert names(tmp_path) == ["model.pt"]


def test_a_network_that_changes_its_state_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    sbp_compile.save_model(Counting(), torch.randn(4, 6), tmp_path / "model.pt")
    line = fails(capsys, 5, tmp_path / "model.pt", "-o", tmp_path / "small.onnx")
    assert "the model changes its state while it runs (buffer_mutation 'calls')" in line


def broken_pipeline(*options: object) -> Pipeline:
    class Break:
        name = "break"

        def __call__(self, program: Program) -> Result:
            constants = {name: value * 1.001 for name, value in program.constants.items()}
            return Result(program.replace(constants=constants), True)

    return Pipeline((default_pipeline(), Break()))


def test_a_small_network_that_disagrees_is_not_written(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("passes.default_pipeline", broken_pipeline)
    (tmp_path / "small.onnx").write_bytes(b"old")
    line = fails(capsys, 6, model_file, "-o", tmp_path / "small.onnx")
    assert "output 0 differs by" in line
    assert "the networks part at" in line
    assert names(tmp_path) == ["small.onnx"]
    assert (tmp_path / "small.onnx").read_bytes() == b"old"


def test_a_file_that_disagrees_is_not_written(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    emit = onnx_file.emit_graph_module

    def emit_wrongly(program: Program, *options: Any) -> Any:
        module = emit(program, *options)
        with torch.no_grad():
            module.get_parameter("second_bias").add_(1.0)
        return module

    monkeypatch.setattr(onnx_file, "emit_graph_module", emit_wrongly)
    line = fails(capsys, 6, model_file, "-o", tmp_path / "small.onnx")
    assert "output 'output_0' differs by" in line
    assert not names(tmp_path)


def test_a_pinned_batch_is_one_line_of_warning_and_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(sbp_compile.errors.BatchPinnedWarning):
        sbp_compile.save_model(PinnedBatch(), torch.randn(2, 6), tmp_path / "model.pt")
    assert main([str(tmp_path / "model.pt"), "-o", str(tmp_path / "small.onnx")]) == 0
    assert "batch: fixed to 2" in capsys.readouterr().out


# Exit code 7: the output


@pytest.mark.parametrize("option", ["--output", "--json"])
@pytest.mark.parametrize("place", ["nowhere", "folder"])
def test_a_place_that_cannot_be_written_is_named_before_any_work(
    option: str, place: str, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder.onnx"
    folder.mkdir()
    path = tmp_path / "nowhere" / "small.onnx" if place == "nowhere" else folder
    arguments = {"--output": tmp_path / "small.onnx"} | {option: path}
    line = fails(capsys, 7, model_file, *(str(part) for pair in arguments.items() for part in pair))
    wanted = (
        "does not exist; create it first" if place == "nowhere" else "it is a directory; give a file name"
    )
    assert f"cannot write {str(path)!r}: " in line
    assert line.endswith(wanted)
    assert names(tmp_path) == ["folder.onnx"]


@pytest.mark.parametrize("option", ["--inputs", "--int8", "--tuning-file", "--apply"])
def test_a_file_that_is_read_is_not_written_over(
    option: str, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = tmp_path / "data"
    read.write_bytes(b"precious")
    line = fails(capsys, 2, model_file, "-o", tmp_path / "small.onnx", option, read, "--json", read)
    assert "itself; give the output another name" in line
    assert read.read_bytes() == b"precious"


def test_a_link_to_itself_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    assert "there is no file" in fails(capsys, 3, tmp_path / "loop.pt", "-o", tmp_path / "small.onnx")


def test_a_folder_without_permission_is_named(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    line = fails(capsys, 7, model_file, "-o", tmp_path / "small.onnx")
    assert line.endswith(f"no permission to write in {str(tmp_path)!r}")


def test_a_full_disk_leaves_the_old_file(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sbp_compile.save.save_onnx", refuse)
    (tmp_path / "small.onnx").write_bytes(b"old")
    line = fails(capsys, 7, model_file, "-o", tmp_path / "small.onnx")
    assert line.endswith("no space left on device")
    assert names(tmp_path) == ["small.onnx"]
    assert (tmp_path / "small.onnx").read_bytes() == b"old"


# Exit codes 130 and 1


def test_an_interrupt_leaves_nothing(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sbp_compile.save.save_onnx", interrupt)
    assert "interrupted; nothing was written" in fails(capsys, 130, model_file, "-o", tmp_path / "small.onnx")
    assert not names(tmp_path)


def test_an_error_of_the_compiler_is_one_line_too(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_down(*_args: object, **_options: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("sbp_compile.save.save_onnx", break_down)
    line = fails(capsys, 1, model_file, "-o", tmp_path / "small.onnx")
    assert "ZeroDivisionError: division by zero (a bug of the compiler: please report it" in line
    with pytest.raises(ZeroDivisionError):
        main([str(model_file), "-o", str(tmp_path / "small.onnx"), "--traceback"])


# As a process


def run_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sbp_compile", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_process_returns_the_exit_code(tmp_path: Path) -> None:
    found = run_process(tmp_path / "model.pt", "-o", tmp_path / "small.onnx")
    assert found.returncode == 3
    assert found.stdout == ""
    assert found.stderr == f"sbp_compile: error: there is no file '{tmp_path}/model.pt'\n"


def test_the_process_prints_only_the_report(model_file: Path, tmp_path: Path) -> None:
    found = run_process(model_file, "-o", tmp_path / "small.onnx")
    assert found.returncode == 0
    assert found.stderr == ""
    assert "Output channels" in found.stdout
