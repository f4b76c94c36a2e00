"""The multiplicative log-normal noise layer (Neklyudov et al. 2017, arXiv 1705.07283)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from sbp_compile.errors import UsageError
from sbp_compile.nn import sampling, truncated
from sbp_compile.sharding import is_sharded, sharded_modules, whole

LayerNumbers = Mapping[str, float] | Sequence[float]
"""One number for each noise layer: in the order of `noise_layers`, or by name."""


class NoiseArgumentError(UsageError, ValueError):
    """An argument of the noise layer, or the shape of its input, cannot be used."""


class LogNormalNoise(nn.Module):
    """Multiplies every feature by theta, log theta ~ N(mu, exp(log_sigma)^2) truncated to `log_range`.

    Train mode draws theta: one number per example and feature, shared over all other positions. Gradients
    reach `mu` and `log_sigma` through the inverse CDF. With `per_example=False` the whole batch shares one
    draw, as in the authors' code: cheaper, and a noisier gradient. Examples lie along dimension 0; if the
    features lie there (dim=0, an input without a batch), one draw is made.
    Eval mode multiplies by E[theta] where SNR = E/sqrt(Var) > threshold, and by 0 elsewhere.

    Input: floating tensor of any rank with `num_features` entries along `dim` (negative: from the end).
    Output: the same shape and dtype, under autocast too: the factor is computed in float64 (samples in
    float32, or float64 if the parameters are) and rounded once to the input's dtype.
    Parameters: `mu` (initially 0), `log_sigma` (initially -5), shape (num_features,); the whole state until
    units are switched off. Then there is a buffer `off`, bool (num_features,): their factor is 0 in train mode
    too, they have no share in the KL, and nothing is learnt through them. A layer that lost units has a buffer
    `survivors`, bool (features it once had,): it draws for all of them and takes its own, so that the same seed gives
    the units that are left the same noise.
    Statistics and their gradients are finite for finite parameters; |log_sigma| saturates at 80. The device
    must have float64.
    Where `fully_shard` has sharded the parameters, statistics are those of all features in each process, and all
    processes must ask for them together.

    Raises NoiseArgumentError (a ValueError) for arguments out of range, for inputs that do not fit, and for sharded
    parameters outside the forward of the module that was sharded.
    """

    def __init__(
        self,
        num_features: int,
        *,
        dim: int = 1,
        log_range: tuple[float, float] = (-20.0, 0.0),
        threshold: float = 1.0,
        per_example: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = _checked_integer("num_features", num_features, least=1)
        self.dim = _checked_integer("dim", dim)
        self.log_range = _checked_range(log_range)
        self.threshold = _checked_threshold(threshold)
        self.per_example = per_example
        self.mu = nn.Parameter(torch.empty(self.num_features, device=device, dtype=dtype))
        self.log_sigma = nn.Parameter(torch.empty(self.num_features, device=device, dtype=dtype))
        self.off: Tensor | None
        self.survivors: Tensor | None
        self._drawn: Tensor | None
        self.register_buffer("off", None)
        self.register_buffer("survivors", None)
        self.register_buffer("_drawn", None, persistent=False)
        self.register_load_state_dict_pre_hook(_make_room)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set mu to 0 and log_sigma to -5: theta is close to 1, and no unit is masked."""
        nn.init.constant_(self.mu, 0.0)
        nn.init.constant_(self.log_sigma, -5.0)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x` by a sample of theta (train mode) or by its masked mean (eval mode)."""
        dim = self._feature_dim(x)
        if is_sharded(self.mu):
            raise NoiseArgumentError(
                "the noise layer was called while its parameters are sharded: call the module that fully_shard was "
                "applied to, which gathers them"
            )
        theta = self._sample(x, dim) if self.training else self._masked_mean()
        shape = [1] * x.ndim
        shape[0], shape[dim] = theta.shape[0], self.num_features
        return x * theta.to(x.dtype if x.is_floating_point() else self.mu.dtype).view(shape)

    def mean(self) -> Tensor:
        """E[theta], shape (num_features,), in the parameters' dtype."""
        return self._moments().mean.to(self.mu.dtype)

    def variance(self) -> Tensor:
        """Var[theta], shape (num_features,), in the parameters' dtype."""
        return self._moments().variance.to(self.mu.dtype)

    def snr(self) -> Tensor:
        """E[theta] / sqrt(Var[theta]), shape (num_features,), in the parameters' dtype."""
        return self._moments().snr.to(self.mu.dtype)

    def mask(self) -> Tensor:
        """Tell which features stay, shape (num_features,): not off, and SNR above the threshold or not a number.

        Decided in float64 whatever the parameters' dtype.
        """
        return self._kept(self._moments())

    def kl(self) -> Tensor:
        """KL(q(theta) || p(theta)) in nats, summed over the features: a scalar in the parameters' dtype."""
        divergence = truncated.divergence(*self.whole_parameters(), *self.log_range)
        return self._without_off(divergence).sum().to(self.mu.dtype)

    def whole_parameters(self) -> tuple[Tensor, Tensor]:
        """`mu` and `log_sigma`, shape (num_features,) each, gathered where they are sharded.

        Raises NoiseArgumentError where this process has only a part of them and cannot gather the rest.
        """
        mu, log_sigma = whole(self.mu), whole(self.log_sigma)
        for name, value in (("mu", mu), ("log_sigma", log_sigma)):
            if value.shape != (self.num_features,):
                raise NoiseArgumentError(
                    f"`{name}` has shape {tuple(value.shape)} instead of ({self.num_features},): shard with "
                    "torch.distributed.fsdp.fully_shard, not with FullyShardedDataParallel"
                )
        return mu, log_sigma

    def switch_off(self, units: Tensor) -> None:
        """Switch the features off at which `units`, bool (num_features,), is set; they stay off.

        `off = None` takes everything back. Raises NoiseArgumentError for a mask of another shape or dtype.
        """
        if units.dtype != torch.bool or units.shape != (self.num_features,):
            raise NoiseArgumentError(
                f"`units` (={units.dtype} of shape {tuple(units.shape)}) must be a bool mask of shape "
                f"({self.num_features},)"
            )
        with torch.inference_mode(False):  # a mask made in inference mode could not be trained with
            units = units.to(self.mu.device)
            self.off = units.clone() if self.off is None else self.off | units

    def survive(self, kept: Tensor) -> None:
        """Go on with the features at which `kept`, bool (num_features,), is set; the parameters have lost the others.

        Called by the shrinker, which replaces the parameters.
        """
        before = torch.ones_like(kept) if self.survivors is None else self.survivors.clone()
        before[before.clone()] = kept
        self.survivors, self._drawn = before, before.nonzero().flatten()
        self.num_features = int(kept.sum())
        left = None if self.off is None else self.off[kept]
        self.off = left if left is not None and bool(left.any()) else None

    def extra_repr(self) -> str:
        """Show the arguments that the layer was made with."""
        return (
            f"{self.num_features}, dim={self.dim}, log_range={self.log_range}, "
            f"threshold={self.threshold}, per_example={self.per_example}"
        )

    def _moments(self) -> truncated.Moments:
        return truncated.moments(*self.whole_parameters(), *self.log_range)

    def _kept(self, moments: truncated.Moments) -> Tensor:
        # "not below" rather than "above": a NaN must never prune.
        kept = ~(moments.snr <= self.threshold)
        return kept if self.off is None else kept & ~self.off

    def _without_off(self, values: Tensor) -> Tensor:
        return values if self.off is None else torch.where(self.off, 0.0, values)

    def _masked_mean(self) -> Tensor:
        moments = self._moments()
        return torch.where(self._kept(moments), moments.mean, 0.0).unsqueeze(0)

    def _sample(self, x: Tensor, dim: int) -> Tensor:
        rows = x.shape[0] if self.per_example and dim != 0 else 1
        if self.survivors is None or self._drawn is None:
            p = sampling.uniform(rows, self.mu)
        else:
            p = sampling.uniform(rows, self.mu, len(self.survivors)).index_select(1, self._drawn)
        return self._without_off(sampling.sample(self.mu, self.log_sigma, p, *self.log_range))

    def _feature_dim(self, x: Tensor) -> int:
        if not -x.ndim <= self.dim < x.ndim:
            raise NoiseArgumentError(
                f"`dim` (={self.dim}) must be a dimension of the input, which has shape {tuple(x.shape)}"
            )
        if x.shape[self.dim] != self.num_features:
            raise NoiseArgumentError(
                f"`num_features` (={self.num_features}) must be the size of dimension {self.dim} "
                f"of the input, which has shape {tuple(x.shape)}"
            )
        return self.dim % x.ndim


def _make_room(layer: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Before a state is loaded: buffers for the units that are off or gone in it, none if none are."""
    assert isinstance(layer, LogNormalNoise)
    off, survivors = state.get(f"{prefix}off"), state.get(f"{prefix}survivors")
    layer.off = None if off is None else torch.zeros(layer.mu.shape, dtype=torch.bool, device=layer.mu.device)
    layer.survivors = None if survivors is None else survivors.to(layer.mu.device, copy=True)
    layer._drawn = None if layer.survivors is None else layer.survivors.nonzero().flatten()


def noise_layers(module: nn.Module) -> list[LogNormalNoise]:
    """Every noise layer in `module`, itself included, each once, in the order of `module.modules()`."""
    return [m for m in module.modules() if isinstance(m, LogNormalNoise)]


def named_noise_layers(module: nn.Module) -> dict[str, LogNormalNoise]:
    """The same layers by name, each under its first."""
    return {name: part for name, part in module.named_modules() if isinstance(part, LogNormalNoise)}


def kl_divergence(module: nn.Module, weights: LayerNumbers | None = None) -> Tensor:
    """Sum of `kl()` over all noise layers of `module`, in nats; a scalar, 0.0 where there are none.

    The loss is mean cross-entropy + this / number of training examples: the paper's lower bound, per example.
    `weights` multiplies each layer's: one number per layer, in order or by name. Layers may lie on several
    devices; the sum is on the first one's. After `fully_shard` it is to be called behind the forward, as `elbo_loss`
    is: torch adds gradients of shards in that order. Raises NoiseArgumentError where `weights` does not fit the layers,
    or a part of the model is sharded and a noise layer is not.
    """
    layers = named_noise_layers(module)
    _return_to_shards(module, layers)
    scales = dict.fromkeys(layers, 1.0) if weights is None else by_layer(module, "weights", weights)
    divergences = [scales[name] * layer.kl() for name, layer in layers.items() if scales[name]]
    if not divergences:
        return torch.zeros(())
    return torch.stack([kl.to(divergences[0].device) for kl in divergences]).sum()


def _return_to_shards(module: nn.Module, layers: Mapping[str, LogNormalNoise]) -> None:
    """Give back what `fully_shard` gathered in part (`reshard_after_forward=2`): gradients to that would be lost."""
    parts = sharded_modules(module)
    for name, layer in layers.items() if parts else ():
        owners = [part for part in parts if not part or f"{name}.".startswith(f"{part}.")]
        if not owners:
            raise NoiseArgumentError(
                f"the noise layer {name!r} is in none of the modules that are sharded, so that each process would "
                "learn its own: apply fully_shard to the whole model, too, and give that model"
            )
        if is_sharded(layer.mu):
            parts[max(owners, key=len)].reshard()


def set_threshold(module: nn.Module, value: float | LayerNumbers) -> None:
    """Set the SNR threshold of every noise layer of `module`: one for all, or one for each, in order or by name.

    Raises NoiseArgumentError and changes nothing unless every value is a number >= 0 (infinity masks all) and
    every layer has one.
    """
    layers = named_noise_layers(module)
    if isinstance(value, (Mapping, Sequence)) and not isinstance(value, str):
        thresholds = by_layer(module, "value", value)
    else:
        thresholds = dict.fromkeys(layers, value)
    checked = {name: _checked_threshold(threshold) for name, threshold in thresholds.items()}
    for name, layer in layers.items():
        layer.threshold = checked[name]


def by_layer(module: nn.Module, argument: str, numbers: LayerNumbers) -> dict[str, float]:
    """One number per noise layer, given in order or by name, as a dict by name.

    Raises NoiseArgumentError, naming `argument`, where they are too few, too many or of unknown layers.
    """
    names = list(named_noise_layers(module))
    if isinstance(numbers, Mapping):
        if set(numbers) == set(names):
            return dict(numbers)
        wrong = sorted(set(numbers) ^ set(names))
        raise NoiseArgumentError(
            f"`{argument}` must have one number per noise layer; missing or unknown: {', '.join(wrong)}"
        )
    if len(numbers) != len(names):
        raise NoiseArgumentError(
            f"`{argument}` (={tuple(numbers)}) must have {len(names)} entries, one per noise layer"
        )
    return dict(zip(names, numbers, strict=True))


def _checked_integer(name: str, value: int, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and value < least):
        wanted = "an integer" if least is None else f"an integer >= {least}"
        raise NoiseArgumentError(f"`{name}` (={value!r}) must be {wanted}")
    return int(value)


def _checked_threshold(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not value >= 0:
        raise NoiseArgumentError(f"`threshold` (={value!r}) must be a number >= 0")
    return float(value)


def _checked_range(log_range: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in log_range)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not -math.inf < low < high < math.inf:
        raise NoiseArgumentError(
            f"`log_range` (={log_range!r}) must be two finite numbers (a, b) with a < b, such as (-20.0, 0.0)"
        )
    return low, high
