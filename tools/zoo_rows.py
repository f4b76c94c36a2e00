"""One network of the zoo, masked at one place: captured once, then compiled and measured for each share of masks."""

from __future__ import annotations

import importlib
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bound import bounds
from layer_shapes import layer_macs, unsized_layers
from torch import Tensor, nn
from torch.export import ExportedProgram
from zoo_excess import Excess, added_up, excesses, reasons_by_layer, standing_outputs

from passes import FewestMacs, Pipeline, Program, Step, default_pipeline
from passes.ir.pipeline import Callback, Noted
from passes.rules import OPAQUE, rule_for
from sbp_compile.capture import export_module
from sbp_compile.capture.call import Call, captured_call
from sbp_compile.capture.program import decomposed
from sbp_compile.compiler import Compiled, compile_exported
from sbp_compile.nn import LogNormalNoise, noise_layers

if TYPE_CHECKING:
    from tests.zoo import Architecture

GAP = 0.05


@dataclass(frozen=True)
class Task:
    """A network and a place for its noise, at every share of masked units; `registry`: "module:table" of networks."""

    network: str
    placement: str
    shares: tuple[float, ...]
    seed: int
    onnx_shares: tuple[float, ...]
    registry: str = "tests.zoo:ZOO"

    @property
    def architecture(self) -> Architecture:
        """What the registry has under the network's name."""
        module, table = self.registry.split(":")
        found: Architecture = getattr(importlib.import_module(module), table)[self.network]
        return found


@dataclass(frozen=True)
class Row:
    """Everything measured at one network, placement and share; `failure`: why the rest is missing.

    `macs`, `parameters`: the whole network before and after; `layer_macs`: of the layers that have a bound, dense
    and compiled; `bound`: theirs. `kept`: output channels kept although masked, by reason. `opaque`: operators without
    a rule in the compiled network. `unsized`: layers whose sizes are not known, which no count holds. `fewest_macs`: of
    the layers that have a bound where every gather is taken that saves a multiply-add, if the gap is worth asking.
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
    unsized: int = 0
    fewest_macs: int | None = None

    @property
    def gap(self) -> float:
        """How much more than the bound the compiled layers cost; 0.05 is 5%."""
        return self._above_bound(self.layer_macs[1])

    @property
    def gap_with_all_gathers(self) -> float:
        """The same where every gather is taken that saves a multiply-add."""
        return self.gap if self.fewest_macs is None else self._above_bound(self.fewest_macs)

    def _above_bound(self, macs: int) -> float:
        if macs == self.bound:
            return 0.0
        return macs / self.bound - 1 if self.bound else float("inf")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gap": self.gap}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        """The row that `to_dict` made plain data of, after a way through JSON."""
        excess = tuple(
            Excess(**entry | {"reasons": tuple((why, number) for why, number in entry["reasons"])})
            for entry in data["excess"]
        )
        pairs = {key: tuple(data[key]) for key in ("macs", "parameters", "layer_macs", "notes")}
        fields = {key: value for key, value in data.items() if key != "gap"}
        return cls(**fields | pairs | {"excess": excess})


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
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, LogNormalNoise):
            network.set_submodule(name, scales[module])
    return len(scales)


@dataclass(frozen=True)
class Watched(Pipeline):
    """A pipeline that shows its steps to one more callback than the compiler's own."""

    watcher: Callback = print

    def with_callback(self, callback: Callback, noted: Noted | None = None) -> Pipeline:
        def both(step: Step) -> None:
            callback(step if noted is None else noted(step))
            self.watcher(step)

        return super().with_callback(both)


@dataclass(frozen=True)
class Captured:
    """A network, its exported program, which shares its memory, and one call's arguments."""

    network: nn.Module
    exported: ExportedProgram
    call: Call
    args: tuple[Tensor, ...]

    @classmethod
    def of(cls, network: nn.Module, args: tuple[Tensor, ...], dynamic_batch: bool) -> Captured:
        exported = decomposed(export_module(network, args, dynamic_batch=dynamic_batch))
        exported.run_decompositions = lambda *_: exported  # slow, and done already
        return cls(network, exported, captured_call(exported, args, {}), args)

    def compiled(self, masked: nn.Module, steps: list[Step]) -> Compiled:
        """Compile it with the weights and masks of a network of the same structure; collects the passes' steps."""
        self.network.load_state_dict(masked.state_dict())
        pipeline = Watched(default_pipeline().passes, watcher=steps.append)
        tensors = self.call.tensors(self.args, {})
        return compile_exported(self.exported, self.call, tensors, own=self.network, pipeline=pipeline)


def measure(task: Task) -> Iterator[Row]:
    """The rows of a task, one for each share; none where the network has no such place. Nothing is raised."""
    from tests.zoo import masked_network

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    architecture = task.architecture
    captured: Captured | None = None
    for share in task.shares:
        row = Row(task.network, architecture.family, task.placement, share)
        try:
            masked = masked_network(architecture, task.placement, share, task.seed)
            if not freeze_noise(masked):
                return
            start = time.perf_counter()
            if captured is None:
                captured = Captured.of(masked, architecture.example(), architecture.dynamic_batch)
            capture = time.perf_counter() - start
            steps: list[Step] = []
            compiled = captured.compiled(masked, steps)
            if share in task.onnx_shares:
                with tempfile.TemporaryDirectory() as folder:
                    compiled.save(Path(folder) / "small.onnx")
            yield measured(row, compiled, steps, task.seed, capture)
        except Exception as error:  # one network's failure is a row
            yield failed(row, f"{type(error).__name__}: {error}")


def failed(row: Row, reason: str) -> Row:
    """The row of a network that did not get through."""
    lines = [line for line in reason.strip().splitlines() if line.strip()]
    return Row(row.network, row.family, row.placement, row.share, failure=lines[0] if lines else "failed")


def measured(row: Row, compiled: Compiled, steps: Sequence[Step], seed: int, capture: float) -> Row:
    """The row of a compiled network; `capture`: seconds of the capture that the compiler did not see."""
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
        {**report.seconds, "capture": report.seconds["capture"] + capture},
        opaque_operators(compiled.program),
        tuple(excesses(layer_bounds, needed, compiled.program, reasons)),
        tuple(f"{note.where}: {note.text}" for note in report.notes),
        unsized_layers(compiled.original),
        with_all_gathers(compiled.original)
        if sum(small.values()) > (1 + GAP) * sum(needed.values())
        else None,
    )


def with_all_gathers(original: Program) -> int:
    """Multiply-adds of the layers that have a bound where every gather is taken that saves one."""
    return sum(layer_macs(default_pipeline(FewestMacs())(original).program).values())


def kept_although_masked(compiled: Compiled) -> dict[str, int]:
    """Output channels that nothing needs and that are there all the same, by the report's reasons."""
    told = [
        (why, int(number))
        for layer in compiled.report.layers
        for number, why in re.findall(r"(\d+) for (.+?)(?=, \d+ for |$)", layer.reason)
    ]
    return dict(added_up(told))


def opaque_operators(program: Program) -> dict[str, int]:
    """Operators without a rule, with how often they occur."""
    found = Counter(
        str(node.target)
        for node in program.calls()
        if node in program.infos and rule_for(program.op(node)) is OPAQUE
    )
    return dict(found.most_common())
