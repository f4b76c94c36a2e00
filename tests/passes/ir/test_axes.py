"""Axis algebra: blocks of views, and readings, held against torch on data."""

import random

import pytest
import torch

from passes.ir.axes import (
    AxisRead,
    Reading,
    any_over,
    carry,
    flatten_facts,
    gather,
    inseparable_axes,
    outer,
    projections,
    scatter,
    split_blocks,
)
from passes.ir.lattice import Facts
from passes.ir.program import TensorInfo


def info(*sizes):
    """A TensorInfo from sizes: a pair is a dynamic axis with its two examples."""
    pairs = [size if isinstance(size, tuple) else (size, size) for size in sizes]
    return TensorInfo(tuple(first for first, _ in pairs), tuple(second for _, second in pairs), torch.float64)


BATCH = (2, 3)
TIMES_8 = (16, 24)


@pytest.mark.parametrize(
    ("source", "target", "wanted"),
    [
        ([BATCH, 50, 4, 4], [BATCH, 800], [((0,), (0,)), ((1, 2, 3), (1,))]),
        ([BATCH, 10, 512], [BATCH, 10, 8, 64], [((0,), (0,)), ((1,), (1,)), ((2,), (2, 3))]),
        ([BATCH, 50, 1, 1], [BATCH, 50], [((0,), (0,)), ((1,), (1,)), ((2,), ()), ((3,), ())]),
        ([BATCH, 50], [BATCH, 50, 1], [((0,), (0,)), ((1,), (1,)), ((), (2,))]),
        ([BATCH, 6, 4], [BATCH, 3, 8], [((0,), (0,)), ((1, 2), (1, 2))]),
        ([BATCH, 8, 10, 64], [TIMES_8, 10, 64], [((0, 1), (0,)), ((2,), (1,)), ((3,), (2,))]),
        ([BATCH, 4, (96, 128)], [BATCH, (384, 512)], [((0,), (0,)), ((1, 2), (1,))]),
        ([2, 3, 4], [2, 3, 2, 2], [((0,), (0,)), ((1,), (1,)), ((2,), (2, 3))]),
        ([1, 5], [5], [((0, 1), (0,))]),
        ([BATCH, 0, 3], [BATCH, 0], [((0, 1, 2), (0, 1))]),
        ([1], [], [((0,), ())]),
    ],
)
def test_a_view_falls_into_minimal_blocks(source, target, wanted):
    blocks = split_blocks(info(*source), info(*target))
    assert [(block.ins, block.outs) for block in blocks] == wanted


def test_a_block_with_a_dynamic_axis_and_others_is_not_separable():
    blocks = split_blocks(info(BATCH, 8, 10), info(TIMES_8, 10))
    assert [block.separable for block in blocks] == [False, True]
    assert inseparable_axes(blocks) == (0, 1)


def random_factors(rng, size):
    factors = []
    for _ in range(rng.randrange(4)):
        divisor = rng.choice([number for number in range(1, size + 1) if size % number == 0])
        factors.append(divisor)
        size //= divisor
    return [*factors, size]


@pytest.mark.parametrize("seed", range(40))
def test_stored_tensors_move_through_any_static_view_as_the_data_does(seed):
    rng = random.Random(seed)
    total = rng.choice([12, 24, 36, 64])
    source, target = random_factors(rng, total), random_factors(rng, total)
    blocks = split_blocks(info(*source), info(*target))
    stored = torch.rand([size if rng.random() < 0.5 else 1 for size in source])
    moved = carry(stored, blocks, info(*source), info(*target))
    assert torch.equal(moved.expand(target), stored.expand(source).reshape(target))
    back = carry(moved, [block.flipped() for block in blocks], info(*target), info(*source))
    assert torch.equal(back.expand(source), stored.expand(source))


def test_facts_survive_an_inseparable_block_only_where_they_do_not_vary():
    value = torch.tensor([[[1.0, 5.0], [1.0, 6.0]]])
    flat = flatten_facts(Facts(value, torch.ones(1, 1, 1, dtype=torch.bool)), (1,))
    assert flat.known.shape == (1, 1, 2)
    assert flat.known.flatten().tolist() == [True, False]
    assert float(flat.value[0, 0, 0]) == 1.0


def test_any_over_reduces_the_given_axes_alone():
    mask = torch.tensor([[True, False, False], [False, False, True]])
    assert any_over(mask, (0,)).tolist() == [[True, False, True]]


def test_projections_of_an_outer_product_are_its_factors():
    first, second = torch.tensor([True, False, True]), torch.tensor([False, True])
    assert [mask.tolist() for mask in projections(outer([first, second]), [3, 2])] == [
        first.tolist(),
        second.tolist(),
    ]
    assert outer([]).tolist() == [True]


READINGS = {
    "permute": (Reading.of_axes([2, 0, 1]), lambda x: x.permute(2, 0, 1)),
    "unsqueeze": (Reading.of_axes([0, None, 1, 2]), lambda x: x.unsqueeze(1)),
    "slice": (Reading.along_axis(3, AxisRead(1, torch.tensor([1, 3]))), lambda x: x[:, 1:5:2]),
    "select": (Reading((AxisRead(0), AxisRead(2)), {1: 4}), lambda x: x[:, 4]),
    "repeated index": (
        Reading.along_axis(3, AxisRead(2, torch.tensor([1, 1, 0]))),
        lambda x: x[:, :, [1, 1, 0]],
    ),
    "flip": (Reading.along_axis(3, AxisRead(1, torch.arange(6).flip(0))), lambda x: x.flip(1)),
    "tiles": (Reading.along_axis(3, AxisRead(2, torch.arange(4).repeat(3))), lambda x: x.repeat(1, 1, 3)),
}
SOURCE = info(5, 6, 4)


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize(
    "sizes", [(5, 6, 4), (1, 6, 4), (5, 1, 4), (5, 6, 1), (1, 1, 4), (1, 6, 1), (1, 1, 1)]
)
def test_a_reading_moves_stored_tensors_as_the_operator_moves_data(name, sizes):
    reading, operator = READINGS[name]
    stored = torch.rand(sizes)
    wanted = operator(stored.expand(SOURCE.sizes))
    assert torch.equal(gather(stored, reading).expand(wanted.shape), wanted)


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("seed", range(4))
def test_scatter_marks_exactly_the_entries_that_the_marked_results_read(name, seed):
    reading, operator = READINGS[name]
    generator = torch.Generator().manual_seed(seed)
    numbers = operator(torch.arange(120).reshape(SOURCE.sizes))
    sizes = [size if torch.rand(1, generator=generator) < 0.6 else 1 for size in numbers.shape]
    mask = torch.rand(sizes, generator=generator) < 0.3
    wanted = torch.zeros(120, dtype=torch.bool)
    wanted[numbers[mask.expand(numbers.shape)]] = True
    assert torch.equal(scatter(mask, reading, SOURCE).expand(SOURCE.sizes), wanted.reshape(SOURCE.sizes))
