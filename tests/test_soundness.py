"""Models that once got past the compiler's own proof."""

import pytest
import torch
from torch import Tensor, nn

import sbp_compile
from sbp_compile.errors import UnsupportedModelError


class OtherPathForOne(nn.Module):
    """Another function for a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.shape[0] > 1 else -self.layer(x)


def test_a_model_that_takes_another_path_for_a_batch_of_one_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"takes another path .* dynamic_batch=False"):
        sbp_compile.compile(OtherPathForOne(), torch.randn(2, 4))


def test_the_same_model_compiles_for_the_batch_that_is_used() -> None:
    model, example = OtherPathForOne(), torch.randn(1, 4)
    compiled = sbp_compile.compile(model, example, dynamic_batch=False)
    assert torch.allclose(compiled.module(example), model(example))
