"""Inputs made from what a model declares: shapes, ranges, and what has to be said by the user."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto

from sbp_compile.errors import InputError, UnsupportedModelError, UsageError
from sbp_compile.timing import compare
from sbp_compile.timing.inputs import Declared, make_inputs

MakeModel = Callable[..., bytes]
fast = functools.partial(compare, budget_s=0.4, target_half_width=0.5)


def test_a_dynamic_axis_other_than_the_batch_needs_a_shape(sequence: bytes) -> None:
    with pytest.raises(InputError, match=r"dynamic axis 1 \(length\).*--shape x=batch,length,8"):
        compare({"sequence": sequence})


@pytest.mark.parametrize("shapes", [{"x": ["batch", 5, 8]}, {"length": 5}, {"length": [5]}])
def test_a_shape_is_given_for_the_input_or_for_the_named_axis(
    shapes: dict[str, int | list[int | str]],
) -> None:
    declared = [Declared("x", "tensor(float)", ("batch", "length", 8))]
    assert make_inputs("m", declared, batch=3, shapes=shapes, seed=0)["x"].shape == (3, 5, 8)


def test_the_batch_is_the_axis_of_that_name_and_else_the_first() -> None:
    named = Declared("x", "tensor(float)", (4, "batch"))
    unnamed = Declared("y", "tensor(float)", (None, 4))
    inputs = make_inputs("m", [named, unnamed], batch=7, shapes={}, seed=0)
    assert (inputs["x"].shape, inputs["y"].shape) == ((4, 7), (7, 4))


def test_a_shape_that_does_not_fit_is_refused(cheap: bytes) -> None:
    with pytest.raises(InputError, match=r"\(batch, 9\) does not fit input 'x'"):
        compare({"cheap": cheap}, shapes={"x": ["batch", 9]})


def test_a_shape_for_an_unknown_name_is_refused(cheap: bytes) -> None:
    with pytest.raises(UsageError, match="shape 'z' is no input or axis of these models; known: batch, x"):
        compare({"cheap": cheap}, shapes={"z": 3})


def test_a_fixed_batch_is_not_reported_as_another(matmul_model: MakeModel) -> None:
    with pytest.raises(InputError, match="has a batch of 2, not 16"):
        compare({"fixed": matmul_model(8, shape=(2, 8))}, batch=16)


def test_inputs_repeat_under_a_seed_and_stay_within_a_sane_range() -> None:
    kinds = {"float16": "float16", "double": "float64", "int64": "int64", "uint8": "uint8", "bool": "bool"}
    declared = [Declared(kind, f"tensor({kind})", ("batch", 50)) for kind in kinds]
    first, again, other = (make_inputs("m", declared, batch=4, shapes={}, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in kinds)
    assert not np.array_equal(first["double"], other["double"])
    assert {name: str(value.dtype) for name, value in first.items()} == kinds
    assert set(np.unique(first["int64"])) == {0, 1}


def test_a_text_input_is_refused_by_type() -> None:
    declared = [Declared("x", "tensor(string)", ("batch",))]
    with pytest.raises(UnsupportedModelError, match=r"tensor\(string\)"):
        make_inputs("m", declared, batch=1, shapes={}, seed=0)


def test_integer_inputs_run(matmul_model: MakeModel) -> None:
    result = fast({"integers": matmul_model(8, dtype=TensorProto.INT64)})
    assert result.models[0].samples > 0
