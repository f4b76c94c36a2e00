"""Widths that are padded anyway, filled with the best pruned channels instead of constants.

A wider layer costs the same whatever is in it. Where noise was pruned for its signal-to-noise ratio, the pruned
channels with the highest ratio take the places: the network then computes what it would with these channels on, which
is nearer to the unpruned one. That is another function than the one given, so it is asked for, told, and proven against
the network with these channels on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from passes import Canonicalize, ChooseWidths, Note, Pipeline, Program
from passes.ir.analysis import analyze
from passes.ir.program import Origin
from passes.ir.rewriter import Rewriter
from passes.ir.ties import Ties, ties
from passes.rules import rule_for
from sbp_compile.errors import UsageError
from sbp_compile.recipe_masks import constant_values

aten = torch.ops.aten

COMPARISONS = frozenset({aten.le.Scalar, aten.le.Tensor})

Coupling = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Site:
    """A noise layer in a captured network: where its ratios meet the threshold, and where its factor is applied.

    `below`: the comparison `snr <= threshold`; `snr`: its left side, shape (channels,); `applied`: the product with the
    factor, whose channels lie along `axis`.
    """

    below: fx.Node
    snr: Tensor
    is_pruned: Tensor
    applied: fx.Node
    axis: int


def refilled(program: Program, pipeline: Pipeline) -> tuple[Program, tuple[Note, ...]]:
    """Return the captured network with pruned channels on where the pipeline pads a width, and what was done.

    Raises UsageError where the pipeline chooses no widths.
    """
    if not isinstance(pipeline, ChooseWidths) or pipeline.target is None:
        raise UsageError(
            "filling widths needs a target that has wider ones: leave out fill, or name another target"
        )
    sites = list(find_sites(program))
    if not sites:
        return program, (
            Note("fill", "no noise whose ratio is compared with a threshold: nothing to restore"),
        )
    minimal = replace(pipeline, target=None, tuner=None)(program).program
    wider = pipeline(program).program
    canonical = Canonicalize()(program).program
    tied = ties(canonical.replace(analysis=analyze(canonical, rule_for)), rule_for)
    counts = [_kept(small, canonical, tied) for small in (minimal, wider)]
    restored: dict[fx.Node, Tensor] = {}
    notes = []
    for coupling, group in _by_coupling(sites, canonical, tied).items():
        more = counts[1].get(coupling, 0) - counts[0].get(coupling, 0)
        chosen = _best(group, more)
        if len(chosen):
            restored |= {site.below: chosen for site in group}
            ratios = torch.stack([site.snr[chosen] for site in group]).amax(0)
            names = ", ".join(str(site.applied.meta.get("module") or site.applied.name) for site in group)
            notes.append(
                Note(
                    "fill",
                    f"{names}: {len(chosen)} pruned channels are on again "
                    f"(ratios {float(ratios.max()):.2f} to {float(ratios.min()):.2f})",
                )
            )
    if not restored:
        return program, (Note("fill", "no width is padded behind noise: nothing to restore"),)
    return _switched_on(program, restored), tuple(notes)


def find_sites(program: Program) -> Iterator[Site]:
    """Yield the noise layers of a captured network whose channels were judged by a ratio."""
    values = constant_values(program)
    for node in program.calls():
        if node.target not in COMPARISONS or node not in values or values[node].ndim != 1:
            continue
        ratio = values.get(node.all_input_nodes[0])
        if ratio is None or ratio.shape != values[node].shape or not ratio.is_floating_point():
            continue
        for product, factor in _applications(node, values):
            places = [axis for axis, size in enumerate(factor.shape) if size > 1]
            if len(places) == 1 and factor.shape[places[0]] == len(ratio):
                axis = program.infos[product].rank - factor.ndim + places[0]
                yield Site(node, ratio, values[node], product, axis)


def _applications(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Iterator[tuple[fx.Node, Tensor]]:
    """Yield the products that a constant ends in, each with the factor that it has become."""
    seen, ahead = {node}, [node]
    while ahead:
        current = ahead.pop()
        for user in current.users:
            if user in values and user not in seen:
                seen.add(user)
                ahead.append(user)
            elif user not in values and user.target is aten.mul.Tensor:
                yield user, values[current]


def _kept(small: Program, canonical: Program, tied: Ties) -> dict[Coupling, int]:
    """How many channels a network keeps at each coupling of the canonical one: the most of any value there."""
    originals = canonical.by_origin()
    found: dict[Coupling, int] = {}
    for node, info in small.infos.items():
        origin: Origin | None = node.meta.get("origin")
        before = None if origin is None else originals.get(origin.name)
        if before is None or info.rank != canonical.infos[before].rank:
            continue
        for axis in info.static_axes:
            coupling = tied.coupling((before, axis))
            found[coupling] = max(found.get(coupling, 0), info.sizes[axis])
    return found


def _by_coupling(sites: Sequence[Site], canonical: Program, tied: Ties) -> dict[Coupling, list[Site]]:
    """The sites whose channels are numbered together; without those that canonical spelling has merged away."""
    originals = canonical.by_origin()
    found: dict[Coupling, list[Site]] = {}
    for site in sites:
        node = originals.get(site.applied.name)
        if node is not None and canonical.infos[node].sizes[site.axis] == len(site.snr):
            found.setdefault(tied.coupling((node, site.axis)), []).append(site)
    return found


def _best(group: Sequence[Site], count: int) -> Tensor:
    """The channels that are pruned at every site, those with the highest ratio at any of them first."""
    is_free = torch.stack([site.is_pruned for site in group]).all(0)
    ratio = torch.stack([site.snr.double() for site in group]).amax(0)
    order = torch.argsort(torch.where(is_free, ratio, -torch.inf), descending=True, stable=True)
    return order[: max(0, min(count, int(is_free.sum())))].sort().values


def _switched_on(program: Program, restored: Mapping[fx.Node, Tensor]) -> Program:
    """The network in which these channels are not below the threshold."""
    values = constant_values(program)
    rewriter = Rewriter(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node in restored:
            below = values[node].clone()
            below[restored[node]] = False
            rewriter.env[node] = rewriter.constant(below, f"{node.name}_refilled", torch.bool)
        elif node.op == "call_function":
            rewriter.env[node] = rewriter.copy(node)
    rewriter.output()
    return rewriter.finish()
