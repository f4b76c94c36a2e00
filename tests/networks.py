"""Small networks that the tests of the compiler share."""

from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

MASK = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 1.0, 0.0, 0.0])


class Masked(nn.Module):
    """Two linear layers with a mask in between: 4 of 8 neurons are left."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)
        self.register_buffer("mask", MASK)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) * self.mask)


class Images(nn.Module):
    """Convolutions of any height and width, padded, with a mask before the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.bias = nn.Parameter(torch.randn(8, 1, 1))
        self.second = nn.Conv2d(8, 3, 3, padding=1)
        self.register_buffer("mask", MASK.reshape(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x) * self.mask + self.bias))


class PinnedBatch(Masked):
    """A network that works with two examples at a time only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(2, -1))


def run_onnx(path: Any, *inputs: Tensor) -> list[Tensor]:
    """The outputs of an ONNX file for inputs in its order."""
    session = onnxruntime.InferenceSession(str(path))
    names = [entry.name for entry in session.get_inputs()]
    feeds = dict(zip(names, (value.numpy() for value in inputs), strict=True))
    return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds)]


def assert_close(wanted: Any, got: Any, tolerance: float = 1e-5) -> None:
    """The project's measure: max|a - b| / max|a|."""
    assert wanted.shape == got.shape
    scale = wanted.double().abs().max()
    assert (wanted.double() - got.double()).abs().max() <= tolerance * scale
