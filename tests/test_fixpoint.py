"""The compiler on its own output changes nothing: representatives and gathers are recognised for what they are."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import sbp_compile

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from networks import NETWORKS, Places, as_trained

SIZE = torch.ops.aten.sym_size.int


@pytest.mark.parametrize(
    ("placement", "name"),
    [
        ("before norm", "LeNet-5"),
        ("before norm", "ResNet"),
        ("before norm", "DenseNet"),
        ("everywhere", "LeNet-5"),
        pytest.param("everywhere", "ResNet", marks=pytest.mark.slow),
        pytest.param("everywhere", "DenseNet", marks=pytest.mark.slow),
    ],
)
def test_compiling_the_compiled_network_gives_the_same_network(placement, name):
    torch.manual_seed(0)
    network = as_trained(NETWORKS[name](Places(placement)), 0.5)
    example = torch.randn(2, *network.shape)
    once = sbp_compile.compile(network, example)
    assert once.report.after.parameters < once.report.before.parameters
    twice = sbp_compile.compile(once.module, example)
    assert contents(twice.program) == contents(once.program)
    assert twice.report.after == once.report.after


def contents(program):
    """Operators and parameters, rounded as in the file; where a size is read first depends on the capture."""
    operators = Counter(str(node.target) for node in program.calls() if node.target is not SIZE)
    parameters = Counter(
        (tuple(value.shape), (value.to(program.dtypes[name]) + 0).numpy().tobytes())  # + 0: no negative zeros
        for name, value in program.constants.items()
    )
    return operators, parameters
