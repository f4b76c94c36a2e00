import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.rules.between import LIVE, Between, free_axes, kept_by
from tests.passes.support import check, shapes_of, targets_of

aten = torch.ops.aten
FREE = free_axes("height", "width")
EVEN = (torch.arange(6) % 2 == 0).view(6, 1, 1)


def test_choices_and_fills_leave_masked_channels_alone():
    functions = {
        "masked_fill": lambda x: x.masked_fill(x > 1, 0.5),
        "masked_fill by a tensor": lambda x: x.masked_fill(x > 1, torch.tensor(0.5)),
        "where a number": lambda x: torch.where(x > 1, 2.0, x),
        "or a number": lambda x: torch.where(x > 1, x, 0.0),
        "lerp": lambda x: torch.lerp(x, x * x, 0.3),
        "nan_to_num": lambda x: x.nan_to_num(),
        "clip": lambda x: x.clip(0.1, 0.9),
        "hypot": lambda x: torch.hypot(x, x + 1),
    }
    parts = {name: Between(function) for name, function in functions.items()}
    for dynamic in (True, FREE):
        assert kept_by(parts, 8, 8, dynamic=dynamic) == dict.fromkeys(parts, LIVE)


def test_a_constant_condition_is_a_mask():
    functions = {
        "masked_fill": lambda x: x.masked_fill(~EVEN, 0.25),
        "where": lambda x: torch.where(EVEN, x, 0.25),
        "where not": lambda x: torch.where(~EVEN, 0.25, x),
    }

    class Unmasked(Between):
        def __init__(self, function):
            super().__init__(function, bias=False)
            self.mask.fill_(1.0)

    parts = {name: Unmasked(function) for name, function in functions.items()}
    assert kept_by(parts, 8, 8) == dict.fromkeys(parts, LIVE)


def test_the_slopes_of_a_prelu_go_with_their_channels():
    def through(prelu):
        return lambda x: prelu(x - 0.7)

    parts = {
        "each": Between(through(nn.PReLU(6))),
        "one": Between(through(nn.PReLU())),
        "computed": Between(lambda x: F.prelu(x - 0.7, x.mean((0, 2, 3)))),
    }
    for part in (parts["each"], parts["one"]):
        part.slopes = part.function.__closure__[0].cell_contents
        part.slopes.weight.data = torch.rand(part.slopes.weight.shape) - 0.5
    for dynamic in (True, FREE):
        assert kept_by(parts, 8, 8, dynamic=dynamic) == dict.fromkeys(parts, LIVE)


def test_a_prelu_of_rows_has_its_slopes_along_the_last_axis():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.prelu, self.last = nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 2)
            self.register_buffer("mask", EVEN.flatten().float())

        def forward(self, x):
            return self.last(self.prelu(self.first(x) * self.mask))

    result = check(Rows(), torch.randn(3, 4))
    assert aten.prelu.default in targets_of(result)
    assert shapes_of(result)["prelu.weight"] == (3,)
