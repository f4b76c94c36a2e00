"""One network of the zoo, masked at one place: captured once, then compiled and measured for each share of masks."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from bound import Bound, bounds, layer_macs, layers
from torch import Tensor, fx, nn

from passes import Pipeline, Program, Step, default_pipeline
from passes.ir.pipeline import Callback
from passes.rules import OPAQUE, rule_for
from sbp_compile.capture import export_module
from sbp_compile.capture.call import captured_call
from sbp_compile.compiler import Compiled, compile_exported
from sbp_compile.nn import LogNormalNoise, noise_layers

STANDS_FOR = "stands for the constants that"
UNEXPLAINED = "needed, says the analysis"
UNKNOWN = "a layer that the original does not have"


@dataclass(frozen=True)
class Task:
    """A network and a place for its noise, at every share of masked units."""

    network: str
    placement: str
    shares: tuple[float, ...]
    seed: int
    onnx_shares: tuple[float, ...]


@dataclass(frozen=True)
class Excess:
    """One layer that costs more than its bound, and why: (reason, channels) on either side."""

    layer: str
    kind: str
    macs: int
    bound: float
    inputs: str
    outputs: str
    reasons: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Row:
    """Everything measured at one network, placement and share; `failure`: why the rest is missing.

    `macs`, `parameters`: the whole network before and after; `layer_macs`: of the layers that have a bound, dense
    and compiled; `bound`: theirs. `kept`: output channels kept although masked, by reason. `opaque`: operators without
    a rule in the compiled network.
    """

    network: str
    family: str
    placement: str
    share: float
    failure: str = ""
    float64_error: float = 0.0
    file_error: float | None = None
    file_tolerance: float | None = None
    macs: tuple[int, int] = (0, 0)
    parameters: tuple[int, int] = (0, 0)
    layer_macs: tuple[int, int] = (0, 0)
    bound: float = 0.0
    kept: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    opaque: dict[str, int] = field(default_factory=dict)
    excess: tuple[Excess, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def gap(self) -> float:
        """How much more than the bound the compiled layers cost; 0.05 is 5%."""
        if self.layer_macs[1] == self.bound:
            return 0.0
        return self.layer_macs[1] / self.bound - 1 if self.bound else float("inf")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gap": self.gap}


class Scale(nn.Module):
    """A noise layer as it is in eval mode: a multiplication by a constant for each feature, 0 where masked."""

    def __init__(self, layer: LogNormalNoise) -> None:
        super().__init__()
        self.dim = layer.dim
        self.mean: Tensor
        self.register_buffer("mean", torch.where(layer.mask(), layer.mean(), 0.0).detach())

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.dim] = -1
        return x * self.mean.view(shape)


def freeze_noise(network: nn.Module) -> int:
    """Replace every noise layer by its constant, whose arithmetic would fill most of the graph; returns how many."""
    scales = {layer: Scale(layer) for layer in noise_layers(network)}
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LogNormalNoise):
                setattr(module, name, scales[child])
    return len(scales)


@dataclass(frozen=True)
class Watched(Pipeline):
    """A pipeline that shows its steps to one more callback than the compiler's own."""

    watcher: Callback = print

    def with_callback(self, callback: Callback) -> Pipeline:
        def both(step: Step) -> None:
            callback(step)
            self.watcher(step)

        return super().with_callback(both)


def measure(task: Task) -> Iterator[Row]:
    """The rows of a task, one for each share; nothing is raised."""
    from tests.zoo import ZOO, masked_network

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    architecture = ZOO[task.network]
    network: nn.Module | None = None
    for share in task.shares:
        row = Row(task.network, architecture.family, task.placement, share)
        try:
            masked = masked_network(architecture, task.placement, share, task.seed)
            if not freeze_noise(masked):
                return
            if network is None:
                network, args = masked, architecture.example()
                exported = export_module(network, args, dynamic_batch=architecture.dynamic_batch)
                call = captured_call(exported, args, {})
            network.load_state_dict(
                masked.state_dict()
            )  # in place: the exported program reads the same memory
            steps: list[Step] = []
            compiled = compile_exported(
                exported,
                call,
                call.tensors(args, {}),
                own=network,
                pipeline=Watched(default_pipeline().passes, watcher=steps.append),
            )
            if share in task.onnx_shares:
                with tempfile.TemporaryDirectory() as folder:
                    compiled.save(Path(folder) / "small.onnx")
            yield measured(row, compiled, steps, task.seed)
        except Exception as error:  # one network's failure is a row
            yield failed(row, f"{type(error).__name__}: {error}")


def failed(row: Row, reason: str) -> Row:
    """The row of a network that did not get through."""
    lines = [line for line in reason.strip().splitlines() if line.strip()]
    return Row(row.network, row.family, row.placement, row.share, failure=lines[0] if lines else "failed")


def measured(row: Row, compiled: Compiled, steps: Sequence[Step], seed: int) -> Row:
    """The row of a compiled network."""
    report, proof = compiled.report, compiled.report.verification
    assert proof is not None
    reasons = reasons_by_layer([step.after for step in steps if step.name == "analyze_channels"])
    layer_bounds = bounds(compiled.original, compiled.examples, seed)
    small = layer_macs(compiled.program)
    needed = {bound.name: bound.needed for bound in layer_bounds}
    for name, extra in standing_outputs(layer_bounds, reasons).items():
        needed[name] += extra
    return Row(
        row.network,
        row.family,
        row.placement,
        row.share,
        "",
        proof.float64_error,
        proof.file_error,
        proof.file_tolerance,
        (report.before.macs, report.after.macs),
        (report.before.parameters, report.after.parameters),
        (sum(bound.macs for bound in layer_bounds), sum(small.values())),
        sum(needed.values()),
        kept_although_masked(compiled),
        dict(report.seconds),
        opaque_operators(compiled.program),
        tuple(excesses(layer_bounds, needed, compiled.program, reasons)),
        tuple(f"{note.where}: {note.text}" for note in report.notes),
    )


def kept_although_masked(compiled: Compiled) -> dict[str, int]:
    """Output channels that nothing needs and that are there all the same, by the report's reasons."""
    told = [
        (why, int(number))
        for layer in compiled.report.layers
        for number, why in re.findall(r"(\d+) for (.+?)(?=, \d+ for |$)", layer.reason)
    ]
    return dict(added_up(told))


def without_numbers(why: str) -> str:
    """A reason with the operators it names, but not which of them."""
    return re.sub(r"_\d+(?=\b|_)", "", why)


def opaque_operators(program: Program) -> dict[str, int]:
    """Operators without a rule, with how often they occur."""
    found = Counter(
        str(node.target)
        for node in program.calls()
        if node in program.infos and rule_for(program.op(node)) is OPAQUE
    )
    return dict(found.most_common())


@dataclass(frozen=True)
class Reasons:
    """Why a layer keeps input and output channels beyond the necessary ones: (reason, how many)."""

    inputs: list[tuple[str, int]] = field(default_factory=list)
    outputs: list[tuple[str, int]] = field(default_factory=list)


def reasons_by_layer(analyses: Sequence[Program]) -> dict[str, Reasons]:
    """The reasons of every layer, from the last analysis that has it."""
    found: dict[str, Reasons] = {}
    for program in analyses:
        for shape in layers(program):
            found[shape.node.name] = Reasons(
                _reasons(program, shape.x, shape.x_axis), _reasons(program, shape.node, shape.y_axis)
            )
    return found


def _reasons(program: Program, node: fx.Node, axis: int) -> list[tuple[str, int]]:
    keep = program.analysed().keep
    axis %= program.infos[node].rank
    needed = keep.needed(node.name, axis)
    if needed is None or keep.count(node, axis) <= needed:
        return []
    return keep.reasons(node.name, axis)


def standing_outputs(layer_bounds: Sequence[Bound], reasons: Mapping[str, Reasons]) -> dict[str, float]:
    """Multiply-adds for making the channels that stand for constants, by the layer that makes them.

    They are those that the report keeps for that reason, also where a depthwise convolution lies between.
    """
    depthwise: dict[str, int] = {}
    found: dict[str, float] = {}
    for bound in reversed(layer_bounds):
        number = 0
        for why, count in reasons.get(bound.name, Reasons()).outputs:
            number += count if STANDS_FOR in why else min(count, depthwise.get(why, 0))
        if bound.groups == bound.inputs > 1:
            depthwise[f"groups of {bound.name} stay whole"] = number
        inputs = bound.live_inputs + bound.standing if bound.groups == 1 else bound.inputs // bound.groups
        found[bound.name] = number * inputs * bound.unit
    return found


def excesses(
    layer_bounds: Sequence[Bound],
    needed: Mapping[str, float],
    program: Program,
    reasons: Mapping[str, Reasons],
) -> Iterator[Excess]:
    """The layers of a compiled Program that cost more than their bound, the costliest first."""
    bound_of = {bound.name: bound for bound in layer_bounds}
    macs = layer_macs(program)
    shapes = {shape.node.name: shape for shape in layers(program)}
    for name in sorted(macs, key=lambda name: needed.get(name, 0.0) - macs[name]):
        if macs[name] <= needed.get(name, 0.0):
            return
        node, why = shapes[name].node, reasons.get(name, Reasons())
        groups, outputs, inputs, _ = (
            shapes[name].matrix(torch.empty(program.infos[shapes[name].weight].sizes)).shape
        )
        kept, bound = (groups * inputs, groups * outputs), bound_of.get(name)
        label = str(node.meta.get("module") or name)
        if bound is None:
            yield Excess(label, _kind(node), macs[name], 0.0, f"{kept[0]}", f"{kept[1]}", ((UNKNOWN, 1),))
            continue
        told = [*_uncovered(kept[0] - bound.live_inputs - bound.standing, why.inputs)]
        told += _uncovered(kept[1] - bound.live_outputs, why.outputs)
        yield Excess(
            label,
            _kind(node),
            macs[name],
            needed[name],
            f"{kept[0]} of {bound.inputs}, bound {bound.live_inputs + bound.standing}",
            f"{kept[1]} of {bound.outputs}, bound {bound.live_outputs}",
            added_up(told),
        )


def _uncovered(more: int, reasons: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The reasons for channels beyond the bound; those that no reason covers are needed in the analysis' eyes."""
    if more <= 0:
        return []
    rest = more - sum(number for _, number in reasons)
    return [*reasons, *([(UNEXPLAINED, rest)] if rest > 0 else [])]


def added_up(reasons: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Reasons without the numbers of their operators, each once, the most frequent first."""
    found: Counter[str] = Counter()
    for why, number in reasons:
        found[without_numbers(why)] += number
    return tuple(found.most_common())


def _kind(node: fx.Node) -> str:
    return str(node.target).split(".")[1]
