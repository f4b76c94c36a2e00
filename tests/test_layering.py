"""Imports point one way, read from the source of every file (imports inside functions count too)."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each part may import those before it and, within a folder, its own files.
LAYERS = (
    "passes.ir",
    "passes.rules",
    "passes.spellings",
    "passes.spell_products",
    "passes.spell_pieces",
    "passes.placements",
    "passes.unstack",
    "passes.formulas",
    "passes.canonicalize",
    "passes.separate_axes",
    "passes.compose_readings",
    "passes.affine",
    "passes.commute",
    "passes.fold_scales",
    "passes.reorder",
    "passes.fold_permutations",
    "passes.merge_parallel",
    "passes.merge_serial",
    "passes.merge_normalized",
    "passes.analyze_channels",
    "passes.align_heads",
    "passes.lay_out_constants",
    "passes.absorb_constants",
    "passes.shrink_channels",
    "passes.adapters",
    "passes.separate_positions",
    "passes.separate_edges",
    "passes.settle_norms",
    "passes.remove_dead",
    "passes.targets",
    "passes.network",
    "passes.choose_widths",
    "passes",
    "sbp_compile.errors",
    "sbp_compile.atomic",
    "sbp_compile.json_file",
    "sbp_compile.output_options",
    "sbp_compile.sharding",
    "sbp_compile.timing",
    "sbp_compile.capture",
    "sbp_compile.emit",
    "sbp_compile.tuning",
    "sbp_compile.verify",
    "sbp_compile.verify_half",
    "sbp_compile.verify_reader",
    "sbp_compile.verify_inputs",
    "sbp_compile.verify_int8",
    "sbp_compile.save",
    "sbp_compile.recipe_layers",
    "sbp_compile.recipe_masks",
    "sbp_compile.recipe_file",
    "sbp_compile.recipe",
    "sbp_compile.refill",
    "sbp_compile.baseline",
    "sbp_compile.report",
    "sbp_compile.compiler",
    "sbp_compile.nn",
    "sbp_compile.training",
    "sbp_compile.interruption",
    "sbp_compile.cli_output",
    "sbp_compile.model_options",
    "sbp_compile.tuning_options",
    "sbp_compile.cli",
    "sbp_compile.__main__",
    "sbp_compile",
)
# What trains models and what times files stands apart: the compiler proper needs neither.
APART = ("sbp_compile.nn", "sbp_compile.training", "sbp_compile.timing", "sbp_compile.tuning")


def find_modules() -> dict[str, Path]:
    files = [path for package in ("passes", "sbp_compile") for path in (ROOT / package).rglob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


MODULES = find_modules()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_in(node: ast.AST, *, with_types: bool) -> set[str]:
    """Dotted names of imported modules."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child) and not with_types:
            continue
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            names = {f"{child.module}.{alias.name}" for alias in child.names}
            submodules = names & MODULES.keys()
            found |= submodules | ({str(child.module)} if names - submodules else set())
        else:
            found |= imports_in(child, with_types=with_types)
    return found


def imports_of(module: str, *, with_types: bool = True) -> set[str]:
    return imports_in(ast.parse(MODULES[module].read_text(encoding="utf-8")), with_types=with_types)


def layer_of(module: str) -> str:
    parts = module.split(".")
    candidates = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next(
        name
        for name in candidates
        if name in LAYERS and (name not in {"passes", "sbp_compile"} or name == module)
    )


def own(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] in {"passes", "sbp_compile"}}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_import_points_to_a_lower_layer(module: str) -> None:
    rank = LAYERS.index(layer_of(module))
    upward = {
        name for name in own(imports_of(module, with_types=False)) if LAYERS.index(layer_of(name)) > rank
    }
    assert not upward


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.split(".")[0] == "passes"))
def test_the_passes_need_torch_and_nothing_else(module: str) -> None:
    packages = {name.split(".")[0] for name in imports_of(module)}
    assert packages - set(sys.stdlib_module_names) <= {"passes", "torch"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_the_tests_or_the_tools(module: str) -> None:
    assert not {name.split(".")[0] for name in imports_of(module)} & {"tests", "tools"}


def test_no_imports_go_round_in_a_circle() -> None:
    graph = {module: own(imports_of(module, with_types=False)) - {module} for module in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(MODULES) <= set(order)


def test_the_compiler_needs_no_training_and_no_timing() -> None:
    for module in MODULES:
        if layer_of(module) not in {*APART, "sbp_compile.tuning_options", "sbp_compile.cli"}:
            assert not {layer_of(name) for name in own(imports_of(module))} & set(APART), module
