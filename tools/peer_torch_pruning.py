"""torch-pruning with its dependency graph: finds the channels that a user of it would prune, and prunes them.

The network has its noise folded, so that masked channels are zero filters. A channel of a group goes where every layer
that reads it agrees (what `usual` and `careful` ask of a reader is below); groups that nothing reads, such as the
classifier's outputs, stay whole. What a layer reads is looked up by running the network on random inputs.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peer_case import Case, Outcome
from torch import Tensor, nn

from sbp_compile.verify import TOLERANCES

READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
ACROSS_CHANNELS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

REDRAWS = 32
SMALL = 1e-3


def usual(case: Case) -> Outcome:
    """Prune every masked channel: one that reaches its readers as a constant, whatever the input."""
    return _pruned(case, zero=False, bound=math.inf)


def careful(case: Case) -> Outcome:
    """Prune only what reaches its readers as zero, nothing under a norm across channels, and no group that matters."""
    return _pruned(case, zero=True, bound=TOLERANCES[torch.float64])


def _pruned(case: Case, *, zero: bool, bound: float) -> Outcome:
    """Prune group by group; one after which the network fails, or errs beyond `bound`, is left whole."""
    folded = case.folded()
    names = {layer: name for name, layer in folded.named_modules()}
    free = {names[layer]: channels for layer, channels in _free_inputs(folded, case.probes, zero).items()}
    whole: set[str] = set()
    while True:
        module = copy.deepcopy(folded)
        removed, culprit = _prune_groups(case, module, free, whole, norms=not zero, bound=bound)
        if culprit is None:
            note = f"{removed} channels pruned" + (f", {len(whole)} groups left whole" if whole else "")
            return Outcome(module=module, note=note)
        whole.add(culprit)


def _prune_groups(
    case: Case, module: nn.Module, named: Mapping[str, Tensor], whole: set[str], *, norms: bool, bound: float
) -> tuple[int, str | None]:
    """Prune in place; returns how many channels went, and the root of the first group that must not be pruned."""
    pruning: Any = importlib.import_module("torch_pruning")
    free = {module.get_submodule(name): channels for name, channels in named.items()}
    names = {layer: name for name, layer in module.named_modules()}
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    graph = pruning.DependencyGraph().build_dependency(module, example_inputs=case.inputs[0])
    removed = 0
    for group in graph.get_all_groups():
        root = group[0].dep.target.module
        chosen = _candidates(graph, group, free, norms)
        smaller = graph.get_pruning_group(root, group[0].dep.handler, chosen)
        if not chosen or names[root] in whole or not graph.check_pruning_group(smaller):
            continue
        for layer, indices, _ in _readers(graph, smaller):
            kept = torch.ones_like(free[layer])
            kept[indices] = False
            free[layer] = free[layer][kept]
        smaller.prune()
        removed += len(chosen)
        try:
            error = case.error_of_module(module)
        except RuntimeError:
            return removed, names[root]
        if not error <= bound:
            return removed, names[root]
    return removed, None


def _free_inputs(
    module: nn.Module, probes: Sequence[tuple[Tensor, ...]], zero: bool
) -> dict[nn.Module, Tensor]:
    """Return, for each layer, which of its input channels are masked: constant (or zero) on all probes and calls.

    A unit that merely happens not to fire is not masked: what is masked stays constant when every other weight is
    drawn afresh and biases are small, so that units fire on half of the probes.
    """
    generator = torch.Generator().manual_seed(0)
    free: dict[str, Tensor] = {}
    for _ in range(REDRAWS):
        redrawn = copy.deepcopy(module)
        for name, parameter in redrawn.named_parameters():
            factor = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.mul_(factor * (SMALL if name.endswith("bias") else 1.0))
        for name, (low, high) in _ranges(redrawn, probes).items():
            free[name] = free.get(name, torch.tensor(True)) & (low == high).all(1)
    if zero:
        for name, (low, high) in _ranges(module, probes).items():
            free[name] &= ((low == 0) & (high == 0)).all(1)
    return {module.get_submodule(name): channels for name, channels in free.items()}


def _ranges(module: nn.Module, probes: Sequence[tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the least and largest values that each layer reads over the probes: [channels, positions of all calls]."""
    runs: list[dict[str, list[Tensor]]] = []

    def watch(name: str, axis: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            runs[-1].setdefault(name, []).append(inputs[0].detach().movedim(axis, 0).flatten(1))

        return look

    handles = [
        layer.register_forward_pre_hook(watch(name, -1 if isinstance(layer, nn.Linear) else 1))
        for name, layer in module.named_modules()
        if isinstance(layer, READERS)
    ]
    with torch.no_grad():
        for probe in probes:
            runs.append({})
            module(*probe)
    for handle in handles:
        handle.remove()
    stacked = {name: torch.stack([torch.cat(run[name], 1) for run in runs]) for name in runs[0]}
    return {name: (values.amin(0), values.amax(0)) for name, values in stacked.items()}


def _candidates(graph: Any, group: Any, free: dict[nn.Module, Tensor], norms: bool) -> list[int]:
    """Return the group's channels that every reader can do without."""
    if not norms and any(isinstance(item.dep.target.module, ACROSS_CHANNELS) for item in group.items):
        return []
    allowed, taken = set(group[0].root_idxs), set()
    for layer, indices, roots in _readers(graph, group):
        if max(indices) >= len(free[layer]):  # the dependency graph takes another axis for the channels
            return []
        for index, root in zip(indices, roots, strict=True):
            taken.add(root)
            if not free[layer][index]:
                allowed.discard(root)
    return sorted(allowed & taken)


def _readers(graph: Any, group: Any) -> list[tuple[nn.Module, list[int], list[int]]]:
    """Return the layers that read the group's channels, their input indices and the group's."""
    return [
        (item.dep.target.module, item.idxs, item.root_idxs)
        for item in group.items
        if isinstance(item.dep.target.module, READERS)
        and graph.is_in_channel_pruning_fn(item.dep.handler)
        and not graph.is_out_channel_pruning_fn(item.dep.handler)
    ]
