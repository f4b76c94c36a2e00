"""The report, for people (rich) and machines (dict): a row for each layer, totals, notes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from torch import fx

from passes.ir import schema
from passes.ir.analysis import Analysis
from passes.ir.cost import TRANSPOSED, Cost, count, macs_by_node
from passes.ir.pipeline import Note, Step
from passes.ir.program import Program
from passes.rules import OPAQUE, rule_for
from passes.rules.layer import SPATIAL_RANK
from sbp_compile.verify import Verification


@dataclass(frozen=True)
class Layer:
    """One layer with weights: its output channels and multiply-adds before and after.

    `masked`: output channels that nothing needs (constant or unread); `kept`: those in the small network;
    `reason`: why more were kept than had to be.
    """

    name: str
    kind: str
    channels: int
    masked: int
    kept: int
    inputs: int
    inputs_kept: int
    macs: int
    macs_kept: int
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """Everything the compiler has to say about one run; `seconds`: of each stage."""

    layers: tuple[Layer, ...]
    before: Cost
    after: Cost
    notes: tuple[Note, ...] = ()
    verification: Verification | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._layers()
        yield self._totals()
        if any(layer.reason for layer in self.layers):
            yield self._reasons()
        for note in self.notes:
            yield f"[dim]{escape(note.where)}: {escape(note.text)}[/dim]"
        if self.seconds:
            times = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
            yield f"[dim]{times}[/dim]"

    def _layers(self) -> Table:
        table = Table(box=SIMPLE, title="Output channels and multiply-adds (MACs) of each layer")
        table.title_justify = "left"
        table.add_column("layer", overflow="fold")
        for heading in ("channels", "masked", "kept", "MACs before", "MACs after"):
            table.add_column(heading, justify="right", no_wrap=True)
        for layer in self.layers:
            counts = (layer.channels, layer.masked, layer.kept, layer.macs, layer.macs_kept)
            table.add_row(escape(layer.name), *(f"{value:,}" for value in counts))
        return table

    def _reasons(self) -> Table:
        table = Table(box=SIMPLE, title="Why more channels were kept than had to be", title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("more", justify="right", no_wrap=True)
        table.add_column("why", overflow="fold")
        for layer in self.layers:
            if layer.reason:
                more = layer.kept - (layer.channels - layer.masked)
                table.add_row(escape(layer.name), f"{more:,}", escape(layer.reason))
        return table

    def _totals(self) -> Table:
        table = Table(box=SIMPLE)
        table.add_column("")
        for heading in ("before", "after", "ratio"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, first, second in (
            ("multiply-adds", self.before.macs, self.after.macs),
            ("parameters", self.before.parameters, self.after.parameters),
            ("weight bytes", self.before.bytes, self.after.bytes),
        ):
            table.add_row(name, f"{first:,}", f"{second:,}", f"{first / second:.2f}x" if second else "-")
        return table


def build_report(
    dense: Program,
    small: Program,
    steps: Sequence[Step],
    notes: Sequence[Note],
    *,
    verification: Verification | None,
    seconds: Mapping[str, float],
) -> Report:
    """Return the report of one run.

    `dense`: the plain architecture at full width; `steps`: what the pipeline did.
    """
    analyses = [
        step.after for step in steps if step.after.analysis is not None and step.name == "analyze_channels"
    ]
    rows = _layers(dense, small, analyses)
    untied = _untied_notes(steps[0].before, small) if steps else []
    notes = (*notes, *_opaque_notes(small), *untied)
    return Report(tuple(rows), count(dense), count(small), notes, verification, dict(seconds))


def _contractions(program: Program, names: Container[str] | None = None) -> dict[str, fx.Node]:
    """Return the layers with constant weights by name; of `names` also those behind which constants were added.

    What is added to a layer takes over its name.
    """
    found = {}
    for node in program.calls():
        layer = node
        while (
            names is not None
            and layer.target is torch.ops.aten.add.Tensor
            and isinstance(layer.args[0], fx.Node)
        ):
            layer = layer.args[0]
        if layer.target not in SPATIAL_RANK or (names is not None and node.name not in names):
            continue
        weight = program.held(layer.args[1])
        if weight is not None and len(weight.shape) >= 2:
            found[node.name] = layer
    return found


def _widths(program: Program, layer: fx.Node) -> tuple[int, int]:
    """Return (output channels, input channels of a group)."""
    weight = program.held(layer.args[1])
    assert weight is not None
    outputs, inputs = weight.shape[:2]
    if layer.target not in TRANSPOSED:
        return outputs, inputs
    groups = schema.bind(layer)["groups"]
    return inputs * groups, outputs // groups


Analysed = tuple[Program, Mapping[str, fx.Node]]


def _layers(dense: Program, small: Program, programs: Sequence[Program]) -> list[Layer]:
    analyses = [(program, {node.name: node for node in program.calls()}) for program in programs]
    before = _contractions(dense)
    after = _contractions(small, before)
    macs, macs_after = macs_by_node(dense), macs_by_node(small)
    rows = []
    for name, layer in before.items():
        channels, inputs = _widths(dense, layer)
        left = after.get(name)
        kept, inputs_kept = (0, 0) if left is None else _widths(small, left)
        masked, reason = _explained(layer, channels, kept, analyses)
        rows.append(
            Layer(
                layer.meta.get("module") or name,
                str(layer.target).split(".")[1],
                channels,
                masked,
                kept,
                inputs,
                inputs_kept,
                macs.get(name, 0),
                0 if left is None else macs_after.get(left.name, 0),
                reason,
            )
        )
    return rows


def _explained(layer: fx.Node, channels: int, kept: int, analyses: Sequence[Analysed]) -> tuple[int, str]:
    """Return (how many output channels were not needed, why more than needed were kept)."""
    reasons: dict[str, int] = {}
    target: Any = layer.target
    masked, rank = 0, SPATIAL_RANK[target]
    for program, nodes in analyses:
        node = nodes.get(layer.name)
        assert isinstance(program.analysis, Analysis)
        if node is None or node not in program.infos:
            break
        axis = program.infos[node].rank - 1 - rank
        needed = program.analysis.keep.needed(node.name, axis)
        weight = program.held(node.args[1])
        if needed is None or weight is None:
            break
        masked = max(masked, channels - needed)
        reasons = {} if kept <= needed else dict(program.analysis.keep.reasons(node.name, axis))
    text = ", ".join(f"{number} for {why}" for why, number in reasons.items())
    return masked, text if kept > channels - masked else ""


def _untied_notes(original: Program, small: Program) -> list[Note]:
    """Return one note for each constant with several readers that now has a version for some of them."""
    constants = (node for node in original.graph.nodes if node.op == "get_attr")
    uses = Counter(str(node.target) for node in constants for _ in node.users)
    notes = []
    for name, readers in uses.items():
        version = re.compile(rf"{re.escape(name)}(_\d+)?")
        own = [other for other in small.constants if other == name or other not in uses]
        written = sum(version.fullmatch(other) is not None for other in own)
        if readers > 1 and written > 1:
            text = f"its {readers} readers no longer need the same part of it: it is written {written} times"
            notes.append(Note(name, text))
    return notes


def _is_opaque(program: Program, node: fx.Node) -> bool:
    return node in program.infos and rule_for(program.op(node)) is OPAQUE


def _opaque_notes(program: Program) -> list[Note]:
    """Return one note for each operator that has no rule, with how often it occurs."""
    calls = {program.op(node).source for node in program.calls() if _is_opaque(program, node)}
    counts = Counter(str(node.target) for node in program.calls() if node in calls)
    return [
        Note(
            target,
            f"no rule covers it: its inputs and results keep their full width ({number} in the network)",
        )
        for target, number in counts.items()
    ]
