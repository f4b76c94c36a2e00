"""Change the passes in small ways and count how many of the changes the tests notice.

    python tools/mutation.py [--mutants N] [--seed S] [--jobs J] [--only PATH] [--write]

Mutants (tools/mutants.py) of passes/rules and passes/ir are drawn at random; each is tried in a process of its own that
is forked from one where torch is loaded already. It imports the changed module in the place of the real one and runs
the tests of that module: the three laws for a few overloads of every rule class that it serves, and the test files
named after it and in EXTRA. A mutant is killed when a test fails (or takes five times as long). What survives these
meets tests of whole networks (NETWORKS); what survives them too is listed.
"""

from __future__ import annotations

import argparse
import ast
import collections
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from mutants import Mutant, mutants_of, mutated

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "mutation.md"
FOLDERS = ("passes/rules", "passes/ir")
WARM = ("torch", "torch.export", "torch.onnx", "onnx", "onnxruntime", "onnx_graphsurgeon", "pytest")
LAWS = (
    "test_what_forward_claims_known_is_known",
    "test_what_backward_calls_dead_changes_nothing_live",
    "test_the_rewritten_op_gives_the_kept_entries",
)
LONGEST = 400.0
FALLBACK = "tests/passes/test_shrinking.py"
NETWORKS = (
    "tests/passes/test_shrinking.py",
    "tests/passes/test_regressions.py",
    "tests/passes/test_soundness.py",
    "tests/passes/test_choose_widths.py",
    "tests/test_fixpoint.py",
    "tests/zoo",
    "tests/fuzz",
)
PER_CLASS = 2
EXTRA = {
    "passes/rules/absorption.py": ("tests/passes/test_shrinking.py",),
    "passes/rules/layer.py": ("tests/passes/test_shrinking.py",),
    "passes/rules/contraction.py": ("tests/passes/test_shrinking.py",),
    "passes/ir/basis.py": ("tests/passes/test_shrinking.py",),
    "passes/ir/analysis.py": ("tests/passes/test_soundness.py",),
    "passes/ir/rewriter.py": ("tests/passes/test_soundness.py",),
    "passes/ir/program.py": ("tests/passes/test_soundness.py",),
    "passes/ir/cost.py": ("tests/passes/test_separate_edges.py",),
    "passes/ir/pipeline.py": ("tests/passes/test_pipeline.py",),
}


@dataclass
class Score:
    """What became of the mutants of one module."""

    killed: int = 0
    late: int = 0
    slow: int = 0
    survivors: list[Mutant] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.killed + self.late + self.slow + len(self.survivors)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--mutants", type=int, default=300, metavar="N", help="drawn at random (default 300)")
    made.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw (default 0)")
    made.add_argument("--jobs", type=int, default=1, metavar="J", help="processes at a time (default 1)")
    made.add_argument("--only", default="", metavar="PATH", help="only modules whose paths contain this")
    made.add_argument("--write", action="store_true", help="write docs/results/mutation.md")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 where the tests fail without any change."""
    options = parser().parse_args(arguments)
    os.chdir(ROOT)
    paths = [
        str(path.relative_to(ROOT)) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))
    ]
    everything = [
        mutant
        for path in paths
        if options.only in path
        for mutant in mutants_of(path, Path(path).read_text("utf-8"))
    ]
    drawn = random.Random(options.seed).sample(everything, min(options.mutants, len(everything)))
    tests = {path: tests_of(path, paths) for path in sorted({mutant.path for mutant in drawn})}
    start = time.perf_counter()
    warm_up()
    print(
        f"{len(everything)} mutants in all, {len(drawn)} drawn; torch loaded in {time.perf_counter() - start:.0f} s"
    )
    seconds = baseline(tests, options.jobs)
    if seconds is None:
        return 1
    scores = score(drawn, tests, seconds, options.jobs)
    print(table(scores))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{time.perf_counter() - start:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of them computing")
    if options.write:
        RESULT.write_text(document(scores, len(everything), options), encoding="utf-8")
    return 0


def warm_up() -> None:
    """Load what the tests need and no module of ours; a first export loads the rest of torch."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in WARM:
        importlib.import_module(name)
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)).run_decompositions({})


def tests_of(path: str, paths: Sequence[str]) -> list[str]:
    """The arguments for pytest, quick ones first: the laws, the module's own tests, those named in EXTRA."""
    folder = Path(path).parent.name
    laws = [
        f"tests/passes/rules/test_laws.py::{law}[{overload}]"
        for overload in law_overloads(dependents(path, paths), 1 if folder == "ir" else PER_CLASS)
        for law in LAWS
    ]
    own = f"tests/passes/{folder}/test_{Path(path).stem}.py"
    files = dict.fromkeys(name for name in (own, *EXTRA.get(path, ())) if Path(name).exists())
    return [*laws, *files] or [FALLBACK]


def dependents(path: str, paths: Iterable[str]) -> list[str]:
    """The module and those that import it, directly or not."""
    imports = {other: _imported(other) for other in paths if not other.endswith("__init__.py")}
    found, fresh = [path], [path]
    while fresh:
        name = fresh.pop().removesuffix(".py").replace("/", ".")
        more = [other for other, names in imports.items() if name in names and other not in found]
        found += more
        fresh += more
    return found


def _imported(path: str) -> set[str]:
    nodes = ast.walk(ast.parse(Path(path).read_text("utf-8")))
    return {
        name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    }


def law_overloads(served: Sequence[str], per_class: int) -> list[str]:
    """A few overloads of every rule class that lives in one of the modules."""
    code = (
        "import json; from passes.rules import registered_rules; "
        "print(json.dumps([[str(op), type(r).__module__, type(r).__name__] for op, r in registered_rules().items()]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    by_class: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for overload, module, name in json.loads(found.stdout):
        if module.replace(".", "/") + ".py" in served:
            by_class[module, name].append(overload)
    source = random.Random(0)
    return [
        overload
        for names in by_class.values()
        for overload in source.sample(sorted(names), min(per_class, len(names)))
    ]


class Replacement(importlib.machinery.SourceFileLoader):
    """Loads one module from a changed tree; nothing is written to a cache."""

    tree: ast.Module

    def get_code(self, fullname: str) -> CodeType:
        """Compile the changed tree."""
        return compile(self.tree, self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    """Finds the changed module before the real one is found."""

    def __init__(self, mutant: Mutant) -> None:
        name = mutant.path.removesuffix(".py").replace("/", ".")
        self.name = name.removesuffix(".__init__")
        self.path = str(ROOT / mutant.path)
        self.tree = mutated(Path(self.path).read_text("utf-8"), mutant.number)

    def find_spec(
        self, fullname: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Give the changed module for its own name, nothing for any other."""
        if fullname != self.name:
            return None
        loader = Replacement(fullname, self.path)
        loader.tree = self.tree
        return importlib.machinery.ModuleSpec(fullname, loader, origin=self.path)


def start_tests(mutant: Mutant | None, tests: Sequence[str]) -> int:
    """Fork a process that runs tests against a mutant (None: no change) and exits with 0 where all pass."""
    process = os.fork()
    if process:
        return process
    try:
        sink = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(sink, stream)
        sys.path.insert(0, str(ROOT))
        if mutant is not None:
            sys.meta_path.insert(0, Finder(mutant))
        pytest = importlib.import_module("pytest")
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        os._exit(int(code != 0))
    except BaseException:
        os._exit(1)


def run_all(
    mutants: Sequence[Mutant | str],
    tests: Mapping[str, Sequence[str]],
    limits: Mapping[str, float],
    jobs: int,
) -> Iterator[tuple[Any, int | None, float]]:
    """Each mutant (or path of a module without a change), the exit code of its tests (None: too slow), its seconds."""
    waiting, running = list(reversed(mutants)), dict[int, tuple[Mutant | str, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            path = mutant if isinstance(mutant, str) else mutant.path
            running[start_tests(None if isinstance(mutant, str) else mutant, tests[path])] = (
                mutant,
                time.perf_counter(),
            )
        time.sleep(0.02)
        for process, (mutant, began) in list(running.items()):
            taken = time.perf_counter() - began
            limit = limits.get(mutant if isinstance(mutant, str) else mutant.path, LONGEST)
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended or taken > limit:
                if not ended:
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                del running[process]
                yield mutant, os.waitstatus_to_exitcode(status) if ended else None, taken


def baseline(tests: Mapping[str, Sequence[str]], jobs: int) -> dict[str, float] | None:
    """Seconds that the tests of each module take without any change; None where some fail."""
    seconds, failed = {}, []
    for path, outcome, taken in run_all(list(tests), tests, {}, jobs):
        seconds[path] = taken
        if outcome != 0:
            failed.append(path)
        print(f"  {path}: {len(tests[path])} selections, {taken:.1f} s", flush=True)
    if failed:
        print(f"the tests fail without any change: {', '.join(failed)}", file=sys.stderr)
    return None if failed else seconds


def score(
    drawn: Sequence[Mutant], tests: Mapping[str, Sequence[str]], seconds: Mapping[str, float], jobs: int
) -> dict[str, Score]:
    """Try every mutant; those that survive the tests of their module meet whole networks."""
    scores = {path: Score() for path in tests}
    left = []
    for mutant, outcome, _ in run_all(drawn, tests, _limits(seconds), jobs):
        held = scores[mutant.path]
        if outcome is None:
            held.slow += 1
        elif outcome:
            held.killed += 1
        else:
            left.append(mutant)
            print(f"survived its own tests: {mutant}", flush=True)
    whole = dict.fromkeys(tests, NETWORKS)
    for mutant, outcome, _ in run_all(left, whole, dict.fromkeys(tests, LONGEST), jobs):
        held = scores[mutant.path]
        if outcome:
            held.late += 1
        else:
            held.survivors.append(mutant)
            print(f"survived{'' if outcome == 0 else ' until the time was up'}: {mutant}", flush=True)
    return scores


def _limits(seconds: Mapping[str, float]) -> dict[str, float]:
    return {path: 5 * taken + 10 for path, taken in seconds.items()}


def table(scores: Mapping[str, Score]) -> str:
    """One line for each module and one for all."""
    lines = [
        "| module | mutants | killed | by whole networks | too slow | survived | noticed |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = Score()
    for path, held in scores.items():
        lines.append(_line(path, held))
        whole.killed += held.killed
        whole.late += held.late
        whole.slow += held.slow
        whole.survivors += held.survivors
    return "\n".join([*lines, _line("all", whole)])


def _line(name: str, held: Score) -> str:
    share = 1 - len(held.survivors) / held.total if held.total else 1.0
    numbers = (held.total, held.killed, held.late, held.slow, len(held.survivors))
    return f"| {name} | {' | '.join(map(str, numbers))} | {share:.0%} |"


HEADER = """\
# Mutation testing

Small changes of passes/rules and passes/ir, and whether the tests of the changed module notice: {drawn} mutants drawn
from {total} (seed {seed}). What a mutant may be: tools/mutants.py. Which tests it meets: the three laws for a few
overloads of each rule class that the module serves, and the test files named after it or in EXTRA of tools/mutation.py
(FALLBACK where there are none). What survives these meets tests of whole networks (NETWORKS there) for {longest:g}
seconds at most; what is listed may still be noticed by the rest of the suite.

Command: `python tools/mutation.py --mutants {drawn} --seed {seed} --write`

"""


def document(scores: Mapping[str, Score], total: int, options: argparse.Namespace) -> str:
    """docs/results/mutation.md."""
    drawn = sum(held.total for held in scores.values())
    survivors = [f"- `{mutant}`" for held in scores.values() for mutant in held.survivors]
    head = HEADER.format(drawn=drawn, total=total, seed=options.seed, longest=LONGEST)
    return head + table(scores) + "\n\n## Survivors\n\n" + "\n".join(survivors or ["None."]) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
