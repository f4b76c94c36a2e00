import pytest
import torch
import torch.nn.functional as F

from passes import default_pipeline
from tests.passes.rules.between import CHANNELS, Between, compiled
from tests.passes.support import targets_of

aten = torch.ops.aten


@pytest.mark.parametrize("groups", [3, 6])
@pytest.mark.parametrize(
    "given", [None, torch.tensor([0.5, 2.0, 3.0, 4.0, 5.0, 6.0])], ids=["plain", "affine"]
)
def test_what_a_norm_makes_of_constants_stands_in_its_bias(groups, given):
    norm = aten.instance_norm.default if groups == CHANNELS else aten.group_norm.default

    def shifted(x):
        y = F.instance_norm(x, weight=given) if groups == CHANNELS else F.group_norm(x, groups, given)
        return y + x[:, :1] ** 2

    module = Between(shifted)
    module.mask.copy_(torch.tensor([0.7, 0.7, 0, 0, 0.7, 0]).view(6, 1, 1))
    result = compiled(module, 8, 8)
    op = next(result.op(node) for node in result.calls() if node.target is norm)
    weight, bias = op.constant("weight"), op.constant("bias")
    settled = [2, 3] if groups == 3 else [2, 3, 5]
    assert (weight == 0).nonzero().flatten().tolist() == settled
    assert bool((bias[settled] != 0).all()) == (groups == 3)  # two constants of a group differ
    again = default_pipeline()(result).program
    assert targets_of(again) == targets_of(result)


def test_a_norm_without_constants_stays_as_it_is():
    result = compiled(Between(F.instance_norm, bias=False), 8, 8)
    op = next(result.op(node) for node in result.calls() if node.target is aten.instance_norm.default)
    assert op.args["weight"] is None
