"""Chains of views and permutations, against the same chain on numbered entries."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.ir.axes import AxisRead, Reading
from passes.ir.program import TensorInfo
from passes.ir.regroup import layout_of, permuted, reordered_axis, viewed

SIZES = (2, 6, 4)


def info(*sizes):
    return TensorInfo(sizes, sizes, torch.float64)


def factored(draw, count):
    """Sizes whose product is `count`."""
    sizes = []
    while count > 1 and len(sizes) < 4:
        size = draw(st.sampled_from([part for part in range(1, count + 1) if count % part == 0]))
        sizes.append(size)
        count //= size
    return (*sizes, count)


@st.composite
def chains(draw):
    """Views and permutations; the last one is a view back to the first shape."""
    steps, sizes = [], SIZES
    for _ in range(draw(st.integers(1, 3))):
        sizes = factored(draw, prod(sizes))
        order = draw(st.permutations(range(len(sizes))))
        steps.append((sizes, order))
        sizes = tuple(sizes[axis] for axis in order)
    return steps


@settings(max_examples=300, deadline=None)
@given(chains())
def test_what_a_chain_does_to_one_axis_is_what_it_does_to_the_entries(steps):
    entries, layout = torch.arange(prod(SIZES)).view(SIZES), layout_of(info(*SIZES))
    for sizes, order in steps:
        entries = entries.reshape(sizes).permute(order)
        layout = layout and viewed(layout, info(*sizes))
        layout = layout and permuted(layout, Reading.of_axes(order))
    layout = layout and viewed(layout, info(*SIZES))
    found = layout and reordered_axis(layout, info(*SIZES))
    if found:
        axis, positions = found
        source = torch.arange(prod(SIZES)).view(SIZES)
        wanted = source if positions is None else source.index_select(axis, positions)
        assert torch.equal(entries.reshape(SIZES), wanted)


@pytest.mark.parametrize(
    ("shape", "order", "axis"), [((2, 2, 3, 4), (0, 2, 1, 3), 1), ((2, 6, 2, 2), (0, 1, 3, 2), 2)]
)
def test_factors_of_one_axis_that_change_places_reorder_it(shape, order, axis):
    layout = permuted(viewed(layout_of(info(*SIZES)), info(*shape)), Reading.of_axes(order))
    layout = viewed(layout, info(*SIZES))
    where, positions = reordered_axis(layout, info(*SIZES))
    wanted = torch.arange(prod(SIZES)).view(shape).permute(order).reshape(SIZES)
    assert where == axis
    assert torch.equal(torch.arange(prod(SIZES)).view(SIZES).index_select(axis, positions), wanted)


def test_a_chain_that_changes_nothing_has_no_positions():
    layout = viewed(viewed(layout_of(info(*SIZES)), info(2, 2, 3, 4)), info(*SIZES))
    assert reordered_axis(layout, info(*SIZES)) == (0, None)


@pytest.mark.parametrize("sizes", [(6, 2, 4), (2, 24), (2, 4, 6)])
def test_other_axes_than_the_first_operand_had_are_no_reordered_axis(sizes):
    assert reordered_axis(viewed(layout_of(info(*SIZES)), info(2, 2, 3, 4)), info(*sizes)) is None


def test_axes_that_change_places_are_no_reordered_axis():
    square = info(4, 4)
    assert reordered_axis(permuted(layout_of(square), Reading.of_axes((1, 0))), square) is None


def test_a_reading_at_positions_is_no_permutation():
    layout = layout_of(info(*SIZES))
    assert permuted(layout, Reading.along_axis(3, AxisRead(1, torch.tensor([1, 0])))) is None
    assert permuted(layout, Reading.along_axis(3, AxisRead(1, numbered=False))) is None


def test_only_an_axis_of_size_one_may_be_dropped():
    with_one = info(2, 1, 6)
    assert permuted(layout_of(with_one), Reading.of_axes((0, 2), dropped=(1,))) is not None
    assert permuted(layout_of(info(*SIZES)), Reading.of_axes((0, 2), dropped=(1,))) is None


def test_sizes_that_no_factors_multiply_to_are_no_view():
    assert viewed(layout_of(info(2, 6, 4)), info(3, 16)) is None
