"""Damaged and hostile files of every format: a network or one line of ours, in 10 s and 2 GB, and nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource")
ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "fuzz_files.py"
FORMATS = (
    "pt2", "model-file", "torchscript", "state-dict", "old-state-dict", "safetensors", "onnx", "inputs", "calibration",
    "recipe", "tuning",
)  # fmt: skip
ARRAYS = ("twice", "big-endian", "a path", "a long name", "an odd name", "packed by others")
READ_ALL_THE_SAME = {
    *(f"{kind}:crafted:twice" for kind in FORMATS[:4]),  # an archive behind an archive: the last one counts
    "onnx:crafted:names",
    *(f"{kind}:crafted:{name}" for kind in ("inputs", "calibration") for name in ARRAYS),
    *(f"inputs:crafted:{name}" for name in ("names", "not a number", "infinite")),
    *(f"recipe:crafted:{name}" for name in ("flat", "all off")),
}
# Mutants that once found a defect, by their names, and the exit code of each now
FOUND = {
    "old-state-dict:crafted:claim": 3,
    "old-state-dict:crafted:negative": 3,
    "inputs:crafted:a text beside": 4,
    "inputs:crafted:no size": 4,
    "inputs:crafted:packed claim": 4,
    "recipe:crafted:infinite number": 2,
    "recipe:crafted:many numbers": 2,
}


def judged(folder: Path, *options: str, seconds: float) -> list[dict[str, Any]]:
    """Run the tool in a process of its own; it watches time and memory of each file."""
    command = [sys.executable, str(TOOL), "--json", str(folder / "found.json"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=seconds
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads((folder / "found.json").read_text())
    assert all(entry["seconds"] < (10 if entry["code"] else 60) and entry["memory"] < 2e9 for entry in found)
    return found


def named(*names: str) -> list[str]:
    return [argument for name in names for argument in ("--name", name)]


def test_files_that_once_found_a_defect_are_refused(tmp_path: Path) -> None:
    found = judged(tmp_path, *named(*FOUND, "onnx:flip:0"), seconds=120)
    codes = {entry["name"]: entry["code"] for entry in found}
    assert {name: codes[name] for name in FOUND} == FOUND
    messages = {entry["name"]: entry["message"] for entry in found}
    assert "needs 100000000000 bytes" in messages["old-state-dict:crafted:claim"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_random_damage_and_crafted_files_find_no_defect(kind: str, tmp_path: Path) -> None:
    found = judged(tmp_path, "--format", kind, "--flips", "100", "--seed", "7", seconds=600)
    assert {entry["defect"] for entry in found} == {""}
    refused = {entry["name"] for entry in found if entry["code"]}
    read = {entry["name"] for entry in found if ":crafted:" in entry["name"]} - refused
    assert read == {name for name in READ_ALL_THE_SAME if name.startswith(f"{kind}:")}
    assert any(":flip:" in name for name in refused)
