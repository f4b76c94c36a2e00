import torch

from passes.ir.basis import express
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, all_over_others, any_over_others, reduce_to
from passes.ir.program import TensorInfo
from tests.passes.support import capture


def info(*sizes):
    return TensorInfo(sizes, sizes, torch.float64)


def test_values_that_are_not_finite_are_never_known():
    facts = Facts.constant(torch.tensor([1.0, torch.inf, -torch.inf, torch.nan]).double())
    assert facts.known.expand(4).tolist() == [True, False, False, False]


def test_facts_are_stored_at_size_one_where_nothing_varies():
    value = torch.tensor([1.0, 2.0]).double().reshape(1, 2, 1).expand(3, 2, 4)
    stored = Facts(value, torch.ones(3, 2, 4, dtype=torch.bool)).compress()
    assert stored.value.shape == (1, 2, 1)
    assert stored.known.shape == (1, 1, 1)
    assert torch.equal(stored.expand((0, 1, 2), info(3, 2, 4)).value, value)


def test_the_join_keeps_what_both_know_and_agree_on():
    first = Facts(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, False]))
    second = Facts(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([True, True, True]))
    assert first.join(second).known.tolist() == [True, False, False]


def test_masks_reduce_along_all_other_axes():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert any_over_others(mask, 1, 3).tolist() == [True, True, False]
    assert all_over_others(mask, 1, 3).tolist() == [True, False, False]


def test_demand_reduces_to_an_operand_that_is_broadcast():
    demand = torch.tensor([[[True], [False]], [[False], [False]]])
    assert reduce_to(demand, info(2, 1)).tolist() == [[True], [False]]
    assert reduce_to(demand, info(1, 1)).tolist() == [[True]]


def test_maps_are_expressed_in_the_fewest_of_them():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    maps = torch.randn(12, 3, generator=generator, dtype=torch.float64) @ base
    targets = torch.arange(2, 12)
    basis, coefficients = express(maps, targets, torch.arange(2))
    assert len(basis) == 3
    assert {0, 1} <= set(basis.tolist())
    assert (coefficients @ maps[basis] - maps[targets]).abs().max() < 1e-12


def test_flat_constants_need_one_representative_and_it_is_the_largest():
    maps = torch.tensor([[0.5], [-2.0], [1.0]]).double()
    basis, coefficients = express(maps, torch.arange(3), torch.arange(0))
    assert basis.tolist() == [1]
    assert coefficients.flatten().tolist() == [-0.25, 1.0, -0.5]


def test_keep_sets_only_grow_and_pass_their_reasons_on():
    program = capture(torch.nn.ReLU(), torch.randn(2, 4))
    x, y = program.nodes[0], next(program.calls())
    keep = KeepSets(program.infos)
    keep.start(x, torch.tensor([[True, False, False, False]]))
    keep.start(y, torch.tensor([[False, False, True, False]]))
    keep.widen(y, 1, torch.tensor([False, False, False, True]), "because")
    keep.tie((x, 1), (y, 1), "aligned")
    assert keep.get(x, 1).tolist() == keep.get(y, 1).tolist() == [True, False, True, True]
    assert keep.get(x, 0).all()
    assert keep.reasons(x.name, 1) == [("because", 1), ("aligned", 1)]
    assert keep.needed(x.name, 1) == 1
    keep.widen(x, 1, torch.zeros(4, dtype=torch.bool), "nothing")
    assert keep.count(x, 1) == 3
