"""The training side: noise layers of Structured Bayesian Pruning, where they go, and what they learn from."""

from sbp_compile.nn.hidden import hidden_linears
from sbp_compile.nn.insertion import CONVOLUTIONS, NORMS, Inserted, Insertion, insert_noise, remove_noise
from sbp_compile.nn.noise import (
    LogNormalNoise,
    NoiseArgumentError,
    kl_divergence,
    noise_layers,
    set_threshold,
)

__all__ = [
    "CONVOLUTIONS",
    "NORMS",
    "Inserted",
    "Insertion",
    "LogNormalNoise",
    "NoiseArgumentError",
    "hidden_linears",
    "insert_noise",
    "kl_divergence",
    "noise_layers",
    "remove_noise",
    "set_threshold",
]
