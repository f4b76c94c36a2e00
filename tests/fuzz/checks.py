"""What must hold for every network: the same function, documented errors only, never more work."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ShapesCollection

import sbp_compile
from passes import TARGETS, Canonicalize, FewestMacs, Pipeline, Program, Target, default_pipeline
from passes.ir.cost import count
from passes.ir.interpret import run
from sbp_compile.capture.export import export_module
from sbp_compile.capture.program import program_from_export
from sbp_compile.errors import BatchPinnedWarning, CompileError, UnsupportedModelError
from sbp_compile.verify import relative_error
from tests.fuzz.builder import RandomNetwork, flat
from tests.fuzz.networks import Spec, build, moving_axes
from tests.fuzz.networks import inputs as random_inputs

FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-5
LARGEST_NOISE = 3e-4
LARGEST_SIZE = 4096


class FuzzError(AssertionError):
    """A promise was broken; `kind` names which."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(frozen=True)
class Outcome:
    """What came out of one network: why it was no test, or its multiply-adds before and after."""

    rejected: str = ""
    before: int = 0
    after: int = 0
    shrunk: bool = False


def examples(spec: Spec, which: int = 0, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs at the first or second example sizes."""
    return random_inputs(spec, which, torch.Generator().manual_seed(spec.seed + 17 * seed + which))


def dynamic_arguments(spec: Spec, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """How `compile` and `export_module` are to treat the shapes."""
    if spec.dynamic != "spatial":
        return {"dynamic_batch": spec.dynamic == "batch"}
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    batch = Dim("batch", min=1)
    for number, value in enumerate(inputs):
        inner = {
            axis: Dim(f"size_{number}_{axis}", min=value.shape[axis], max=LARGEST_SIZE)
            for axis in moving_axes(spec.inputs[number])
        }
        shapes[value] = {0: batch, **inner}
    return {"dynamic_shapes": shapes}


@contextmanager
def _documented_errors_only(where: str) -> Iterator[None]:
    try:
        yield
    except CompileError:
        raise
    except FuzzError:
        raise
    except Exception as error:
        raise FuzzError("undocumented error", f"{where} raised {type(error).__name__}: {error}") from error


class RejectedError(Exception):
    """A network that is no test, and why."""


def capture(spec: Spec) -> Program:
    """The Program of a spec's network; raises RejectedError where torch cannot capture it as asked."""
    network, inputs = build(spec)[0], examples(spec)
    if not network.plan:
        raise RejectedError("empty")
    try:
        with _documented_errors_only("capture"), warnings.catch_warnings():
            warnings.simplefilter("ignore", BatchPinnedWarning)
            return program_from_export(export_module(network, inputs, **dynamic_arguments(spec, inputs)))
    except UnsupportedModelError as error:
        raise RejectedError(f"capture: {error}") from error


def with_masks(original: Program, spec: Spec) -> Program:
    """The Program captured for one spec, with the constants of another that differs in its masks alone."""
    state = build(spec)[0].state_dict()
    constants = {}
    for name, held in original.constants.items():
        value = state.get(name, held)
        constants[name] = value.detach().to(held.dtype)
    return original.replace(constants=constants)


def pipeline(spec: Spec) -> Pipeline:
    """The default passes; with odd masks they take every gather that saves a multiply-add.

    With every other even ones they choose widths for a target, a different one for different seeds.
    """
    if spec.masks % 2:
        return default_pipeline(FewestMacs())
    return default_pipeline(target=sized_for(spec))


def sized_for(spec: Spec) -> Target | None:
    """The target that widths are chosen for."""
    names = sorted(TARGETS)
    return TARGETS[names[spec.seed % len(names)]] if spec.masks % 4 == 2 else None


def check_passes(spec: Spec, original: Program | None = None) -> Outcome:
    """Run the passes; compare with the original Program and with the module itself in float64.

    `original`: the spec's Program, if it was captured before.
    """
    try:
        original = original or capture(spec)
        with _documented_errors_only("the passes"):
            small = pipeline(spec)(original).program
            small.lint()
        pinned = all(entry.sizes == entry.other_sizes for entry in original.inputs)
        truths = build(spec)[0], build(spec)[0].double()
        for which in (0,) if pinned else (0, 1):
            _compare(truths, original, small, examples(spec, which, seed=1))
    except RejectedError as reason:
        return Outcome(rejected=str(reason))
    return _outcome(original, small, pipeline(spec), strict=spec.masks % 4 == 0)


def check_variants(spec: Spec, count: int) -> Iterator[tuple[Spec, Outcome | FuzzError]]:
    """One capture, checked with `count` sets of masks."""
    original, plan = None, build(spec)[0].plan
    for masks in range(spec.masks, spec.masks + count):
        variant = replace(spec, masks=masks)
        try:
            original = original or capture(spec)
            if build(variant)[0].plan != plan:
                raise RejectedError("other masks, other steps")
            yield variant, check_passes(variant, with_masks(original, variant))
        except RejectedError as reason:
            yield variant, Outcome(rejected=str(reason))
            if original is None:
                return
        except FuzzError as failure:
            yield variant, failure


def _compare(
    truths: tuple[nn.Module, nn.Module], original: Program, small: Program, inputs: tuple[Tensor, ...]
) -> None:
    """Compare three ways in float64; raises RejectedError where rounding alone is too much.

    `truths`: the network itself, in float32 and in float64.
    """
    own, exact = outputs(truths[0], inputs), outputs(truths[1], widened(inputs))
    if ill_conditioned(own, exact):
        raise RejectedError("ill-conditioned")
    with _documented_errors_only("running the programs"):
        wanted, found = run(original, inputs), run(small, inputs)
    for position, (truth, a, b) in enumerate(zip(exact, wanted, found, strict=True)):
        for kind, first, second in (("capture", truth, a), ("float64", a, b), ("oracle", truth, b)):
            error = relative_error(first, second)
            if not error <= FLOAT64_TOLERANCE:
                raise FuzzError(
                    kind, f"output {position} of shape {tuple(first.shape)} differs by {error:.1e}"
                )


def widened(inputs: Iterable[Tensor]) -> list[Tensor]:
    return [value.double() if value.is_floating_point() else value for value in inputs]


def outputs(network: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        result = network(*inputs)
    return flat(list(result.values()) if isinstance(result, dict) else result)


def ill_conditioned(own: list[Tensor], exact: list[Tensor]) -> bool:
    """Whether rounding alone moves some output too far for the tolerances to mean anything."""
    return any(not relative_error(a, b) <= LARGEST_NOISE for a, b in zip(exact, own, strict=True))


def _outcome(original: Program, small: Program, pipeline: Pipeline, strict: bool) -> Outcome:
    """Compare costs and run the pipeline again: `strict` where nothing at all may change then."""
    dense = Pipeline((Canonicalize(),), repeat=True)(original).program  # masks as indices hide sizes at first
    before, after = count(dense).macs, count(small).macs
    if after > before:
        raise FuzzError("cost", f"{after} multiply-adds after, {before} before")
    again = pipeline(small).program
    if count(again).macs > after:
        raise FuzzError("idempotence", f"a second run made {count(again).macs} multiply-adds of {after}")
    change = first_change(small, again)
    if change and strict:
        raise FuzzError("idempotence", f"a second run changed {change}")
    return Outcome("", before, after, count(small).parameters < count(dense).parameters)


def first_change(before: Program, after: Program) -> str:
    """Where two Programs differ first in graph, sizes or parameters; nothing if they are the same."""
    wanted, found = written_out(before), written_out(after)
    for first, second in zip_longest(wanted, found, fillvalue=("end", ())):
        if first[0] != second[0]:
            return f"{first[0]} to {second[0]}"
        if not all(torch.equal(*pair) for pair in zip(first[1], second[1], strict=True)):
            return f"the parameters of {first[0]}"
    return ""


def written_out(program: Program) -> list[tuple[str, list[Tensor]]]:
    """Every call as text, with operands as numbers, and its constants."""
    numbers = {node: f"%{number}" for number, node in enumerate(program.nodes) if node.op != "get_attr"}
    numbers = {node: f"%{number}" for number, node in enumerate(numbers)}
    lines = []
    for node in program.nodes:
        constants = [
            value for operand in node.all_input_nodes if (value := program.constant(operand)) is not None
        ]
        shapes = {
            operand: f"constant{tuple(program.constants[str(operand.target)].shape)}"
            for operand in node.all_input_nodes
            if operand.op == "get_attr"
        }
        if node.op in {"call_function", "output"}:
            args = fx.node.map_arg(
                (node.args, dict(node.kwargs)), lambda arg, held=shapes: held.get(arg) or numbers[arg]
            )
            lines.append((f"{node.target}{args}", constants))
    return lines


def check_compile(spec: Spec, folder: Path | None = None) -> Outcome:
    """The whole path: compile, the module left alone, float32, and onnxruntime where a folder is given."""
    network, _ = build(spec)
    inputs = examples(spec)
    if not network.plan:
        return Outcome(rejected="empty")
    own = outputs(build(spec)[0], inputs)
    exact = outputs(build(spec)[0].double(), widened(inputs))
    if ill_conditioned(own, exact):
        return Outcome(rejected="ill-conditioned")
    network.train(spec.seed % 2 == 0)
    before = snapshot(network)
    try:
        with _documented_errors_only("compile"), warnings.catch_warnings():
            warnings.simplefilter("ignore", BatchPinnedWarning)
            compiled = sbp_compile.compile(
                network, inputs, pipeline=pipeline(spec), **dynamic_arguments(spec, inputs)
            )
    except UnsupportedModelError as error:
        return Outcome(rejected=f"capture: {error}")
    except CompileError as error:
        raise FuzzError(type(error).__name__, str(error)) from error
    if differs(before, snapshot(network)):
        raise FuzzError("module changed", differs(before, snapshot(network)))
    _compare_float32(compiled.module, inputs, own, exact)
    if folder is not None:
        with _errors_as_failures(), _documented_errors_only("save"):
            try:
                compiled.save(folder / "small.onnx")
            except UnsupportedModelError as error:
                if "exporter cannot translate" not in str(error):
                    raise
                return Outcome(rejected=f"ONNX: {error}")
    return Outcome("", compiled.report.before.macs, compiled.report.after.macs, True)


@contextmanager
def _errors_as_failures() -> Iterator[None]:
    try:
        yield
    except CompileError as error:
        raise FuzzError(f"ONNX {type(error).__name__}", str(error)) from error


def _compare_float32(module: nn.Module, inputs: Any, own: list[Tensor], exact: list[Tensor]) -> None:
    with _documented_errors_only("the compiled module"):
        found = outputs(module, inputs)
    for position, (a, b, truth) in enumerate(zip(own, found, exact, strict=True)):
        limit = max(FLOAT32_TOLERANCE, 3.0 * relative_error(truth, a))
        error = relative_error(truth, b)
        if not error <= limit:
            raise FuzzError("float32", f"output {position} differs by {error:.1e}, tolerance {limit:.1e}")


def snapshot(network: nn.Module) -> dict[str, Any]:
    """Everything about a module that compiling must leave alone."""
    held: dict[str, Any] = {name: value.detach().clone() for name, value in network.state_dict().items()}
    for name, part in network.named_modules():
        held[f"{name} training"] = part.training
        held[f"{name} attributes"] = sorted(vars(part))
        held[f"{name} hooks"] = len(part._forward_pre_hooks)
    return held


def differs(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The first entry in which two snapshots differ, or nothing."""
    if before.keys() != after.keys():
        return f"entries {sorted(before.keys() ^ after.keys())}"
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        if not same:
            return name
    return ""


def minimised(spec: Spec, failure: FuzzError, check: Any) -> tuple[Spec, FuzzError]:
    """The spec with as few steps, inputs and outputs as still break the same promise."""
    shrinking = True
    while shrinking:
        shrinking = False
        for smaller in _smaller(spec):
            found = failure_of(smaller, check)
            if found is not None and found.kind == failure.kind:
                spec, failure, shrinking = smaller, found, True
                break
    return spec, failure


def _smaller(spec: Spec) -> Iterator[Spec]:
    for position in reversed(range(len(spec.steps))):
        yield spec.without(position)
    if spec.form != "single":
        yield replace(spec, form="single")
    for position, step in enumerate(spec.steps):
        if step.back:
            steps = list(spec.steps)
            steps[position] = replace(step, back=0)
            yield replace(spec, steps=tuple(steps))
    if len(spec.inputs) > 1:
        yield replace(spec, inputs=spec.inputs[:1])
    if spec.dynamic != "batch":
        yield replace(spec, dynamic="batch")


def failure_of(spec: Spec, check: Any) -> FuzzError | None:
    """The broken promise of a spec, if there is one."""
    try:
        check(spec)
    except FuzzError as error:
        return error
    return None


def description(spec: Spec) -> str:
    """Spec and network, ready to paste."""
    network: RandomNetwork = build(copy.deepcopy(spec))[0]
    return f"{spec}\n{network.describe()}"
