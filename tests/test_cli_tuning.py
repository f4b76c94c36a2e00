"""The options for tuning: measured here, kept in a file, used elsewhere."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import sbp_compile
from passes.targets import Layer
from sbp_compile.cli import main
from sbp_compile.errors import OutputError, TuningCacheWarning
from sbp_compile.tuning import LayerTimes, OnnxruntimeTuner, load_times, save_times
from sbp_compile.tuning.layer_times import key_of
from sbp_compile.tuning_options import keep_times


class Masked(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 48, 3, bias=False), nn.ReLU(), nn.Conv2d(48, 4, 1))
        with torch.no_grad():
            self[0].weight[:, :, :, :] *= (torch.arange(48) < 37).float().view(-1, 1, 1, 1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    sbp_compile.save_model(Masked(), torch.rand(2, 3, 12, 12), path)
    return path


def kept(tmp_path: Path) -> int:
    report = json.loads((tmp_path / "report.json").read_text())
    return next(layer["kept"] for layer in report["layers"] if layer["channels"] == 48)


def times_that_like(width: int, processor: str = "elsewhere") -> LayerTimes:
    """A machine on which 3x3 layers of one width are faster than all others."""
    layer = Layer(2, 9, 100)
    seconds = {key_of(layer, 3, outputs): 1e-6 if outputs == width else 1e-3 for outputs in range(37, 49)}
    return LayerTimes(processor, "1.0", "cpu", 1, 1, seconds)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tuning_measures_keeps_the_times_and_says_so(model, tmp_path, capsys):
    arguments = [
        model,
        "-o",
        tmp_path / "small.onnx",
        "--tune",
        "1",
        "--tuning-file",
        tmp_path / "times.json",
    ]
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr()
    assert "layers at candidate widths measured" in " ".join(printed.out.split())
    assert not printed.err
    [times] = load_times(tmp_path / "times.json")
    assert times.machine == LayerTimes.of_this_machine().machine
    assert times.seconds


def test_times_are_kept_in_the_users_cache_where_no_file_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main([str(model), "-o", str(tmp_path / "small.onnx"), "--tune", "1", "-q"]) == 0
    assert load_times(tmp_path / "cache" / "sbp_compile" / "tuning.json")


@pytest.mark.parametrize("width", [40, 48])
def test_times_of_another_machine_choose_widths_without_measuring(width, model, tmp_path):
    save_times(tmp_path / "times.json", times_that_like(width))
    before = (tmp_path / "times.json").read_bytes()
    arguments = [model, "-o", tmp_path / "small.onnx", "--tuning-file", tmp_path / "times.json", "-q"]
    assert main([*map(str, arguments), "--json", str(tmp_path / "report.json")]) == 0
    assert kept(tmp_path) == width
    assert (tmp_path / "times.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "fast"], "argument --tune: 'fast' is no number of seconds between 1 and 86400"),
        (["--tune", "nan"], "argument --tune: 'nan' is no number of seconds"),
        (["--tuning-file", "none.json"], "tuning file 'none.json' does not exist: --tune makes one"),
        (["--tuning-file", "two.json"], "tuning file 'two.json' has 2 machines, none of them this one"),
        (["--target", "none", "--tune"], "--target none asks for the fewest channels"),
        (["--tune", "--tuning-file", "small.onnx"], "'small.onnx' is another output itself"),
        (["--tune", "--provider", "cuda"], "provider 'cuda' is missing"),
    ],
)
def test_what_cannot_be_tuned_for_is_one_line(options, message, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for processor in ("one", "two"):
        save_times(tmp_path / "two.json", times_that_like(40, processor))
    assert main([str(model), "-o", "small.onnx", *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "small.onnx").exists()


def test_a_cache_that_cannot_be_written_costs_no_network(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # no folder can be made there, by root either
    tuner = OnnxruntimeTuner(times_that_like(40), 1.0)
    with pytest.warns(TuningCacheWarning, match="measured times are not kept: "):
        keep_times(argparse.Namespace(tuning_file=None), tuner)
    with pytest.raises(OutputError, match="cannot make the folder of '/proc/nowhere"):
        keep_times(argparse.Namespace(tuning_file=Path("/proc/nowhere/times.json")), tuner)


def test_times_that_another_run_has_kept_meanwhile_stay(tmp_path):
    times = times_that_like(40)
    halves = [dict(list(times.seconds.items())[part]) for part in (slice(6), slice(6, None))]
    for half in halves:
        save_times(tmp_path / "times.json", replace(times, seconds=half))
    [found] = load_times(tmp_path / "times.json")
    assert found.seconds == times.seconds


def test_a_damaged_tuning_file_is_named(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("times.json").write_text("{}")
    assert main([str(model), "-o", "small.onnx", "--tuning-file", "times.json"]) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert "'times.json' is no tuning file" in line
