import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SOURCE = '''
def f(x: int | None, flag: bool = True) -> int:
    """Not this 1."""
    assert x > 1, "nor that"
    if flag and x < 3:
        x.append(2)
    return -x if any(x) else x & 7
'''


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("mutants")


@pytest.fixture
def mutation(mutants):
    return importlib.import_module("mutation")


def test_every_mutant_differs_from_its_module_in_one_place(mutants):
    original = ast.unparse(ast.parse(SOURCE)).splitlines()
    found = mutants.mutants_of("f.py", SOURCE)
    assert len({ast.unparse(mutants.mutated(SOURCE, mutant.number)) for mutant in found}) == len(found)
    for mutant in found:
        lines = ast.unparse(mutants.mutated(SOURCE, mutant.number)).splitlines()
        assert sum(one != other for one, other in zip(original, lines, strict=True)) == 1


def test_comparisons_operators_numbers_flags_and_calls_change(mutants):
    changes = {(mutant.before, mutant.after) for mutant in mutants.mutants_of("f.py", SOURCE)}
    assert ("x < 3", "x <= 3") in changes
    assert ("flag and x < 3", "flag or x < 3") in changes
    assert ("x & 7", "x | 7") in changes
    assert ("7", "8") in changes
    assert ("True", "False") in changes
    assert ("any", "all") in changes
    assert ("x.append(2)", "pass") in changes


def test_annotations_texts_and_assertions_stay(mutants):
    befores = {mutant.before for mutant in mutants.mutants_of("f.py", SOURCE)}
    assert not befores & {"int | None", "'Not this 1.'", "x > 1"}


def test_a_mutant_says_where_it_is(mutants):
    [mutant] = mutants.mutants_of("passes/x.py", "a = 1\nb = c == d\n")[1:]
    assert str(mutant) == "passes/x.py:2: c == d  ->  c != d"


def test_the_changed_module_is_found_in_the_place_of_the_real_one(mutation, monkeypatch):
    path = "passes/ir/errors.py"
    monkeypatch.setattr(mutation, "mutated", lambda source, number: ast.parse("changed = True"))
    finder = mutation.Finder(mutation.Mutant(path, 0, 1, "", ""))
    spec = finder.find_spec("passes.ir.errors", None)
    assert finder.find_spec("passes.ir.keep", None) is None
    assert importlib.util.module_from_spec(spec).__name__ == "passes.ir.errors"
    namespace = {}
    exec(spec.loader.get_code("passes.ir.errors"), namespace)
    assert namespace["changed"]


def test_a_module_is_served_by_those_that_import_it(mutation, monkeypatch):
    monkeypatch.chdir(ROOT)
    paths = [str(path.relative_to(ROOT)) for path in (ROOT / "passes" / "rules").glob("*.py")]
    assert "passes/rules/window.py" in mutation.dependents("passes/rules/spatial.py", paths)
    assert "passes/rules/view.py" not in mutation.dependents("passes/rules/spatial.py", paths)
