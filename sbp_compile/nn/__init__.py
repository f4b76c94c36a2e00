"""The training side: noise layers of Structured Bayesian Pruning, where they go, and what they learn from."""

from sbp_compile.nn.budget import Fit, prune_to_latency, prune_to_macs
from sbp_compile.nn.callbacks import lightning_callback, log_sparsity
from sbp_compile.nn.costs import NetworkCosts, mac_kl_weights
from sbp_compile.nn.criteria import Criterion, bmrs_n, bmrs_u, prune, snr_above
from sbp_compile.nn.hidden import hidden_linears
from sbp_compile.nn.insertion import CONVOLUTIONS, NORMS, Inserted, Insertion, insert_noise, remove_noise
from sbp_compile.nn.noise import (
    LayerNumbers,
    LogNormalNoise,
    NoiseArgumentError,
    kl_divergence,
    named_noise_layers,
    noise_layers,
    set_threshold,
)
from sbp_compile.nn.objective import clip_noise, elbo_loss, parameter_groups, variational_parameters
from sbp_compile.nn.pruner import TrainingPruner
from sbp_compile.nn.recalibration import recalibrate_norms
from sbp_compile.nn.removal import Removal, match_widths, remove_off_units
from sbp_compile.nn.schedules import Anneal, Cycle
from sbp_compile.nn.sparsity import LayerSparsity, Sparsity, sparsity

__all__ = [
    "CONVOLUTIONS",
    "NORMS",
    "Anneal",
    "Criterion",
    "Cycle",
    "Fit",
    "Inserted",
    "Insertion",
    "LayerNumbers",
    "LayerSparsity",
    "LogNormalNoise",
    "NetworkCosts",
    "NoiseArgumentError",
    "Removal",
    "Sparsity",
    "TrainingPruner",
    "bmrs_n",
    "bmrs_u",
    "clip_noise",
    "elbo_loss",
    "hidden_linears",
    "insert_noise",
    "kl_divergence",
    "lightning_callback",
    "log_sparsity",
    "mac_kl_weights",
    "match_widths",
    "named_noise_layers",
    "noise_layers",
    "parameter_groups",
    "prune",
    "prune_to_latency",
    "prune_to_macs",
    "recalibrate_norms",
    "remove_noise",
    "remove_off_units",
    "set_threshold",
    "snr_above",
    "sparsity",
    "variational_parameters",
]
