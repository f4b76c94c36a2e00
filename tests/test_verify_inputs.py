"""What the proof runs on: examples, random inputs like them, the user's own."""

import pytest
import torch
from torch import Tensor, nn

from passes import Input, Program
from sbp_compile.errors import InputError
from sbp_compile.verify_inputs import check_inputs, random_inputs
from tests.networks import Images, Masked
from tests.passes.support import capture


class Two(nn.Module):
    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return x * tokens


@pytest.fixture
def two() -> Program:
    return capture(Two(), torch.randn(4, 6), torch.randint(2, 5, (4, 6)))


def test_random_inputs_have_batch_one_and_three(two: Program) -> None:
    found = random_inputs(two, [torch.randn(4, 6), torch.randint(2, 5, (4, 6))])
    assert [[tuple(value.shape) for value in feed] for feed in found] == [[(1, 6)] * 2, [(3, 6)] * 2]


def test_integers_stay_within_the_examples_range(two: Program) -> None:
    examples = [torch.randn(4, 6), torch.tensor([[2] * 5 + [4]] * 4)]
    values = torch.cat([feed[1] for feed in random_inputs(two, examples)])
    assert values.dtype == torch.int64
    assert int(values.min()) >= 2
    assert int(values.max()) <= 4


def test_floats_have_the_examples_mean_and_scale() -> None:
    program = capture(nn.Flatten(), torch.randn(4, 50, 50))
    [_, feed] = random_inputs(program, [torch.randn(4, 50, 50) * 3 + 100])
    assert float(feed[0].mean()) == pytest.approx(100, abs=0.5)
    assert float(feed[0].std()) == pytest.approx(3, abs=0.2)


def test_they_are_the_same_every_time(two: Program) -> None:
    examples = [torch.randn(4, 6), torch.randint(2, 5, (4, 6))]
    first, second = random_inputs(two, examples), random_inputs(two, examples)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_static_batch_keeps_the_examples() -> None:
    program = capture(Masked(), torch.randn(4, 6), dynamic=False)
    assert [feed[0].shape[0] for feed in random_inputs(program, [torch.randn(4, 6)])] == [4, 4]


def test_dynamic_height_and_width_are_tried_at_another_size() -> None:
    dim = torch.export.Dim
    program = capture(
        Images(), torch.randn(2, 2, 9, 11), dynamic=({0: dim("batch"), 2: dim("height"), 3: dim("width")},)
    )
    first, second = random_inputs(program, [torch.randn(2, 2, 9, 11)])
    assert first[0].shape == (1, 2, 9, 11)
    assert second[0].shape[:2] == (3, 2)
    assert second[0].shape[2:] != (9, 11)


def test_sizes_that_belong_together_must_agree(two: Program) -> None:
    message = r"input 'tokens' has size 3 along axis 0, where 'x' has 4; the two must agree"
    with pytest.raises(InputError, match=message):
        check_inputs(two, [torch.randn(4, 6), torch.randint(2, 5, (3, 6))])


def test_inputs_are_brought_to_the_networks_dtype(two: Program) -> None:
    x, tokens = check_inputs(two, [torch.randn(4, 6).double(), torch.randint(2, 5, (4, 6)).to(torch.int8)])
    assert (x.dtype, tokens.dtype) == (torch.float32, torch.int64)


def test_an_input_without_axes_is_a_number() -> None:
    entry = Input("scale", torch.float32, (), ())
    program = capture(Masked(), torch.randn(4, 6)).replace(inputs=(entry,))
    [value] = check_inputs(program, [torch.tensor(2.0)])
    assert value.shape == ()


def test_axes_whose_everyday_sizes_agree_by_chance_may_differ() -> None:
    entry = Input("x", torch.float32, sizes=(2, 2, 6), other_sizes=(3, 3, 6), far_sizes=(2003, 256, 6))
    program = capture(nn.Linear(6, 3), torch.randn(2, 2, 6)).replace(inputs=(entry,))
    [found] = check_inputs(program, [torch.randn(2, 7, 6)])
    assert found.shape == (2, 7, 6)
