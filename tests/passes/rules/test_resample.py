import pytest
import torch
import torch.nn.functional as F

from tests.passes.rules.between import LIVE, Between, compiled, free_axes, kept_after, kept_by
from tests.passes.support import check

FREE = free_axes("height", "width")
SIZES = {1: (7,), 2: (6, 7), 3: (4, 5, 3)}
MODES = {
    1: ("nearest", "nearest-exact", "linear"),
    2: ("nearest", "nearest-exact", "bilinear", "bicubic"),
    3: ("nearest", "nearest-exact", "trilinear"),
}


def resampled(modes, rank=2, **arguments):
    return {
        mode: Between(lambda x, mode=mode: F.interpolate(x, mode=mode, **arguments), rank=rank)
        for mode in modes
    }


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_masked_channels_go_through_resampling(rank):
    parts = resampled(MODES[rank], rank, scale_factor=2)
    assert kept_by(parts, *SIZES[rank]) == dict.fromkeys(parts, LIVE)


def test_free_sizes_and_fractional_factors():
    parts = resampled(("nearest", "bilinear", "bicubic"), scale_factor=1.5)
    assert kept_by(parts, 12, 12, dynamic=FREE, unseen=(19, 10)) == dict.fromkeys(parts, LIVE)


def test_given_sizes_aligned_corners_and_antialiasing():
    parts = {
        **resampled(["nearest"], size=(9, 13)),
        **resampled(["bilinear"], size=(9, 13), align_corners=True),
        **resampled(["bicubic"], size=(4, 5), antialias=True),
    }
    assert kept_by(parts, 6, 7) == dict.fromkeys(parts, LIVE)


def test_the_size_of_another_value_is_taken_at_run_time():
    module = Between(lambda x: x + F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:], mode="bilinear"))
    result = compiled(module, 12, 12, dynamic=FREE, unseen=(21, 14))
    assert kept_after(result) == LIVE


def test_constants_that_differ_by_position_are_resampled():
    def function(mode):
        return lambda x: F.interpolate(F.avg_pool2d(x, 3, 1, 1), scale_factor=2, mode=mode)

    parts = {mode: Between(function(mode)) for mode in MODES[2]}
    assert kept_by(parts, 6, 7) == dict.fromkeys(parts, LIVE + 1)


def test_constants_that_differ_by_position_meet_a_size_known_at_run_time():
    class Sized(Between):
        def forward(self, x, like):
            def function(value):
                return F.interpolate(F.avg_pool2d(value, 3, 1, 1), size=like.shape[2:], mode="nearest")

            self.function = function
            return super().forward(x)

    dynamic = (*free_axes(), {2: torch.export.Dim("height"), 3: torch.export.Dim("width")})
    result = check(Sized(None), torch.randn(2, 2, 6, 6), torch.randn(1, 1, 9, 8), dynamic=dynamic)
    assert kept_after(result) == 2 * LIVE
