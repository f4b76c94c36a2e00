"""Widths by measurement: layers timed in onnxruntime on this machine, and whole networks against each other.

    from sbp_compile.tuning import LayerTimes, OnnxruntimeTuner

    tuner = OnnxruntimeTuner(LayerTimes.of_this_machine(batch=1, threads=1), seconds=60)
    small = sbp_compile.compile(net, x, pipeline=passes.default_pipeline(target=passes.this_cpu(), tuner=tuner))

docs/latency.md says what is measured.
"""

from sbp_compile.tuning.layer_times import LayerTimes, Measured
from sbp_compile.tuning.tuner import OnnxruntimeTuner
from sbp_compile.tuning.tuning_file import default_path, load_times, save_times

__all__ = ["LayerTimes", "Measured", "OnnxruntimeTuner", "default_path", "load_times", "save_times"]
