"""The training side: the noise layer of Structured Bayesian Pruning and its arithmetic."""

from sbp_compile.nn.noise import (
    LogNormalNoise,
    NoiseArgumentError,
    kl_divergence,
    noise_layers,
    set_threshold,
)

__all__ = ["LogNormalNoise", "NoiseArgumentError", "kl_divergence", "noise_layers", "set_threshold"]
