"""Noise put into a model that knows nothing of it, and taken out again.

A noise layer becomes a child of the module whose output (or input) it multiplies, and a hook of that module calls
it. Nothing of the model's own changes: neither its code nor its attributes nor the names in its state dict, which
gains `<module>.noise_after.mu` and so on. Copies carry layers and hooks along.

A plain `nn.Sequential` would run such a child as one more step, so its last module (its first, for noise in front)
takes its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sbp_compile.nn.layout import Layout, NotMeasuredError, declared_layout, measured_layouts
from sbp_compile.nn.noise import LogNormalNoise, NoiseArgumentError
from sbp_compile.sharding import has_shards

Selector = type[nn.Module] | str | Callable[[str, nn.Module], bool]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip

AFTER, BEFORE = "noise_after", "noise_before"
_HANDLES = "noise_hooks"


@dataclass(frozen=True)
class Inserted:
    """One noise layer that was put in: at which module, on which side of it, and the layer."""

    name: str
    before: bool
    layer: LogNormalNoise

    def __str__(self) -> str:
        side = "before" if self.before else "after"
        return f"{side} {self.name or 'the model'}: {self.layer.num_features} features along {self.layer.dim}"


@dataclass(frozen=True)
class Insertion:
    """What `insert_noise` did, in the model's order, and which matching modules it left out, each with the reason."""

    inserted: tuple[Inserted, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        left_out = (f"not at {name}: {reason}" for name, reason in self.skipped.items())
        return "\n".join([*map(str, self.inserted), *left_out])


def insert_noise(
    module: nn.Module,
    where: Selector | Iterable[Selector],
    *,
    before: bool = False,
    dim: int | None = None,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Insertion:
    """Put a noise layer behind (or, with `before`, in front of) every chosen module of `module`, in place.

    `where`: module classes (with their subclasses), names (shell patterns: "layer?.*.conv1"; `*` crosses dots), or
    functions of (name, module); one or several. `CONVOLUTIONS` and `NORMS` are classes ready for use,
    `hidden_linears(model, example)` gives names.
    `dim`: where the features lie; default: where torch's own layer of this kind has them.
    `example_inputs`, `kwargs`: one call's arguments. The model runs once on them, in eval mode and without
    gradients, to measure what layers of unknown kinds give, and to leave out modules that are not called.
    `options`: those of `LogNormalNoise` (`threshold`, `per_example`, `log_range`), and `init_mu`,
    `init_log_sigma`, where the parameters start. Parameters take device and dtype of the module they stand at.

    Modules that already have noise there are left out, so a second call changes nothing. Raises NoiseArgumentError,
    having changed nothing, where a name matches no module or nothing matches, a module chosen by its full name
    cannot take noise, none of the matching modules can, or the model is sharded already.
    """
    _refuse_shards(module, "put the noise in")
    selectors = _selectors(where)
    chosen = _chosen(module, selectors, before)
    measured = None
    if example_inputs is not None or kwargs:
        targets = {name: place.target for name, place in chosen.items()}
        measured = measured_layouts(module, targets, example_inputs, kwargs or {}, before=before, dim=dim)
    starts: dict[str, float] = {
        key: options.pop(key) for key in ("init_mu", "init_log_sigma") if key in options
    }
    skipped: dict[str, str] = {}
    made: list[tuple[_Place, Inserted]] = []
    for name, place in chosen.items():
        try:
            layout = place.layout(name, measured, before, dim)
        except NotMeasuredError as error:
            if name in selectors:
                raise NoiseArgumentError(f"`where` ({name!r}) cannot take noise: {error}") from error
            skipped[name] = str(error)
            continue
        made.append((place, Inserted(name, before, _layer(place.target, layout, options, starts))))
    if not made and any(reason != _HAS_NOISE for reason in skipped.values()):
        name, reason = next(iter(skipped.items()))
        raise NoiseArgumentError(
            f"no module that `where` chooses can take noise; {name or 'the model'!r}: {reason}"
        )
    for place, entry in made:
        _attach(place.target, entry.layer, before)
    _forget_compiled()
    return Insertion(tuple(entry for _, entry in made), skipped)


def remove_noise(module: nn.Module) -> tuple[str, ...]:
    """Take out all that `insert_noise` put in; returns the names of the modules it stood at.

    Noise layers that are part of the model's own code stay. Raises NoiseArgumentError for a sharded model.
    """
    _refuse_shards(module, "take the noise out")
    found = []
    for name, part in list(module.named_modules()):
        handles = vars(part).pop(_HANDLES, {})
        for slot, handle in handles.items():
            handle.remove()
            delattr(part, slot)
        if handles:
            found.append(name)
    _forget_compiled()
    return tuple(found)


def _forget_compiled() -> None:
    """Let torch.compile begin anew: what it has compiled does not look at a module's hooks again."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _refuse_shards(module: nn.Module, what: str) -> None:
    if has_shards(module):
        raise NoiseArgumentError(f"the model is sharded already: {what} before fully_shard")


_HAS_NOISE = "it has noise there already"


@dataclass(frozen=True)
class _Place:
    """Where the noise of a chosen module goes: the module itself, or the end of a Sequential; or why nowhere."""

    target: nn.Module
    refusal: str = ""

    def layout(
        self, name: str, measured: Mapping[str, Layout | str] | None, before: bool, dim: int | None
    ) -> Layout:
        if self.refusal:
            raise NotMeasuredError(self.refusal)
        if measured is None:
            return declared_layout(self.target, before=before, dim=dim)
        found = measured[name]
        if isinstance(found, str):
            raise NotMeasuredError(found)
        return found


def _selectors(where: Selector | Iterable[Selector]) -> tuple[Selector, ...]:
    several = isinstance(where, Iterable) and not isinstance(where, (str, type, nn.Module))
    found = tuple(where) if several else (where,)  # type: ignore[arg-type]
    for selector in found:
        if isinstance(selector, nn.Module):
            raise NoiseArgumentError(
                f"`where` is a module itself ({type(selector).__name__}): give its name in the model, or its class"
            )
        if not isinstance(selector, str) and not callable(selector):
            raise NoiseArgumentError(
                f"`where` (={selector!r}) must be a module class, a name or a function, or several of them"
            )
    if not found:
        raise NoiseArgumentError("`where` is empty: give a module class or a name")
    return found  # type: ignore[return-value]


def _matches(selector: Selector, name: str, part: nn.Module) -> bool:
    if isinstance(selector, str):
        return fnmatchcase(name, selector)
    return isinstance(part, selector) if isinstance(selector, type) else bool(selector(name, part))


def _chosen(module: nn.Module, selectors: tuple[Selector, ...], before: bool) -> dict[str, _Place]:
    parents = dict(module.named_modules())
    candidates = {name: part for name, part in parents.items() if not isinstance(part, LogNormalNoise)}
    chosen = {}
    for selector in selectors:
        matching = {name: part for name, part in candidates.items() if _matches(selector, name, part)}
        if not matching and isinstance(selector, str):
            raise _no_match(repr(selector), candidates)
        chosen.update(matching)
    if not chosen:
        raise _no_match(" or ".join(str(getattr(kind, "__name__", kind)) for kind in selectors), candidates)
    taken: set[tuple[nn.Module, str]] = set()
    order = [name for name in candidates if name in chosen]
    return {name: _place(name, chosen[name], parents, before, taken) for name in order}


def _no_match(text: str, candidates: Iterable[str]) -> NoiseArgumentError:
    names = ", ".join([name for name in candidates if name][:8])
    return NoiseArgumentError(f"`where` ({text}) matches no module; there are {names} ...")


def _place(
    name: str,
    part: nn.Module,
    parents: Mapping[str, nn.Module],
    before: bool,
    taken: set[tuple[nn.Module, str]],
) -> _Place:
    parent = parents[name.rpartition(".")[0]] if name else None
    if isinstance(parent, nn.MultiheadAttention):
        return _Place(part, "torch's attention reads its weights without calling it")
    target = _innermost(part, before)
    if isinstance(target, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        kind = type(target).__name__
        return _Place(part, f"a {kind} cannot take a noise layer: choose modules inside it")
    slot = BEFORE if before else AFTER
    if hasattr(target, slot) or (target, slot) in taken:
        return _Place(target, _HAS_NOISE)
    taken.add((target, slot))
    return _Place(target)


def _innermost(part: nn.Module, before: bool) -> nn.Module:
    """The module at the end of a plain Sequential where the noise goes; any other module itself."""
    while isinstance(part, nn.Sequential) and len(part) and type(part).forward is nn.Sequential.forward:
        part = part[0 if before else -1]
    return part


def _layer(
    target: nn.Module, layout: Layout, options: Mapping[str, Any], starts: Mapping[str, float]
) -> LogNormalNoise:
    like = next((p for p in target.parameters() if p.is_floating_point()), None)
    placed = {} if like is None else {"device": like.device, "dtype": like.dtype}
    layer = LogNormalNoise(layout.features, dim=layout.dim, **{**placed, **options})
    if "init_mu" in starts:
        nn.init.constant_(layer.mu, starts["init_mu"])
    if "init_log_sigma" in starts:
        nn.init.constant_(layer.log_sigma, starts["init_log_sigma"])
    return layer.train(target.training)


def _attach(target: nn.Module, layer: LogNormalNoise, before: bool) -> None:
    slot = BEFORE if before else AFTER
    target.add_module(slot, layer)
    if before:
        handle = target.register_forward_pre_hook(_multiply_input, with_kwargs=True)
    else:
        handle = target.register_forward_hook(_multiply_output)
    vars(target).setdefault(_HANDLES, {})[slot] = handle


def _multiply_output(target: nn.Module, _: tuple[Any, ...], output: Tensor) -> Any:
    return target.get_submodule(AFTER)(output)


def _multiply_input(
    target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    noise = target.get_submodule(BEFORE)
    if args:
        return (noise(args[0]), *args[1:]), kwargs
    first, *_ = kwargs
    return args, {**kwargs, first: noise(kwargs[first])}
