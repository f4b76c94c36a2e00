"""Resampling: nearest, linear, bilinear, bicubic and trilinear interpolation, per channel.

The weights of every output position sum to 1, so a flat channel stays flat, bicubic and antialiased ones too
(up to rounding). Sizes and scale factors that are computed at run time are carried over.
"""

from __future__ import annotations

import torch

from passes.rules.base import rule
from passes.rules.spatial import SpatialRule

aten = torch.ops.aten

RESAMPLERS = {
    aten.upsample_nearest1d: 1,
    aten.upsample_nearest2d: 2,
    aten.upsample_nearest3d: 3,
    aten._upsample_nearest_exact1d: 1,
    aten._upsample_nearest_exact2d: 2,
    aten._upsample_nearest_exact3d: 3,
    aten.upsample_linear1d: 1,
    aten.upsample_bilinear2d: 2,
    aten.upsample_trilinear3d: 3,
    aten.upsample_bicubic2d: 2,
    aten._upsample_bilinear2d_aa: 2,
    aten._upsample_bicubic2d_aa: 2,
}
OVERLOADS = {packet.vec: rank for packet, rank in RESAMPLERS.items()} | {
    packet.default: rank for packet, rank in RESAMPLERS.items()
}


@rule(*OVERLOADS)
class Resample(SpatialRule):
    """upsample_* in both spellings, with a size or with scale factors."""

    spatial_rank = OVERLOADS
