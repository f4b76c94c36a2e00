"""A list of architectures in plain torch, with noise at chosen places and masks on."""

from __future__ import annotations

from tests.zoo import (
    audio_video,
    dense,
    detection,
    generative,
    mobile,
    plain,
    recommend,
    residual,
    segmentation,
    sequence,
    transformer,
    unusual_generators,
    unusual_images,
    unusual_sequences,
    vision_transformer,
)
from tests.zoo.architecture import Architecture
from tests.zoo.masking import PLACEMENTS, masked_network
from tests.zoo.places import Places

__all__ = ["PLACEMENTS", "ZOO", "Architecture", "Places", "masked_network"]

FAMILIES = (
    plain,
    residual,
    mobile,
    dense,
    segmentation,
    detection,
    generative,
    audio_video,
    vision_transformer,
    transformer,
    sequence,
    recommend,
    unusual_images,
    unusual_generators,
    unusual_sequences,
)

ZOO: dict[str, Architecture] = {
    architecture.name: architecture for family in FAMILIES for architecture in family.ARCHITECTURES
}
