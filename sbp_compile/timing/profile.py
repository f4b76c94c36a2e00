"""Where the time of a run goes: onnxruntime's own profile, by operator and by node."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from sbp_compile.timing.inputs import Shapes, make_inputs
from sbp_compile.timing.session import Model, Runner, declared_inputs, open_session

WARM_UP_RUNS = 3
RUNS = 30
SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class NodeTime:
    """Median seconds of one node of the graph that onnxruntime runs, which is not quite the one in the file."""

    name: str
    operator: str
    seconds: float


@dataclass(frozen=True)
class Profile:
    """The nodes of a model, the dearest first; profiling itself adds about a microsecond to each."""

    model: str
    nodes: tuple[NodeTime, ...]

    def by_operator(self) -> dict[str, float]:
        """Seconds of all nodes of each operator, the dearest first."""
        total: Counter[str] = Counter()
        for node in self.nodes:
            total[node.operator] += node.seconds  # type: ignore[assignment]  # counters count floats as well
        return dict(total.most_common())


def profile(
    name: str,
    model: Model,
    *,
    batch: int = 1,
    threads: int = 1,
    provider: str = "cpu",
    shapes: Shapes | None = None,
    seed: int = 0,
    runs: int = RUNS,
) -> Profile:
    """Run a model with onnxruntime's profiler on; raises as `compare` does."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(
            name, model, provider=provider, threads=threads, profile=Path(folder) / "profile"
        )
        inputs = make_inputs(name, declared_inputs(session), batch=batch, shapes=shapes or {}, seed=seed)
        runner = Runner(name, session, inputs, provider)
        runner.first_run()
        runner.seconds_per_run(WARM_UP_RUNS + runs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return Profile(name, _nodes(events, runs))


def _nodes(events: Sequence[Mapping[str, Any]], runs: int) -> tuple[NodeTime, ...]:
    """Median over the last runs of each node; durations are given in microseconds."""
    found: dict[str, tuple[str, list[float]]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith(SUFFIX):
            name = str(event["name"]).removesuffix(SUFFIX)
            found.setdefault(name, (str(event["args"]["op_name"]), []))[1].append(event["dur"] * 1e-6)
    nodes = [
        NodeTime(name, operator, statistics.median(times[-runs:]))
        for name, (operator, times) in found.items()
    ]
    return tuple(sorted(nodes, key=lambda node: -node.seconds))


def profile_table(profiles: Sequence[Profile]) -> Table:
    """A row for each operator, a column for each model: microseconds, and how many nodes."""
    table = Table(title="time by operator, us (nodes)", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("operator", overflow="fold")
    for entry in profiles:
        table.add_column(escape(entry.model), justify="right", no_wrap=True)
    times = [entry.by_operator() for entry in profiles]
    operators = dict.fromkeys(operator for found in times for operator in found)
    for operator in sorted(operators, key=lambda name: -max(found.get(name, 0.0) for found in times)):
        cells = [_cell(entry, operator) for entry in profiles]
        table.add_row(escape(operator), *cells)
    totals = [f"{sum(found.values()) * 1e6:,.1f}" for found in times]
    table.add_row("all", *totals)
    return table


def _cell(entry: Profile, operator: str) -> str:
    chosen = [node.seconds for node in entry.nodes if node.operator == operator]
    return f"{sum(chosen) * 1e6:,.1f} ({len(chosen)})" if chosen else ""
