"""The tuner: exact, never slower than the best of three by its own measurement, and nothing is timed twice."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import sbp_compile
from passes import COSTS, default_pipeline, this_cpu
from passes.choose_widths import Tuner
from passes.ir.pipeline import Note
from passes.network import layers
from passes.targets import AVX512, Layer
from sbp_compile.tuning import LayerTimes, OnnxruntimeTuner
from sbp_compile.tuning.layer_models import input_sizes, layer_model, shape_of
from tests.passes.support import assert_same, capture

LAYERS = [
    Layer(0, 1, 1),
    Layer(0, 1, 7),
    Layer(1, 3, 20),
    Layer(1, 1, 5),
    Layer(2, 1, 49),
    Layer(2, 9, 7 * 9),
    Layer(2, 4, 13),
    Layer(2, 7, 30),
    Layer(2, 9, 36, groups=8, is_depthwise=True),
    Layer(2, 9, 36, groups=2),
]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(3, 48, 3), nn.Conv2d(48, 48, 3), nn.Conv2d(48, 4, 1)
        self.register_buffer("mask", (torch.arange(48) < 37).float().view(1, -1, 1, 1))

    def forward(self, x):
        x = (self.first(x) * self.mask + 0.1).relu()
        return self.last((self.second(x) * self.mask).relu())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_model_of_a_layer_runs_at_its_widths_and_positions(layer):
    inputs, outputs = (8, 8) if layer.is_depthwise else (8, 6)
    session = onnxruntime.InferenceSession(layer_model([(layer, inputs, outputs)], 2))
    x = np.ones(input_sizes(layer, inputs, 2), np.float32)
    (y,) = session.run(None, {"x": x})
    assert y.shape == input_sizes(layer, outputs, 2)
    assert y.size == 2 * layer.positions * outputs


def test_a_layer_without_a_model_is_not_timed():
    assert shape_of(Layer(3, 27, 64)) is None
    assert shape_of(Layer(2, 4, 64, is_transposed=True)) is None
    with pytest.raises(ValueError, match="has no model"):
        layer_model([(Layer(3, 27, 64), 4, 4)], 1)


class Scripted:
    """A tuner that measures nothing: a target that likes one width, and an answer given beforehand."""

    def __init__(self, answer):
        self.answer, self.seen = answer, {}

    def target(self, original, minimal, table):
        return AVX512

    def fastest(self, programs):
        self.seen = {name: next(iter(layers(program))).out_channels for name, program in programs.items()}
        return self.answer, Note("tuning", "scripted")


@pytest.mark.parametrize(
    ("answer", "width"), [("minimal", 37), ("table", 37), ("tuned", 40), ("every channel", 48)]
)
def test_the_network_that_the_tuner_names_is_taken(answer, width):
    program = capture(Masked().double(), torch.rand(2, 3, 12, 12, dtype=torch.float64))
    tuner: Tuner = Scripted(answer)
    steps = []
    result = default_pipeline(tuner=tuner).with_callback(steps.append)(program)
    others = dict.fromkeys(COSTS, 40) | {"every channel": 48}
    assert tuner.seen == {"minimal": 37, "table": 37, "tuned": 40, **others}
    assert next(iter(layers(result.program))).out_channels == width
    assert steps[-1].after is result.program
    assert result.notes[-1].text == "scripted"
    assert_same(program, result.program)


def test_a_tuned_network_is_exact_and_says_what_was_measured(tmp_path):
    tuner = OnnxruntimeTuner(LayerTimes.of_this_machine(), seconds=1.0)
    network = Masked()
    pipeline = default_pipeline(target=this_cpu(), tuner=tuner)
    compiled = sbp_compile.compile(network, torch.rand(2, 3, 12, 12), pipeline=pipeline)
    compiled.save(tmp_path / "small.onnx")
    (note,) = [note for note in compiled.report.notes if note.where == "tuning"]
    assert f"{len(tuner.times.seconds)} of {len(tuner.times.seconds)} layers" in note.text
    assert all(0 < seconds < 1 for seconds in tuner.times.seconds.values())
    onnx.checker.check_model(tmp_path / "small.onnx")


def test_known_times_are_not_taken_again():
    program = capture(Masked().double(), torch.rand(2, 3, 12, 12, dtype=torch.float64))
    minimal = default_pipeline()(program).program
    times = LayerTimes.of_this_machine()
    OnnxruntimeTuner(times, seconds=0.2).target(program, minimal, AVX512)
    before = dict(times.seconds)
    again = OnnxruntimeTuner(times, seconds=1e-9)
    again.target(program, minimal, AVX512)
    assert times.seconds == before
    assert again.asked >= again.measured == len(before) > 0


def test_a_budget_that_is_over_leaves_the_rest_to_the_table():
    program = capture(Masked().double(), torch.rand(2, 3, 12, 12, dtype=torch.float64))
    minimal = default_pipeline()(program).program
    tuner = OnnxruntimeTuner(LayerTimes.of_this_machine(), seconds=1e-9)
    target = tuner.target(program, minimal, AVX512)
    assert tuner.measured == 0 < tuner.asked
    layer = Layer(2, 9, 100)
    assert target.seconds(layer, 37, 37) == AVX512.seconds(layer, 37, 37)
