"""Multiply-adds of one example."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.ir.cost import count
from tests.passes.support import capture


class On(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize(
    ("module", "shapes", "macs"),
    [
        (nn.Conv2d(6, 8, 3, padding=1, groups=2), [(2, 6, 5, 4)], 5 * 4 * 8 * 3 * 9),
        (nn.ConvTranspose2d(6, 8, 3, 2, groups=2), [(2, 6, 5, 4)], 5 * 4 * 6 * 4 * 9),
        (nn.ConvTranspose1d(6, 8, 4, 2, 1), [(2, 6, 5)], 5 * 6 * 8 * 4),
        (nn.Linear(6, 8), [(2, 5, 6)], 5 * 6 * 8),
        (On(torch.bmm), [(2, 3, 4), (2, 4, 5)], 3 * 4 * 5),
        (On(F.scaled_dot_product_attention), [(2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 7)], 3 * 4 * 5 * (6 + 7)),
    ],
    ids=["groups", "transposed with groups", "transposed", "linear", "bmm", "attention"],
)
def test_multiply_adds_are_those_of_one_example(module, shapes, macs):
    assert count(capture(module, *(torch.randn(shape) for shape in shapes), dynamic=False)).macs == macs
