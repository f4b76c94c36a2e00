"""The measurement: rounds in which every model takes its turns, until the ratio is known.

A round visits the models in a random order and then in its reverse (A B B A, or B A A B), so that a slow
change of the machine's speed falls on all alike. A visit runs the model once untimed, to bring its weights
back into the caches, and then often enough in a row that the clock's resolution does not matter. Per round
and model the mean log time is kept; the ratio is the exponential of the median difference over the rounds.
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
from sbp_compile.timing.doubts import doubts
from sbp_compile.timing.inputs import Shapes, check_names, make_inputs
from sbp_compile.timing.progress import Progress
from sbp_compile.timing.result import Comparison, ModelTiming, Ratio
from sbp_compile.timing.session import Model, Runner, declared_inputs, open_session, require_provider
from sbp_compile.timing.statistics import Floats, half_width, median_interval

_SAMPLE_S = 500e-6
_UNTIMED_BELOW_S = 10e-3
_WARM_UP_S = 0.2
_WARM_UP_RUNS = 3
_FEWEST_ROUNDS = 3
_ROUNDS_FOR_TARGET = 40
_SECONDS_FOR_TARGET = 1.0
_NEXT_LOOK = 1.25


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
    until `budget_s` seconds are over (three rounds at the least). `shapes` gives an input's whole shape, with
    "batch" standing for `batch`, or a symbolic axis' size: needed for dynamic axes other than the batch.
    `seed` fixes inputs, order and bootstrap. `progress` is called with (fraction, text) between rounds.

    Raises UsageError (option out of range, provider missing), ModelFileError (not a readable ONNX model),
    InputError (shapes), UnsupportedModelError (an input that is no tensor of numbers).
    """
    _check_options(models, batch, threads, target_half_width, budget_s)
    report = progress or _silent
    report(0.0, "loading and warming up")
    runners = _runners(models, provider, threads, batch, shapes or {}, seed)
    lanes = [_warm_up(runner, budget_s) for runner in runners]
    run = _interleave(lanes, _Stop(target_half_width, budget_s, seed), report)
    widest = max(map(half_width, _intervals(run.logs, seed)))
    result = Comparison(
        models=tuple(_timing(lane, batch) for lane in lanes),
        ratios=tuple(_ratios([runner.name for runner in runners], run.logs, seed)),
        batch=batch,
        threads=threads,
        provider=provider,
        spinning=threads > 1,
        target_half_width=target_half_width,
        half_width=widest,
        budget_s=budget_s,
        seed=seed,
        elapsed_s=run.elapsed_s,
        rounds=len(run.logs),
        stopped=run.stopped,
    )
    return replace(
        result, warnings=tuple(doubts(result, _differences(run.logs), same_inputs=_agree(runners)))
    )


@dataclass
class _Lane:
    """One model under measurement: how many runs make a sample, and the samples so far in seconds per run."""

    runner: Runner
    runs: int
    untimed: bool
    samples: list[float] = field(default_factory=list)

    def visit(self) -> float:
        if self.untimed:
            self.runner.seconds_per_run(1)
        seconds = self.runner.seconds_per_run(self.runs)
        self.samples.append(seconds)
        return math.log(seconds)


@dataclass(frozen=True)
class _Stop:
    """When to stop: the target for the interval's relative half width, or the budget in seconds."""

    target: float
    budget_s: float
    seed: int

    def reached(self, logs: Floats) -> bool:
        return max(map(half_width, _intervals(logs, self.seed))) <= self.target


@dataclass(frozen=True)
class _Run:
    """Mean log seconds, shape (rounds, models), and how it ended."""

    logs: Floats
    stopped: Literal["target", "budget"]
    elapsed_s: float


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


def _runners(
    models: Mapping[str, Model], provider: str, threads: int, batch: int, shapes: Shapes, seed: int
) -> list[Runner]:
    require_provider(provider)
    sessions = {
        name: open_session(name, model, provider=provider, threads=threads) for name, model in models.items()
    }
    declared = {name: declared_inputs(session) for name, session in sessions.items()}
    check_names(shapes, itertools.chain(*declared.values()))
    runners = []
    for name, session in sessions.items():
        inputs = make_inputs(name, declared[name], batch=batch, shapes=shapes, seed=seed)
        runners.append(Runner(name, session, inputs, provider))
    return runners


def _agree(runners: Sequence[Runner]) -> bool:
    """Whether all models take the same sizes and dtypes, whatever their inputs are called."""
    return all(runner.takes == runners[0].takes for runner in runners)


def _warm_up(runner: Runner, budget_s: float) -> _Lane:
    """Run until caches, memory arena and clock speed have settled, and see how many runs make a sample."""
    runner.first_run()
    end = time.perf_counter() + min(_WARM_UP_S, budget_s / 20)
    fastest, runs = math.inf, 0
    while runs < _WARM_UP_RUNS or time.perf_counter() < end:
        fastest = min(fastest, runner.seconds_per_run(1))
        runs += 1
    return _Lane(runner, runs=math.ceil(_SAMPLE_S / fastest), untimed=fastest < _UNTIMED_BELOW_S)


def _interleave(lanes: Sequence[_Lane], stop: _Stop, report: Progress) -> _Run:
    order = random.Random(stop.seed)
    logs: list[list[float]] = []
    next_look = _ROUNDS_FOR_TARGET
    start = time.perf_counter()
    with _no_garbage_collection():
        while True:
            logs.append(_round(lanes, order))
            elapsed = time.perf_counter() - start
            if len(logs) >= next_look and elapsed >= min(_SECONDS_FOR_TARGET, stop.budget_s / 2):
                if stop.reached(np.array(logs)):
                    return _Run(np.array(logs), "target", elapsed)
                next_look = math.ceil(len(logs) * _NEXT_LOOK)
            if elapsed >= stop.budget_s and len(logs) >= _FEWEST_ROUNDS:
                return _Run(np.array(logs), "budget", elapsed)
            report(min(1.0, elapsed / stop.budget_s), f"timing, {len(logs)} rounds")


def _round(lanes: Sequence[_Lane], order: random.Random) -> list[float]:
    """Visit every lane twice, in a random order and its reverse; mean log seconds per lane."""
    sequence = order.sample(range(len(lanes)), len(lanes))
    total = [0.0] * len(lanes)
    for index in itertools.chain(sequence, reversed(sequence)):
        total[index] += lanes[index].visit() / 2
    return total


def _differences(logs: Floats) -> Floats:
    """Log ratios of the first model to each other, shape (others, rounds); log times of a lone model."""
    return (logs[:, :1] - logs[:, 1:]).T if logs.shape[1] > 1 else logs.T


def _intervals(logs: Floats, seed: int) -> list[tuple[float, float]]:
    return [median_interval(series, seed=seed) for series in _differences(logs)]


def _ratios(names: Sequence[str], logs: Floats, seed: int) -> Iterator[Ratio]:
    series = _differences(logs)
    for other, values, (low, high) in zip(names[1:], series, _intervals(logs, seed), strict=False):
        yield Ratio(names[0], other, math.exp(float(np.median(values))), math.exp(low), math.exp(high))


def _timing(lane: _Lane, batch: int) -> ModelTiming:
    median, p95 = (float(value) for value in np.percentile(lane.samples, [50, 95]))
    return ModelTiming(lane.runner.name, median, p95, batch / median, len(lane.samples), lane.runs)


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
