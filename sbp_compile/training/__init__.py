"""Training with Structured Bayesian Pruning: the paper's networks, data readers, recipes and the loop."""

from sbp_compile.training.data import (
    DatasetError,
    ImageData,
    load,
    load_digits,
    load_idx_folder,
    read_idx,
    to_tensor,
)
from sbp_compile.training.loop import (
    Epoch,
    Observer,
    Result,
    evaluate,
    predict,
    train,
    with_noise,
)
from sbp_compile.training.models import ConvBlock, LeNet5, LeNet500300, Network, VGGLike
from sbp_compile.training.recipes import NETWORKS, RECIPES, Phase, Recipe, recipe_for
from sbp_compile.training.sparsity import keep_random, kept_units, live_masks, mac_ratio

__all__ = [
    "NETWORKS",
    "RECIPES",
    "ConvBlock",
    "DatasetError",
    "Epoch",
    "ImageData",
    "LeNet5",
    "LeNet500300",
    "Network",
    "Observer",
    "Phase",
    "Recipe",
    "Result",
    "VGGLike",
    "evaluate",
    "keep_random",
    "kept_units",
    "live_masks",
    "load",
    "load_digits",
    "load_idx_folder",
    "mac_ratio",
    "predict",
    "read_idx",
    "recipe_for",
    "to_tensor",
    "train",
    "with_noise",
]
