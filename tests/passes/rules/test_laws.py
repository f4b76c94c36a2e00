import pytest
import torch

from passes.rules import registered_rules
from tests.passes.rules.laws import Case, check_backward, check_forward, check_rewrite
from tests.passes.rules.samples import samples_of

SEEDS = range(6)
OVERLOADS = sorted(registered_rules(), key=str)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cases(overload):
    for position, sample in enumerate(samples_of(overload)):
        for seed in SEEDS:
            yield Case(sample, 1000 * position + seed)


@pytest.mark.parametrize("overload", OVERLOADS, ids=str)
def test_every_rule_covers_its_samples(overload):
    assert any(Case(sample, 0).is_covered for sample in samples_of(overload))


@pytest.mark.parametrize("overload", OVERLOADS, ids=str)
def test_what_forward_claims_known_is_known(overload):
    for case in cases(overload):
        check_forward(case)


@pytest.mark.parametrize("overload", OVERLOADS, ids=str)
def test_what_backward_calls_dead_changes_nothing_live(overload):
    for case in cases(overload):
        check_backward(case)


@pytest.mark.parametrize("overload", OVERLOADS, ids=str)
def test_the_rewritten_op_gives_the_kept_entries(overload):
    for case in cases(overload):
        check_rewrite(case)
