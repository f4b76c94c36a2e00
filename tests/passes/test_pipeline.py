from dataclasses import dataclass

import pytest
import torch
from torch import nn

from passes import AnalyzeChannels, LintError, PassError, Pipeline, Result, ShrinkChannels, default_pipeline
from passes.absorb_constants import AbsorbConstants
from passes.separate_edges import SeparateEdges
from tests.passes.support import capture


@pytest.fixture
def program():
    return capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))


@dataclass(frozen=True)
class Failing:
    name: str = "failing"

    def __call__(self, program):
        raise PassError("no such luck")


@dataclass(frozen=True)
class Breaking:
    """Returns a Program that breaks an invariant: a constant in float32."""

    name: str = "breaking"

    def __call__(self, program):
        constants = {name: value.float() for name, value in program.constants.items()}
        return Result(program.replace(constants=constants), True)


def test_a_failing_pass_is_named_with_its_pipeline(program):
    with pytest.raises(PassError, match=r"^outer/inner: inner/failing: no such luck$"):
        Pipeline((Pipeline((Failing(),), name="inner"),), name="outer")(program)


def test_a_program_that_breaks_an_invariant_does_not_leave_the_pass(program):
    with pytest.raises(LintError, match=r"breaking: constant '.*': have torch.float32, want torch.float64"):
        Pipeline((Breaking(),))(program)


@pytest.mark.parametrize("entry", [ShrinkChannels(), AbsorbConstants(), SeparateEdges()])
def test_passes_that_need_an_analysis_say_so(program, entry):
    with pytest.raises(PassError, match="run analyze_channels first"):
        entry(program)


def test_shrinking_without_absorbing_is_refused_where_it_would_be_wrong():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        network[0].weight[:4] = 0.0
        network[0].bias[:4] = 1.0
    program = capture(network, torch.randn(2, 3, 5, 5))
    with pytest.raises(PassError, match="run absorb_constants first"):
        Pipeline((AnalyzeChannels(), ShrinkChannels()))(default_pipeline().passes[0](program).program)


def test_a_repeated_pipeline_stops_when_nothing_changes(program):
    names = []
    default_pipeline().with_callback(lambda step: names.append(step.name))(program)
    assert names.count("shrink_channels") <= 2
    assert names[0] == "canonicalize"
    assert names[-1] == "remove_dead"
