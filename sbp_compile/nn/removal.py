"""Units that are off leave the module itself, while it trains: smaller weights, the same objects.

The module's code, its modules, its noise layers and the optimiser stay; parameters are replaced by the parts of
them that are left, and so is what the optimiser remembers of each. Which parts go, `removal_plan` finds.

What a removed unit gave to its readers stays as the constant it is in eval mode: 0, or (a bias behind the noise)
another number, which goes into the readers' bias. With `remove=False` the widths stay and a hook keeps the readers
from seeing those units: every value, gradient and step of the units that are left is then the same, up to rounding, for
noise layers go on drawing for the units that left. (Dropout, and norms of gradients beyond rounding, do not.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sbp_compile.capture.export import evaluating, map_tensors
from sbp_compile.errors import UsageError, VerificationError
from sbp_compile.nn.layout import run_once
from sbp_compile.nn.noise import LogNormalNoise, named_noise_layers
from sbp_compile.nn.removal_plan import Plan, plan_removal
from sbp_compile.sharding import has_shards

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_FROZEN = "frozen_inputs"


@dataclass(frozen=True)
class Removal:
    """What was removed or frozen: units of each noise layer, by name, and parameters before and after."""

    units: Mapping[str, int]
    parameters_before: int
    parameters_after: int

    def __bool__(self) -> bool:
        return bool(self.units) or self.parameters_after < self.parameters_before


def remove_off_units(
    module: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    remove: bool = True,
) -> Removal:
    """Take the units that are off (`LogNormalNoise.switch_off`, `prune`) out of `module`, in place.

    `example_inputs`, `kwargs`: one call's arguments. `optimizer`: its state and its groups follow the parameters;
    gradients are dropped. `remove=False` freezes the units where they are instead.
    Only what the module's code allows goes: channels of plain convolutions and linear layers, in whole blocks where
    they are flattened, with batch norms and vectors that are added or multiplied between them. What else is off stays
    off. A reader without a bias gets one, without gradient, where a constant has to go into it; weight decay of a bias
    reaches the constants in it.

    The module's output in eval mode on the example is compared before and after. Raises VerificationError where it
    changed or the module does not run any more (sizes written into its code), having put everything back;
    UnsupportedModelError where the module cannot be captured or uses parameters in train mode alone; UsageError for a
    module wrapped or sharded for several processes, and for LBFGS. Whatever is raised, nothing was changed.
    """
    with _neither_inference_nor_autocast(module):
        return _remove(module, example_inputs, dict(kwargs or {}), optimizer, remove=remove)


def _remove(
    module: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    kwargs: dict[str, Any],
    optimizer: torch.optim.Optimizer | None,
    *,
    remove: bool,
) -> Removal:
    refuse_shards(module)
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise UsageError("give the module inside DistributedDataParallel, and wrap it again afterwards")
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    plan = plan_removal(module, args, kwargs)
    if optimizer is not None and remove and plan.cuts:
        refuse_optimizer(optimizer)
    change = _Change(module)
    before = _outputs(module, args, kwargs)
    try:
        for name, constant in plan.added.items():
            change.add_to_bias(name, constant)
        if remove:
            for name, axes in plan.cuts.items():
                change.cut(name, axes)
        else:
            for name, (axis, kept) in plan.inputs.items():
                change.freeze_inputs(name, axis, kept)
        change.settle_widths(plan if remove else Plan())
        _compare(before, lambda: _outputs(module, args, kwargs))
    except BaseException:
        change.undo()
        raise
    change.carry_over(optimizer)
    return change.summary()


@contextmanager
def _neither_inference_nor_autocast(module: nn.Module) -> Iterator[None]:
    """Parameters that are made in inference mode cannot be trained, and those read through casts are not recognised."""
    kinds = {parameter.device.type for parameter in module.parameters()} - {"meta"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def refuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise UsageError for an optimiser whose state cannot follow parameters that get smaller."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError(
            "LBFGS remembers all parameters as one vector, of which no parts can be taken out: call this without "
            "optimizer and make a new one"
        )


def match_widths(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a fresh model the widths of a state dict that was saved after units were removed, to load it then.

    Every parameter and buffer of another shape is replaced by an empty one. Raises UsageError where the state has
    tensors of another rank, or none for a parameter of the model, and for a sharded model; nothing is changed then.
    """
    if has_shards(module):
        raise UsageError("the model is sharded already: give it the widths before fully_shard")
    change = _Change(module)
    try:
        _match(change, module, state)
    except BaseException:
        change.undo()
        raise


def _match(change: _Change, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, held in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        wanted = state.get(name)
        if wanted is None and isinstance(held, nn.Parameter):
            raise UsageError(f"the state has no {name!r}: it is of another model")
        if wanted is not None and wanted.shape != held.shape:
            if wanted.ndim != held.ndim:
                raise UsageError(
                    f"{name!r} has shape {tuple(wanted.shape)} in the state and {tuple(held.shape)} in the "
                    "model: it is of another model"
                )
            change.replace(name, held.detach().new_empty(wanted.shape))
    for name, part in module.named_modules():
        key = f"{name}.bias" if name else "bias"
        if isinstance(part, _WITH_BIAS) and part.bias is None and key in state:
            part.bias = nn.Parameter(torch.empty_like(state[key]).to(part.weight), requires_grad=False)
    change.settle_widths(Plan())
    for layer in named_noise_layers(module).values():
        layer.num_features = len(layer.mu)


def refuse_shards(module: nn.Module) -> None:
    """Raise UsageError for a module whose widths `fully_shard` has fixed."""
    if has_shards(module):
        raise UsageError(
            "the module is sharded, which fixes its widths: switch units off with prune() while it trains, and remove "
            "them from a whole model that has its state dict"
        )


_WITH_BIAS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class _Change:
    """Replacements in a module, remembered so that they can be taken back or carried over to an optimiser."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = sum(p.numel() for p in module.parameters())
        self.units = {name: layer.num_features for name, layer in named_noise_layers(module).items()}
        self.frozen: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []
        self._pairs: list[tuple[nn.Parameter, nn.Parameter, dict[int, Tensor]]] = []

    def replace(self, name: str, value: Tensor, axes: dict[int, Tensor] | None = None) -> None:
        owner, attribute = self._place(name)
        held = getattr(owner, attribute)
        if isinstance(held, nn.Parameter):
            fresh = nn.Parameter(value, requires_grad=held.requires_grad)
            self._pairs.append((held, fresh, axes or {}))
            value = fresh
        self._set(owner, attribute, value)

    def cut(self, name: str, axes: dict[int, Tensor]) -> None:
        owner, attribute = self._place(name)
        self.replace(name, _selected(getattr(owner, attribute).detach(), axes), axes)

    def add_to_bias(self, name: str, constant: Tensor) -> None:
        owner = self.module.get_submodule(name)
        assert isinstance(owner, _WITH_BIAS)
        with torch.no_grad():
            if owner.bias is None:
                self._set(owner, "bias", nn.Parameter(constant.to(owner.weight), requires_grad=False))
            else:
                saved = owner.bias.detach().clone()
                owner.bias += constant.to(owner.bias)
                self._undo.append(lambda bias=owner.bias: bias.data.copy_(saved))  # type: ignore[misc]

    def freeze_inputs(self, name: str, axis: int, kept: Tensor) -> None:
        """Let a layer read 0 from the frozen channels; what they gave is in its bias."""
        owner = self.module.get_submodule(name)
        assert isinstance(owner, _WITH_BIAS)
        mask = kept.view([-1] + [1] * (-axis - 1)).to(owner.weight.device)
        self.frozen[name] = int((~kept).sum())
        if hasattr(owner, _FROZEN):
            self._set(owner, _FROZEN, owner.get_buffer(_FROZEN) & mask)
            return
        owner.register_buffer(_FROZEN, mask, persistent=False)
        handle = owner.register_forward_pre_hook(_hide_frozen)
        self._undo += [handle.remove, lambda: delattr(owner, _FROZEN)]

    def settle_widths(self, plan: Plan) -> None:
        """Make the attributes that say how wide a module is true again."""
        for name, part in self.module.named_modules():
            prefix = f"{name}." if name else ""
            if isinstance(part, LogNormalNoise) and f"{prefix}mu" in plan.cuts:
                self._settle_noise(part, plan.cuts[f"{prefix}mu"][0].to(part.mu.device))
            for attribute, value in _widths(part).items():
                if getattr(part, attribute) != value:
                    self._set(part, attribute, value)

    def undo(self) -> None:
        for step in reversed(self._undo):
            step()

    def carry_over(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Hand the optimiser the new parameters, with the parts of its state that belong to them."""
        if optimizer is None:
            return
        fresh = {id(old): (new, axes) for old, new, axes in self._pairs}
        for group in optimizer.param_groups:
            group["params"] = [fresh[id(p)][0] if id(p) in fresh else p for p in group["params"]]
        for old, new, axes in self._pairs:
            if old in optimizer.state:
                optimizer.state[new] = {
                    key: _remembered(value, old, axes) for key, value in optimizer.state.pop(old).items()
                }

    def summary(self) -> Removal:
        layers = named_noise_layers(self.module)
        gone = {name: before - layers[name].num_features for name, before in self.units.items()}
        units = {name: number for name, number in gone.items() if number}
        after = sum(p.numel() for p in self.module.parameters())
        return Removal(units or self.frozen, self.parameters, after)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, attribute = name.rpartition(".")
        return self.module.get_submodule(path), attribute

    def _set(self, owner: nn.Module, attribute: str, value: Any) -> None:
        held = getattr(owner, attribute)
        setattr(owner, attribute, value)
        self._undo.append(lambda: setattr(owner, attribute, held))

    def _settle_noise(self, layer: LogNormalNoise, kept: Tensor) -> None:
        held = layer.num_features, layer.off, layer.survivors, layer._drawn
        layer.survive(kept)

        def back() -> None:
            layer.num_features, layer.off, layer.survivors, layer._drawn = held

        self._undo.append(back)


def _widths(part: nn.Module) -> dict[str, int]:
    """What the attributes of one of torch's layers must be for its weights."""
    if isinstance(part, nn.Linear):
        return {"out_features": part.weight.shape[0], "in_features": part.weight.shape[1]}
    if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        out, inputs = part.weight.shape[:2]
        if part.groups > 1 and part.groups == part.in_channels == part.out_channels:
            return {"groups": out, "in_channels": out, "out_channels": out}
        return {"out_channels": out, "in_channels": inputs * part.groups}
    if isinstance(part, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return {"in_channels": part.weight.shape[0], "out_channels": part.weight.shape[1] * part.groups}
    if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)):
        known = part.weight if part.weight is not None else part.running_mean
        return {} if known is None else {"num_features": len(known)}
    return {}


def _selected(value: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    for axis, kept in axes.items():
        value = value.index_select(axis, kept.nonzero().flatten().to(value.device))
    return value.clone() if not axes else value


def _remembered(value: object, parameter: Tensor, axes: Mapping[int, Tensor]) -> object:
    """Return the part of an optimiser's state that is left; statistics of whole rows or columns have axes of size 1."""
    if not isinstance(value, Tensor) or not value.ndim or value.ndim != parameter.ndim:
        return value
    if any(size not in (1, whole) for size, whole in zip(value.shape, parameter.shape, strict=True)):
        return value
    return _selected(value, {axis: kept for axis, kept in axes.items() if value.shape[axis] == len(kept)})


def _hide_frozen(owner: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (torch.where(owner.get_buffer(_FROZEN), args[0], 0.0), *args[1:])


def _outputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    with evaluating(module), torch.no_grad():
        map_tensors(lambda tensor: found.append(tensor.clone()), run_once(module, args, kwargs))
    return found


def _compare(before: list[Tensor], run: Callable[[], list[Tensor]]) -> None:
    try:
        after = run()
    except Exception as error:  # whatever the module's code raises when its widths change
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise VerificationError(
            f"the module does not run with fewer channels ({reason}); nothing was changed: write sizes in its code "
            "as those of its inputs, or keep the widths with remove=False"
        ) from error
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape or not _agree(old, new):
            raise VerificationError(
                "the module gives something else with fewer channels; nothing was changed: keep the widths with "
                "remove=False"
            )


def _agree(old: Tensor, new: Tensor) -> bool:
    """Whether two results are the same within the tolerance of their dtype; what is not finite must be the same."""
    if not (old.is_floating_point() or old.is_complex()):
        return torch.equal(old, new)
    finite = old.isfinite()
    tolerance = TOLERANCE.get(old.dtype, 2e-2)
    scale = old[finite].abs().max() if bool(finite.any()) else 0.0
    close = (old - new).abs() <= tolerance * scale
    return bool(torch.where(finite, close, (old == new) | (old.isnan() & new.isnan())).all())
