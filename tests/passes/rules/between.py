"""A function between two convolutions, behind channels of which every other one is masked."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes import Program, default_pipeline
from tests.passes.support import TOLERANCE, Dynamic, assert_same, capture, error, run, shapes_of

CHANNELS = 6
LIVE = 3
CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Between(nn.Module):
    """relu(conv(x) * mask + bias) -> function -> conv; with `bias` the removed channels are constants, not 0.

    `padding` is that of the last convolution: without it constants fit into a bias, with it one channel of theirs
    may have to stay.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        *,
        rank: int = 2,
        out: int = CHANNELS,
        bias: bool = True,
        padding: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        shape = (CHANNELS, *[1] * rank)
        self.first = CONVOLUTION[rank](2, CHANNELS, 3, padding=1)
        self.second = CONVOLUTION[rank](out, 4, 3 if padding else 1, padding=padding)
        self.register_buffer("mask", (torch.arange(CHANNELS) % 2 == 0).float().reshape(shape) * 0.7)
        self.register_buffer("bias", (torch.rand(shape) + 0.5) * bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(F.relu(self.first(x) * self.mask + self.bias)))


class Together(nn.Module):
    """Several modules on one input, exported once."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts.values())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in self.parts)


def free_axes(*names: str) -> tuple[dict[int, torch.export.Dim], ...]:
    """Dynamic shapes of one input: the batch, and the named axes from axis 2 on ("" for a static one)."""
    dims = {0: torch.export.Dim("batch")}
    dims.update({2 + at: torch.export.Dim(name, min=8, max=4096) for at, name in enumerate(names) if name})
    return (dims,)


def kept_after(result: Program) -> int:
    """How many channels the first convolution computes; 0 if there is none left."""
    return shapes_of(result).get("first.weight", (0,))[0]


def compiled(
    module: nn.Module, *sizes: int, dynamic: Dynamic = True, unseen: tuple[int, ...] = ()
) -> Program:
    """Compile for an input of shape (2, 2, *sizes) and compare in float64, at sizes `unseen` by the analysis too."""
    original = capture(module, torch.randn(2, 2, *sizes), dynamic=dynamic)
    result = default_pipeline()(original).program
    result.lint()
    assert_same(original, result)
    if unseen:
        x = torch.randn(3, 2, *unseen, dtype=torch.float64)
        for wanted, found in zip(run(original, x), run(result, x), strict=True):
            assert error(wanted, found) <= TOLERANCE
    return result


def kept_by(
    parts: Mapping[str, nn.Module], *sizes: int, dynamic: Dynamic = True, unseen: tuple[int, ...] = ()
) -> dict[str, int]:
    """Compile the parts together; how many channels the first convolution of each computes."""
    result = compiled(Together(parts), *sizes, dynamic=dynamic, unseen=unseen)
    shapes = shapes_of(result)
    return {name: shapes.get(f"parts.{at}.first.weight", (0,))[0] for at, name in enumerate(parts)}
