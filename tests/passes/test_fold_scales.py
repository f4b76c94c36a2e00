"""A scale goes forward alone where the shift beside it has to stay."""

import pytest
import torch
from torch import nn

from passes.fold_scales import LARGEST_SHIFT
from tests.passes.support import check, targets_of

aten = torch.ops.aten


class PreActivation(nn.Module):
    """A value with two readers; one reads it through a scale, a shift and a relu."""

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, padding=1)
        self.register_buffer("scale", scale.view(1, -1, 1, 1))
        self.register_buffer("shift", shift.view(1, -1, 1, 1))

    def forward(self, x):
        x = self.first(x).sigmoid()
        return self.second(torch.relu(x * self.scale + self.shift)), x


def compiled(scale, shift):
    return check(PreActivation(scale, shift).double(), torch.randn(2, 3, 9, 9, dtype=torch.float64))


SHIFT = torch.tensor([0.5, -1.0, 2.0, 0.25, -0.5, 1.0]).double()


def test_a_positive_scale_in_front_of_a_shift_and_a_relu_goes_into_the_next_layer():
    small = compiled(torch.rand(6).double() + 0.1, SHIFT)
    assert aten.mul.Tensor not in targets_of(small)
    assert aten.add.Tensor in targets_of(small)


def test_so_does_one_that_is_zero_where_the_shift_is():
    scale = torch.rand(6).double() + 0.1
    scale[1], shift = 0.0, SHIFT.clone()
    shift[1] = 0.0
    assert aten.mul.Tensor not in targets_of(compiled(scale, shift))


@pytest.mark.parametrize("broken", [-0.5, 0.0, 1e-3 / LARGEST_SHIFT])
def test_a_scale_that_cannot_stays_in_front_of_the_shift(broken):
    scale = torch.rand(6).double() + 0.1
    scale[1] = broken
    assert aten.mul.Tensor in targets_of(compiled(scale, SHIFT))


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.layer(x)
        return x + x + 1.0


def test_a_shift_does_not_go_into_a_value_that_is_added_to_itself():
    check(Doubled().double(), torch.randn(2, 3, 5, 5, dtype=torch.float64))
