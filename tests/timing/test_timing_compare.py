"""What a comparison measures and refuses; no test asserts a time, only which of two is the dearer."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest

from sbp_compile.errors import ModelFileError, UsageError
from sbp_compile.timing import compare

fast = functools.partial(compare, budget_s=0.4, target_half_width=0.5)


def test_a_dear_model_against_a_cheap_one_shows_a_ratio_above_one(cheap: bytes, dear: bytes) -> None:
    result = fast({"dear": dear, "cheap": cheap})
    (ratio,) = result.ratios
    assert (ratio.first, ratio.other) == ("dear", "cheap")
    assert 1 < ratio.ci_low <= ratio.ratio <= ratio.ci_high
    assert ratio.excludes_one


def test_the_ratio_turns_over_with_the_order_of_the_models(cheap: bytes, dear: bytes) -> None:
    (ratio,) = fast({"cheap": cheap, "dear": dear}).ratios
    assert ratio.ci_high < 1


def test_a_model_against_itself_shows_a_ratio_near_one(cheap: bytes) -> None:
    (ratio,) = compare({"one": cheap, "two": cheap}, budget_s=1.0, target_half_width=0.1).ratios
    assert ratio.ci_low < 1.25
    assert ratio.ci_high > 0.8


def test_statistics_of_a_model_fit_together(cheap: bytes) -> None:
    result = fast({"cheap": cheap}, batch=16)
    (model,) = result.models
    assert result.ratios == ()
    assert 0 < model.median_s <= model.p95_s
    assert model.throughput == pytest.approx(16 / model.median_s)
    assert model.samples == 2 * result.rounds


def test_short_runs_are_timed_many_at_a_time(cheap: bytes) -> None:
    (model,) = fast({"cheap": cheap}).models
    assert model.runs_per_sample > 5


def test_a_wide_target_is_reached_and_a_tiny_one_runs_into_the_budget(cheap: bytes) -> None:
    assert compare({"cheap": cheap}, budget_s=20.0, target_half_width=0.9).stopped == "target"
    short = compare({"cheap": cheap}, budget_s=0.3, target_half_width=1e-9)
    assert short.stopped == "budget"
    assert any("half width" in warning for warning in short.warnings)


def test_json_holds_every_figure_and_survives_a_round_trip(cheap: bytes, dear: bytes) -> None:
    content = fast({"dear": dear, "cheap": cheap}).to_json()
    assert json.loads(json.dumps(content))["half_width"] == content["half_width"]
    assert {"models", "ratios", "batch", "threads", "provider", "stopped", "warnings"} <= content.keys()
    assert content["models"][0].keys() >= {"name", "median_s", "p95_s", "throughput", "samples"}
    assert content["ratios"][0].keys() >= {"first", "other", "ratio", "ci_low", "ci_high"}


def test_models_may_be_paths_or_bytes(files: Path, cheap: bytes) -> None:
    path = files / "cheap.onnx"
    result = fast({"path": path, "text": str(path), "bytes": cheap})
    assert [model.name for model in result.models] == ["path", "text", "bytes"]


def test_progress_never_goes_backwards(cheap: bytes) -> None:
    seen: list[float] = []
    fast({"cheap": cheap}, progress=lambda fraction, text: seen.append(fraction))
    assert seen == sorted(seen)
    assert 0 < seen[-1] <= 1


def test_a_missing_provider_is_a_usage_error(cheap: bytes) -> None:
    with pytest.raises(UsageError, match="provider 'tpu' is unknown"):
        compare({"cheap": cheap}, provider="tpu")


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"threads": 0}, {"target_half_width": 0.0}, {"budget_s": math.inf}]
)
def test_an_option_out_of_range_is_named_with_its_value(wrong: dict[str, float], cheap: bytes) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError, match=rf"{name} \(={value}\)"):
        compare({"cheap": cheap}, **wrong)  # type: ignore[arg-type]


def test_bytes_that_are_no_model_are_refused_in_one_line() -> None:
    with pytest.raises(ModelFileError, match="junk cannot be loaded as an ONNX model") as caught:
        compare({"junk": b"no model"})
    assert "\n" not in str(caught.value)
