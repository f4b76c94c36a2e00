"""docs/dependencies.md names every dependency at the version that constraints.txt pins."""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
OF_ITS_OWN = {"sbp-compile"}
IN_THE_MAKEFILE = {"onnxruntime-gpu"}  # it would replace onnxruntime, so it cannot be pinned beside it


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    texts = [text for entries in lists for text in entries]
    return {plain(re.split(r"[\[<>=!~ ;]", text)[0]) for text in texts} - OF_ITS_OWN


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {plain(name): version for name, version in pairs}


def on_the_page(text: str) -> dict[str, str]:
    """Names and versions: of the tables, and of the sentences that list what packages bring."""
    rows = re.findall(r"^\| ([\w.-]+) \| (\d[\w.]*)", text, re.MULTILINE)
    listed = re.findall(r"([A-Za-z][\w.-]*)\s(\d[\w.]*)\s\(", text)
    return {plain(name): version for name, version in (*rows, *listed)}


def missing(names: Iterable[str], held: Iterable[str]) -> list[str]:
    return sorted(set(names) - set(held))


def test_every_dependency_is_on_the_page() -> None:
    assert missing(declared(), on_the_page(PAGE)) == []


def test_every_dependency_is_pinned() -> None:
    assert missing(declared() - IN_THE_MAKEFILE, pinned()) == []


def test_the_page_and_the_constraints_name_the_same_packages_and_versions() -> None:
    held = {name: version for name, version in on_the_page(PAGE).items() if name not in IN_THE_MAKEFILE}
    assert held == pinned()


@pytest.mark.parametrize("name", ["torch", "Jinja2", "pluggy"])
def test_a_package_that_is_not_on_the_page_is_noticed(name: str) -> None:
    text = re.sub(rf"(?m)(^\| |\b){name}(?= \|| \d)", "", PAGE)
    assert missing(pinned(), on_the_page(text)) == [plain(name)]
