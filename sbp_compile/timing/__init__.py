"""Latency of ONNX models in onnxruntime, compared fairly: interleaved runs and an interval for every ratio.

    from sbp_compile.timing import compare

    result = compare({"dense": "dense.onnx", "small": "small.onnx"}, batch=1, threads=1)
    result.ratios[0].ratio, result.ratios[0].ci_low, result.ratios[0].ci_high

docs/latency.md says how the numbers are made and what they do not cover.
"""

from sbp_compile.timing.cold import ColdStart, cold_start
from sbp_compile.timing.measure import compare
from sbp_compile.timing.profile import Profile, profile, profile_table
from sbp_compile.timing.progress import Progress, progress_bar
from sbp_compile.timing.result import Comparison, ModelTiming, Ratio, environment
from sbp_compile.timing.session import require_provider

__all__ = [
    "ColdStart",
    "Comparison",
    "ModelTiming",
    "Profile",
    "Progress",
    "Ratio",
    "cold_start",
    "compare",
    "environment",
    "profile",
    "profile_table",
    "progress_bar",
    "require_provider",
]
