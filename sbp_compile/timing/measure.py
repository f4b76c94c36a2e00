"""The measurement: loads and rounds in which every model takes its turns, until the ratio is known.

1. A load opens a fresh session for every model, in random order, and warms it up. The same model loaded twice
   differs by about a per cent as long as the sessions live, so the interval is made from the loads.
2. A load is timed in rounds. A round visits the models in a random order and then in its reverse (A B B A, or
   B A A B), so that a slow change of the machine's speed falls on all alike.
3. A visit runs the model once untimed, to bring its weights back into the caches, and then often enough in a
   row that the clock's resolution does not matter: one sample.

A round gives the difference of the models' mean log times, a load the median over its rounds, and the ratio
is the exponential of the median over the loads.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from sbp_compile.errors import UsageError
from sbp_compile.timing.doubts import LOADS_FOR_TARGET, doubts
from sbp_compile.timing.inputs import Shapes, check_names, make_inputs
from sbp_compile.timing.progress import Progress
from sbp_compile.timing.result import Comparison, ModelTiming, Ratio
from sbp_compile.timing.session import Model, Runner, declared_inputs, open_session, require_provider
from sbp_compile.timing.statistics import Floats, half_width, median_interval

_SAMPLE_S = 500e-6
_UNTIMED_BELOW_S = 10e-3
_WARM_UP_S = 0.1
_WARM_UP_RUNS = 3
_LOAD_S = 0.25
_FEWEST_LOADS = 3


def compare(
    models: Mapping[str, Model],
    *,
    batch: int = 1,
    threads: int = 1,
    provider: str = "cpu",
    shapes: Shapes | None = None,
    target_half_width: float = 0.02,
    budget_s: float = 30.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Time ONNX models (paths or bytes) against the first of them, interleaved in this process.

    Goes on until the 95% interval of every ratio has a relative half width of at most `target_half_width`, or
    until `budget_s` seconds are over (three loads at the least). `shapes` gives an input's whole shape, with
    "batch" standing for `batch`, or a symbolic axis' size: needed for dynamic axes other than the batch.
    `seed` fixes inputs and order. `progress` is called with (fraction, text) between rounds.

    Raises UsageError (option out of range, provider missing), ModelFileError (not a readable ONNX model),
    InputError (shapes), UnsupportedModelError (an input that is no tensor of numbers).
    """
    _check_options(models, batch, threads, target_half_width, budget_s)
    require_provider(provider)
    entries = [_Entry(name, model) for name, model in models.items()]
    run = _Run(
        entries, _Conditions(batch, threads, provider, shapes or {}, seed), budget_s, progress or _silent
    )
    stopped = run.until(target_half_width)
    differences = run.differences()
    result = Comparison(
        models=tuple(_timing(entry, batch) for entry in entries),
        ratios=tuple(_ratios(entries, differences)),
        batch=batch,
        threads=threads,
        provider=provider,
        spinning=threads > 1,
        target_half_width=target_half_width,
        half_width=_widest(differences),
        budget_s=budget_s,
        seed=seed,
        elapsed_s=run.elapsed_s(),
        loads=len(run.loads),
        rounds=run.rounds,
        stopped=stopped,
    )
    return replace(result, warnings=tuple(doubts(result, differences, same_inputs=run.same_inputs)))


@dataclass(frozen=True)
class _Conditions:
    """Under which every model is run."""

    batch: int
    threads: int
    provider: str
    shapes: Shapes
    seed: int


@dataclass
class _Entry:
    """A model and what was seen of it: samples in seconds per run, and how many runs make a sample."""

    name: str
    model: Model
    runs: int = 0
    untimed: bool = False
    samples: list[float] = field(default_factory=list)
    with_copies: list[float] = field(default_factory=list)

    def calibrate(self, fastest: float) -> None:
        """Fix the runs per sample at the first load, from the fastest run in seconds, for all loads alike."""
        if not self.runs:
            self.runs = math.ceil(_SAMPLE_S / fastest)
            self.untimed = fastest < _UNTIMED_BELOW_S

    def visit(self, runner: Runner) -> float:
        """Take one sample; its log seconds are returned."""
        if self.untimed:
            runner.seconds_per_run(1)
        self.samples.append(runner.seconds_per_run(self.runs))
        return math.log(self.samples[-1])


class _Run:
    """One comparison under way; `loads` has a row per load, with each model's median log seconds."""

    def __init__(
        self, entries: Sequence[_Entry], conditions: _Conditions, budget_s: float, report: Progress
    ) -> None:
        self._entries = entries
        self._conditions = conditions
        self._budget_s = budget_s
        self._report = report
        self._order = random.Random(conditions.seed)
        self._start = time.perf_counter()
        self.loads: list[Floats] = []
        self.rounds = 0
        self.same_inputs = True

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    def until(self, target: float) -> Literal["target", "budget"]:
        """Load and time until the interval is narrow enough or the budget is over, and say which."""
        while True:
            self.loads.append(self._load())
            if len(self.loads) >= LOADS_FOR_TARGET and _widest(self.differences()) <= target:
                return "target"
            if len(self.loads) >= _FEWEST_LOADS and self.elapsed_s() >= self._budget_s:
                return "budget"

    def differences(self) -> Floats:
        """Log ratios of the first model to each other, shape (others, loads); log times of a lone model."""
        return np.array(self.loads).T

    def _load(self) -> Floats:
        begin = time.perf_counter()
        runners = self._open()
        for entry, runner in zip(self._entries, runners, strict=True):
            entry.calibrate(self._warm_up(runner))
        opened = time.perf_counter()
        end = opened + min(max(_LOAD_S, opened - begin), self._budget_s / (2 * LOADS_FOR_TARGET))
        rounds: list[list[float]] = []
        with _no_garbage_collection():
            while not rounds or time.perf_counter() < end:
                rounds.append(self._round(runners))
                self._tell()
        self.rounds += len(rounds)
        return _load_medians(np.array(rounds).T)

    def _open(self) -> list[Runner]:
        """Open a session for every entry, in random order: the first to be opened gets other memory."""
        asked = self._conditions
        sessions = {
            entry.name: open_session(entry.name, entry.model, provider=asked.provider, threads=asked.threads)
            for entry in self._order.sample(self._entries, len(self._entries))
        }
        declared = {entry.name: declared_inputs(sessions[entry.name]) for entry in self._entries}
        check_names(asked.shapes, itertools.chain(*declared.values()))
        runners = []
        for name, items in declared.items():
            inputs = make_inputs(name, items, batch=asked.batch, shapes=asked.shapes, seed=asked.seed)
            runners.append(Runner(name, sessions[name], inputs, asked.provider))
        self.same_inputs = all(runner.takes == runners[0].takes for runner in runners)
        return runners

    def _warm_up(self, runner: Runner) -> float:
        """Run until caches, memory arena and clock speed have settled; seconds of the fastest run."""
        runner.first_run()
        end = time.perf_counter() + min(_WARM_UP_S, self._budget_s / 100)
        times: list[float] = []
        while len(times) < _WARM_UP_RUNS or time.perf_counter() < end:
            times.append(runner.seconds_per_run(1))
        return min(times)

    def _round(self, runners: Sequence[Runner]) -> list[float]:
        """Visit every model twice, in a random order and its reverse; mean log seconds per model."""
        sequence = self._order.sample(range(len(runners)), len(runners))
        total = [0.0] * len(runners)
        for index in itertools.chain(sequence, reversed(sequence)):
            total[index] += self._entries[index].visit(runners[index]) / 2
        for index in sequence:
            self._entries[index].with_copies.append(runners[index].seconds_with_copies())
        return total

    def _tell(self) -> None:
        self._report(min(1.0, self.elapsed_s() / self._budget_s), f"timing, load {len(self.loads) + 1}")


def _check_options(
    models: Mapping[str, Model], batch: int, threads: int, target_half_width: float, budget_s: float
) -> None:
    if not models:
        raise UsageError("no models to time: give at least one")
    for name, value in (("batch", batch), ("threads", threads)):
        if value < 1:
            raise UsageError(f"{name} (={value}) must be at least 1")
    if not 0 < target_half_width < 1:
        raise UsageError(
            f"target_half_width (={target_half_width}) must be between 0 and 1, such as 0.02 for 2%"
        )
    if not 0 < budget_s < math.inf:
        raise UsageError(f"budget_s (={budget_s}) must be a positive number of seconds")


def _load_medians(logs: Floats) -> Floats:
    """Median over the rounds of the first model's log seconds less each other's; `logs`: (models, rounds)."""
    paired = logs[:1] - logs[1:] if len(logs) > 1 else logs
    return np.asarray(np.median(paired, axis=1), dtype=np.float64)


def _widest(differences: Floats) -> float:
    return max(half_width(median_interval(series)) for series in differences)


def _ratios(entries: Sequence[_Entry], differences: Floats) -> Iterator[Ratio]:
    for other, series in zip(entries[1:], differences, strict=False):
        low, high = median_interval(series)
        yield Ratio(entries[0].name, other.name, *(math.exp(log) for log in (np.median(series), low, high)))


def _timing(entry: _Entry, batch: int) -> ModelTiming:
    p5, median, p95, p99 = (float(value) for value in np.percentile(entry.samples, [5, 50, 95, 99]))
    copies = float(np.median(entry.with_copies))
    throughput, samples = batch / median, len(entry.samples)
    return ModelTiming(entry.name, median, p95, throughput, samples, entry.runs, p5, p99, copies)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _silent(fraction: float, description: str) -> None:
    del fraction, description
