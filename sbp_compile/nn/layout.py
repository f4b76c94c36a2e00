"""Where the features of a module's input and output lie: what its kind says, or what a run of the model shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sbp_compile.capture.export import evaluating
from sbp_compile.errors import CompileError, InputError


class NotMeasuredError(Exception):
    """A module cannot take noise; the message is the reason."""


@dataclass(frozen=True)
class Layout:
    """How many features a tensor has, and along which dimension."""

    features: int
    dim: int


# class: (attribute with the features of the input, of the output, their dimension); the first match counts
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], tuple[str, str, int]], ...] = (
    ((nn.Conv1d, nn.ConvTranspose1d), ("in_channels", "out_channels", -2)),
    ((nn.Conv2d, nn.ConvTranspose2d), ("in_channels", "out_channels", -3)),
    ((nn.Conv3d, nn.ConvTranspose3d), ("in_channels", "out_channels", -4)),
    ((nn.InstanceNorm1d,), ("num_features", "num_features", -2)),
    ((nn.InstanceNorm2d,), ("num_features", "num_features", -3)),
    ((nn.InstanceNorm3d,), ("num_features", "num_features", -4)),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), ("num_features", "num_features", 1)),
    ((nn.GroupNorm,), ("num_channels", "num_channels", 1)),
    ((nn.LayerNorm, nn.RMSNorm), ("normalized_shape", "normalized_shape", -1)),
    ((nn.Linear,), ("in_features", "out_features", -1)),
    ((nn.Embedding,), ("", "embedding_dim", -1)),
)
# Subclasses of these with a forward of their own often move the features elsewhere (norms over channels first).
_ONLY_AS_THEY_ARE = (nn.LayerNorm, nn.RMSNorm)


def declared_layout(target: nn.Module, *, before: bool, dim: int | None) -> Layout:
    """What the module's kind says, at another `dim` if given. Raises NotMeasuredError where it says nothing."""
    found = _declared(target, before)
    if found is None:
        raise NotMeasuredError(
            f"how many features a {type(target).__name__} {'takes' if before else 'gives'} is not known: "
            "give example_inputs"
        )
    return found if dim is None else Layout(found.features, dim)


def _declared(target: nn.Module, before: bool) -> Layout | None:
    for classes, (taken, given, dim) in _KINDS:
        if not isinstance(target, classes):
            continue
        attribute = taken if before else given
        if not attribute or (isinstance(target, _ONLY_AS_THEY_ARE) and _has_own_forward(target, classes)):
            return None
        features = getattr(target, attribute)
        return Layout(features[-1] if isinstance(features, tuple) else features, dim)
    return None


def _has_own_forward(target: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    return all(type(target).forward is not kind.forward for kind in classes)


def measured_layouts(
    module: nn.Module,
    targets: Mapping[str, nn.Module],
    args: Tensor | tuple[Any, ...] | None,
    kwargs: Mapping[str, Any],
    *,
    before: bool,
    dim: int | None,
) -> dict[str, Layout | str]:
    """Run `module` once, in eval mode and without gradients; a reason instead of a layout where there is none.

    The errors are those of `run_once`.
    """
    seen: dict[nn.Module, list[Any]] = {target: [] for target in targets.values()}
    with evaluating(module), torch.no_grad(), _watching(seen, before):
        run_once(module, args, kwargs)
    return {name: _settle(target, seen[target], before, dim) for name, target in targets.items()}


def run_once(module: nn.Module, args: Tensor | tuple[Any, ...] | None, kwargs: Mapping[str, Any]) -> Any:
    """Run a model on example inputs; raises InputError where it does not take them."""
    args = (args,) if isinstance(args, Tensor) else args or ()
    try:
        return module(*args, **kwargs)
    except CompileError:
        raise
    except Exception as error:  # whatever the operators of the user's model raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the model does not take example_inputs: {reason}") from error


@contextmanager
def _watching(seen: Mapping[nn.Module, list[Any]], before: bool) -> Iterator[None]:
    def on_output(target: nn.Module, _: Any, output: Any) -> None:
        seen[target].append(output)

    def on_input(target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[target].append(next(iter((*args, *kwargs.values())), None))

    handles = [
        target.register_forward_pre_hook(on_input, with_kwargs=True)
        if before
        else target.register_forward_hook(on_output)
        for target in seen
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _settle(target: nn.Module, values: list[Any], before: bool, dim: int | None) -> Layout | str:
    verb = "takes" if before else "gives"
    if not values:
        return "the model does not call it"
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        kinds = sorted({type(value).__name__ for value in values if not isinstance(value, Tensor)})
        return f"it {verb} {' and '.join(kinds) or 'whole numbers'}, not one tensor of floats"
    found = {_measured(target, value, before, dim) for value in values}
    if len(found) > 1:
        return f"it is called several times and {verb} other numbers of features each time"
    return found.pop()


def _measured(target: nn.Module, value: Tensor, before: bool, dim: int | None) -> Layout | str:
    shape = tuple(value.shape)
    declared = _declared(target, before)
    if dim is None and declared is not None:
        dim = declared.dim
    if dim is None:
        return f"a {type(target).__name__} may have its features anywhere in shape {shape}: give dim"
    if not -len(shape) <= dim < len(shape):
        return f"dim (={dim}) is no dimension of its shape {shape}"
    return Layout(shape[dim], dim)
