"""torch publishes neither schemas of overloads nor their class; these tests say when what is used of them changes."""

import operator

import torch
from torch import fx

from passes.ir import schema

aten = torch.ops.aten


def call_of(target, *args, **kwargs):
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph.call_function(target, tuple(x if arg == "x" else arg for arg in args), kwargs), x


def test_arguments_are_bound_by_schema_name_with_defaults():
    node, x = call_of(aten.add.Tensor, "x", 2.0, alpha=3)
    assert schema.bind(node) == {"self": x, "other": 2.0, "alpha": 3}
    node, x = call_of(aten.max_pool2d.default, "x", [2, 2])
    assert schema.bind(node) == {
        "self": x, "kernel_size": [2, 2], "stride": [], "padding": [0, 0], "dilation": [1, 1], "ceil_mode": False,
    }  # fmt: skip


def test_overloads_are_told_from_other_functions():
    assert schema.is_overload(aten.relu.default)
    assert not schema.is_overload(torch.relu)
    assert not schema.is_overload(aten.relu)


def test_random_and_mutating_overloads_are_not_deterministic():
    assert schema.is_deterministic(aten.relu.default)
    assert schema.is_deterministic(operator.getitem)
    for overload in (aten.rand.default, aten.relu_.default, aten.empty.memory_format, aten.bernoulli.default):
        assert not schema.is_deterministic(overload)


def test_dropout_in_eval_mode_draws_nothing():
    assert schema.is_random(call_of(aten.dropout.default, "x", 0.5, True)[0])
    assert not schema.is_random(call_of(aten.dropout.default, "x", 0.5, False)[0])


def test_a_call_is_made_with_its_operands_replaced():
    node, x = call_of(aten.add.Tensor, "x", 2.0, alpha=3)
    assert schema.call(node, {x: torch.ones(2)}.__getitem__).tolist() == [7.0, 7.0]
