"""The code in the documentation runs, links lead somewhere, tables are what the program says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sbp_compile import cli, errors

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*.md")])
README_SETUP = """
import torch
net, example = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.randn(2, 4)
"""


def code_of(page: Path) -> str:
    """All Python blocks of a page, at their own lines, so that a traceback points into the page."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


def run_code(code: str, folder: Path) -> None:
    """In a process of its own: what a page registers with torch and with the rules must not stay."""
    command = [sys.executable, "-W", "error::UserWarning:sbp_compile", "-c", code]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(folder)}
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_the_page_on_passes_runs(tmp_path: Path) -> None:
    run_code(code_of(ROOT / "docs" / "passes.md"), tmp_path)


def test_the_page_on_noise_runs(tmp_path: Path) -> None:
    run_code(code_of(ROOT / "docs" / "noise.md"), tmp_path)
    assert (tmp_path / "small.onnx").exists()


def test_the_readme_runs(tmp_path: Path) -> None:
    run_code(README_SETUP + code_of(ROOT / "README.md"), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["net.pt", "small.onnx"]


def test_the_first_example_on_passes_has_twenty_lines() -> None:
    text = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    block = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_exit_codes_are_the_same_everywhere() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    helped = {int(code) for code in re.findall(r"^  (\d+)  ", cli.EPILOG, re.MULTILINE)}
    raised = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    assert listed == helped == raised | {0, 130, 143}


def test_options_are_the_same_everywhere() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"--[a-z][a-z-]+", cli.build_parser().format_help()))
    assert shown - {"--help", "--version", "--output"} == set(re.findall(r"--[a-z][a-z-]+", page))


def test_the_readme_is_one_screen_to_the_first_result() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert (
        lines.index(
            "    make demo    # compiles a LeNet-5 that was trained this way on real digits, and times it "
            "before and after"
        )
        < 10
    )
    assert len(lines) < 60
