"""Operators that torch composes of others lose channels as the others do, and none is left that nobody knows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.canonicalize import Canonicalize
from passes.rules import OPAQUE, rule_for
from sbp_compile.capture.composites import composites
from sbp_compile.capture.export import export_module
from sbp_compile.capture.program import program_from_export
from tests.passes.rules.between import LIVE, Between, kept_by

ALIASES = {
    "multiply": lambda x: torch.multiply(x, x.abs()),
    "divide": lambda x: torch.true_divide(torch.divide(x, 2.0), 3.0),
    "subtract": lambda x: torch.subtract(x, 0.5),
    "concat": lambda x: torch.concatenate([torch.concat([x, x.abs()], 3), torch.concat([x, x], 3)], 2),
    "compared": lambda x: torch.where(torch.greater(x, 0.1), torch.negative(x), x),
    "arctan": lambda x: torch.arctan(torch.absolute(x)),
    "special": lambda x: torch.special.expit(x) + torch.special.erf(x),
    "type_as": lambda x: x.type_as(x.abs()),
    "swapped": lambda x: torch.swapaxes(torch.moveaxis(x, 2, 3), 2, 3),
}
COMPOSED = {
    "vstack": lambda x: torch.vstack([x, x.abs()]),
    "hstack": lambda x: torch.hstack([x[0], x[1]]),
    "dstack": lambda x: torch.dstack([x, x]),
    "fliplr": lambda x: torch.fliplr(torch.flipud(x)),
    "diff": lambda x: torch.diff(x),
    "take_along_dim": lambda x: torch.take_along_dim(x, torch.zeros(1, 1, 1, 1, dtype=torch.long), 3),
    "outer": lambda x: torch.outer(x[0, 0, 0], x[0, 1, 0]),
    "inner": lambda x: torch.inner(x, x),
    "kron": lambda x: torch.kron(x[0, 0], x[0, 1]),
    "diag": lambda x: torch.diag(x[0, 0]),
    "cross": lambda x: torch.linalg.cross(x[..., :3], x[..., 1:4]),
    "norm": lambda x: torch.linalg.norm(x[0, 0]),
    "mse": lambda x: F.mse_loss(x, x.abs(), reduction="none"),
    "huber": lambda x: F.huber_loss(x, x.abs(), reduction="none"),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0, 0], x[0, 0, 1], indexing="ij")[0],
    "isclose": lambda x: torch.isclose(x, x.abs()),
}


def test_aliases_leave_masked_channels_alone():
    parts = {name: Between(function) for name, function in ALIASES.items()}
    assert kept_by(parts, 8, 8) == dict.fromkeys(parts, LIVE)


@pytest.mark.parametrize("name", COMPOSED)
def test_what_torch_composes_has_rules(name):
    class Composed(nn.Module):
        def forward(self, x):
            return COMPOSED[name](x + 1)

    exported = export_module(Composed(), (torch.rand(2, 3, 4, 5),), dynamic_batch=False)
    program = Canonicalize()(program_from_export(exported)).program
    unknown = [str(node.target) for node in program.calls() if rule_for(program.op(node)) is OPAQUE]
    assert unknown == []


def test_no_composite_is_one_that_the_passes_spell_themselves():
    """Those keep their meaning in one call; taken apart they would be many."""
    names = {str(op).split(".")[1] for op in composites()}
    assert names.isdisjoint({"linear", "matmul", "conv2d", "layer_norm", "einsum", "lstm", "grid_sampler"})
    assert {"concat", "multiply", "hstack"} <= names
