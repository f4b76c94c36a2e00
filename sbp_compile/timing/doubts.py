"""Reasons not to believe a comparison, each as one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sbp_compile.timing.result import Comparison, available_cores
from sbp_compile.timing.statistics import Floats, drift

LOADS_FOR_TARGET = 6
_NOISY_P95 = 1.5
_DRIFT_HALF_WIDTHS = 3


def doubts(result: Comparison, differences: Floats, *, same_inputs: bool) -> Iterator[str]:
    """Yield what makes `result` weaker than it looks; `differences` are log ratios, shape (others, loads)."""
    yield from _setting(result, same_inputs)
    yield from _noise(result)
    if any(_drifts(series, result) for series in differences):
        yield "the ratio drifted between the first and the second half of the measurement: repeat it"


def _setting(result: Comparison, same_inputs: bool) -> Iterator[str]:
    cores = available_cores()
    if result.provider == "cpu" and result.threads > cores:
        yield f"{result.threads} threads share {cores} cores: they wait for each other"
    if not same_inputs:
        yield "the models do not take inputs of the same sizes: they may not be doing the same work"


def _noise(result: Comparison) -> Iterator[str]:
    if result.loads < LOADS_FOR_TARGET:
        yield f"only {result.loads} loads fitted into the budget: the interval is a guess; allow more time"
    if result.half_width > result.target_half_width:
        yield (
            f"the half width of the interval is {result.half_width:.1%}, not {result.target_half_width:.1%}: "
            "the machine is too noisy, or the budget too short, for that claim"
        )
    for model in result.models:
        if model.p95_s > _NOISY_P95 * model.median_s:
            times = model.p95_s / model.median_s
            yield f"noisy machine: the p95 of {model.name} is {times:.1f} times its median; stop other work"


def _drifts(series: Floats, result: Comparison) -> bool:
    limit = max(_DRIFT_HALF_WIDTHS * math.log1p(result.half_width), result.target_half_width)
    return drift(series) > limit
