"""Training with Structured Bayesian Pruning and its baselines: networks, data readers, recipes and the loop."""

from sbp_compile.training.data import (
    ImageData,
    load,
    load_digits,
    load_idx_folder,
    read_idx,
    to_tensor,
)
from sbp_compile.training.distributed import World, joined
from sbp_compile.training.files import DatasetError
from sbp_compile.training.loop import Conditions, Epoch, Observer, Result, evaluate, predict, train
from sbp_compile.training.models import ConvBlock, LeNet5, LeNet500300, Network, VGGLike
from sbp_compile.training.networks import dense_network, noisy_network
from sbp_compile.training.recipes import METHODS, NETWORKS, RECIPES, Phase, Recipe, recipe_for
from sbp_compile.training.resnet import ResNet20
from sbp_compile.training.sparsity import keep_random, kept_units, live_masks, mac_ratio
from sbp_compile.training.structure import Structure, structure
from sbp_compile.training.task import Task

__all__ = [
    "METHODS",
    "NETWORKS",
    "RECIPES",
    "Conditions",
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
    "ResNet20",
    "Result",
    "Structure",
    "Task",
    "VGGLike",
    "World",
    "dense_network",
    "evaluate",
    "joined",
    "keep_random",
    "kept_units",
    "live_masks",
    "load",
    "load_digits",
    "load_idx_folder",
    "mac_ratio",
    "noisy_network",
    "predict",
    "read_idx",
    "recipe_for",
    "structure",
    "to_tensor",
    "train",
]
