"""The interval, the reasons for doubt, and the table."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from sbp_compile.timing import Comparison, ModelTiming, Ratio, compare
from sbp_compile.timing.doubts import doubts
from sbp_compile.timing.progress import progress_bar
from sbp_compile.timing.statistics import drift, half_width, median_interval

fast = functools.partial(compare, budget_s=0.4, target_half_width=0.5)


def comparison(**changes: object) -> Comparison:
    values: dict[str, object] = {
        "models": (
            ModelTiming("a", 2e-3, 2.1e-3, 500.0, 900, 1),
            ModelTiming("b", 1e-5, 1.1e-5, 1e5, 900, 50),
        ),
        "ratios": (Ratio("a", "b", 200.0, 199.0, 201.0),),
        "batch": 1,
        "threads": 1,
        "provider": "cpu",
        "spinning": False,
        "target_half_width": 0.02,
        "half_width": 0.005,
        "budget_s": 30.0,
        "seed": 0,
        "elapsed_s": 3.0,
        "loads": 8,
        "rounds": 450,
        "stopped": "target",
    }
    return Comparison(**(values | changes))  # type: ignore[arg-type]


def said(result: Comparison, *series: Sequence[float], same_inputs: bool = True) -> str:
    differences = np.array(series or [[0.0] * result.loads])
    return " | ".join(doubts(result, differences, same_inputs=same_inputs))


@pytest.mark.parametrize("n", [6, 9, 25])
def test_the_interval_covers_the_median_as_often_as_it_says(n: int) -> None:
    rng = np.random.default_rng(n)
    intervals = [median_interval(0.5 + rng.standard_cauchy(n)) for _ in range(2000)]
    covered = sum(low <= 0.5 <= high for low, high in intervals) / len(intervals)
    assert 0.94 < covered < 0.99


@pytest.mark.parametrize("n", range(6, 40))
def test_the_interval_is_the_narrowest_of_its_level(n: int) -> None:
    low, high = median_interval(np.arange(1.0, n + 1))
    assert 2 * stats.binom.cdf(low - 1, n, 0.5) <= 0.05 < 2 * stats.binom.cdf(low, n, 0.5)
    assert high == n + 1 - low


def test_fewer_than_six_loads_give_their_extremes() -> None:
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)


def test_one_load_far_off_moves_the_interval_little() -> None:
    loads = np.linspace(-0.01, 0.01, 9)
    low, high = median_interval(np.append(loads, 5.0))
    assert -0.01 <= low < high <= 0.01


def test_half_width_is_relative_to_the_ratio() -> None:
    assert half_width((math.log(2 / 1.02), math.log(2 * 1.02))) == pytest.approx(0.02)


def test_drift_is_the_distance_between_the_halves() -> None:
    assert drift(np.array([1.0, 1.0, 4.0, 4.0])) == 3.0


def test_a_quiet_measurement_raises_no_doubt() -> None:
    assert said(comparison()) == ""


def test_each_reason_for_doubt_is_said() -> None:
    noisy = (ModelTiming("a", 1e-3, 9e-3, 1000.0, 900, 1),)
    assert "p95 of a is 9.0 times its median" in said(comparison(models=noisy))
    assert "only 3 loads" in said(comparison(loads=3))
    assert "half width of the interval is 5.0%, not 2.0%" in said(comparison(half_width=0.05))
    assert "100000 threads share" in said(comparison(threads=100_000))
    assert "inputs of the same sizes" in said(comparison(), same_inputs=False)
    assert "drifted" in said(comparison(), [0.0] * 4 + [0.1] * 4)


def test_models_of_different_input_sizes_are_pointed_out(cheap: bytes, sequence: bytes) -> None:
    result = fast({"flat": cheap, "sequence": sequence}, shapes={"length": 3})
    same = fast({"a": sequence, "b": sequence}, shapes={"x": ["batch", 3, 8]})
    assert any("same sizes" in warning for warning in result.warnings)
    assert not any("same sizes" in warning for warning in same.warnings)


def test_the_table_shows_units_speed_up_and_how_the_measurement_ended() -> None:
    console = Console(file=StringIO(), width=100)
    console.print(comparison(warnings=("be careful",)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "2 ms",
        "10 us",
        "200.0x",
        "199.0 to 201.0",
        "no spinning",
        "reached its target",
        "be careful",
    ):
        assert part in text


def test_an_interval_around_one_is_called_no_difference() -> None:
    console = Console(file=StringIO(), width=100)
    console.print(comparison(ratios=(Ratio("a", "b", 1.01, 0.99, 1.03),)))
    assert "no difference shown between a and b" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_progress_bar_is_silent_where_there_is_no_terminal() -> None:
    console = Console(file=StringIO())
    with progress_bar(console) as progress:
        progress(0.5, "timing")
    assert console.file.getvalue().strip() == ""  # type: ignore[attr-defined]
