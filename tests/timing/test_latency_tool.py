"""The command line tools/latency.py: its files, its lines and its exit codes."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "latency.py"

Command = Callable[..., int]


@pytest.fixture
def command(files: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run tools/latency.py in the folder of the model files; returns the exit code."""
    monkeypatch.syspath_prepend(TOOL.parent)
    monkeypatch.chdir(files)
    tool = importlib.import_module("latency")
    return lambda *arguments: int(tool.main(arguments))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("latency: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_command_writes_one_comparison_per_batch(
    command: Command, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batch", "1,4", "--budget", "0.4", "--target", "0.5", "--json", "out.json"]
    assert command("dear.onnx", "cheap.onnx", *options) == 0
    content = json.loads((files / "out.json").read_text())
    assert [entry["batch"] for entry in content["comparisons"]] == [1, 4]
    assert content["environment"]["cores"] >= 1
    assert all(entry["ratios"][0]["ci_low"] > 1 for entry in content["comparisons"])
    assert "batch 4, provider cpu, 1 thread (no spinning)" in capsys.readouterr().out


def test_a_sweep_over_threads_and_batches_is_written_as_lines_and_drawn(
    command: Command, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["--batch", "1,4", "--threads", "1,2", "--budget", "0.2", "--target", "0.5"]
    assert (
        command("dear.onnx", "cheap.onnx", *sweep, "--csv", "out.csv", "--plot", "out.svg", "--copies") == 0
    )
    rows = list(csv.DictReader((files / "out.csv").read_text().splitlines()))
    settings = [(row["threads"], row["batch"], row["model"]) for row in rows]
    assert settings == [
        (threads, batch, model)
        for threads in ("1", "2")
        for batch in ("1", "4")
        for model in ("dear.onnx", "cheap.onnx")
    ]
    for row in rows:
        assert 0 < float(row["p5_s"]) <= float(row["median_s"]) <= float(row["p95_s"]) <= float(row["p99_s"])
        assert float(row["with_copies_s"]) > 0
    assert all(float(row["speed_up"]) > 1 for row in rows if row["model"] == "cheap.onnx")
    assert "<svg" in (files / "out.svg").read_text()
    assert "with copies" in capsys.readouterr().out


def test_the_profile_names_the_operators_and_fresh_processes_are_measured(
    command: Command, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--budget", "0.2", "--target", "0.5", "--profile", "--cold", "--json", "out.json"]
    assert command("dear.onnx", "cheap.onnx", *options) == 0
    content = json.loads((files / "out.json").read_text())
    dear, cheap = content["profiles"]
    assert {node["operator"] for node in dear["nodes"]} == {"MatMul"}
    seconds = [sum(node["seconds"] for node in entry["nodes"]) for entry in (dear, cheap)]
    assert seconds[0] > seconds[1] > 0
    assert dear["nodes"] == sorted(dear["nodes"], key=lambda node: -node["seconds"])
    for start, name in zip(content["cold_starts"], ("dear.onnx", "cheap.onnx"), strict=True):
        assert start["file_bytes"] == (files / name).stat().st_size
        assert start["load_s"] > 0
        assert start["first_run_s"] > 0
    assert content["cold_starts"][0]["peak_bytes"] > content["cold_starts"][1]["peak_bytes"]
    printed = capsys.readouterr().out
    assert "time by operator" in printed
    assert "fresh processes" in printed


def test_threads_are_reported_with_their_spinning(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("cheap.onnx", "cheap.onnx", "--threads", "2", "--budget", "0.3") == 0
    out = capsys.readouterr().out
    assert "2 threads (spinning on during a run)" in out
    assert "cheap.onnx #2" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("", 2, "required"),
        ("cheap.onnx --batch 0", 2, "'0' is not a whole number of at least 1"),
        ("cheap.onnx --batch 1,x", 2, "'x' is not a whole number"),
        ("cheap.onnx --threads -1", 2, "--threads"),
        ("cheap.onnx --provider tpu", 2, "provider 'tpu' is unknown: use cpu, cuda, cuda-tf32"),
        ("cheap.onnx --shape x", 2, "'x' is not NAME=SIZES"),
        ("cheap.onnx --shape z=3", 2, "shape 'z'"),
        ("cheap.onnx --target 2", 2, "target_half_width (=2.0)"),
        ("cheap.onnx --budget 0", 2, "budget_s (=0.0)"),
        ("cheap.onnx --fast", 2, "--fast"),
        ("missing.onnx cheap.onnx", 3, "missing.onnx is not a file"),
        ("notes.onnx cheap.onnx", 3, "notes.onnx cannot be loaded as an ONNX model"),
        ("sequence.onnx", 4, "--shape x=batch,length,8"),
        ("cheap.onnx --json missing/out.json", 7, "missing/out.json cannot be written"),
        ("cheap.onnx --csv missing/out.csv", 7, "missing/out.csv cannot be written"),
        ("cheap.onnx --plot out.gif", 2, "figure 'out.gif' must end in .png, .svg or .pdf"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_an_exit_code(
    arguments: str, code: int, message: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments.split()) == code
    assert message in one_line(capsys)


def test_a_missing_provider_is_one_plain_line(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert command("cheap.onnx", "--provider", "cuda") == 2
    assert "provider 'cuda' is missing" in one_line(capsys)


def test_help_reads_from_anywhere_and_names_the_exit_codes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "exit codes:" in done.stdout
    assert "95% interval" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_onnxruntime_itself_prints_nothing_when_a_model_is_refused(files: Path) -> None:
    run = [sys.executable, str(TOOL), "notes.onnx"]
    done = subprocess.run(run, cwd=files, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
