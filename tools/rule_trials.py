"""One trial of a rule: whether what it claims is true, and whether it claims what is true.

Incorrect is what breaks one of the three laws (tests/passes/rules/laws.py). Missing is, of a rule that is right:

- forward: an entry of the result that stayed the same under every filling of the unknown entries and is not claimed
  known;
- backward: an unknown entry of an operand that is called live although no change of it changed a demanded, unknown
  entry of the result;
- couple: an index that the coupling kept although nobody needs it and the rule's own rewrite does without it (alone, or
  together with the same index of the other axes of its size, or with everything that was widened).

Fillings vary in scale and sign and repeat zeros, small integers, the call's numbers and the other operands' values, so
that saturation, comparisons and ties show. What still looks the same is tried ten times as often before it counts.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rule_variants import leaves
from torch import Tensor, fx

from passes.ir.analysis import Analysis
from passes.ir.keep import KeepSets
from passes.ir.lattice import Facts, full_mask
from passes.ir.program import Op, TensorInfo
from passes.rules import rule_for
from tests.passes.rules import laws
from tests.passes.rules.laws import Case, Sample, X

FILLINGS = 24
CONFIRMATIONS = 240
SAME = 1e-13
LARGEST_SEARCH = 32
STYLES = ("plain", "plain", "plain", "nothing", "everything", "zeros", "channel", "channel", "entries")
LAWS = ("forward", "backward", "couple")


@dataclass
class Count:
    """How much a rule claims and how much it misses; what its coupling keeps, and why (index by index)."""

    claimed: int = 0
    missed: int = 0
    widened: int = 0
    reasons: tuple[str, ...] = ()

    def __add__(self, other: Count) -> Count:
        return Count(
            self.claimed + other.claimed,
            self.missed + other.missed,
            self.widened + other.widened,
            self.reasons + other.reasons,
        )


class Trial(Case):
    """A sample with random facts of one style."""

    def __init__(self, sample: Sample, seed: int, style: str = "plain") -> None:
        self.style = style
        super().__init__(sample, seed)
        self.palette = _palette(sample)
        kinds = {leaf.dtype for leaf in leaves(sample) if isinstance(leaf, (X, Tensor))}
        self.reads_positions = torch.int64 in kinds and any(kind.is_floating_point for kind in kinds)

    def _facts(self, operand: fx.Node) -> Facts:
        if operand.op == "get_attr" or self.style == "plain":
            return super()._facts(operand)
        value = self.base[operand]
        rank, known = value.ndim, torch.ones((1,) * value.ndim, dtype=torch.bool)
        if self.style == "nothing":
            known = ~known
        elif self.style == "zeros":
            value, known = torch.zeros_like(value), self.mask(self.program.infos[operand])
        elif self.style == "entries":
            static = self.program.infos[operand].static_axes
            sizes = [size if axis in static else 1 for axis, size in enumerate(value.shape)]
            known = torch.rand(sizes, generator=self.generator) < 0.7
        elif self.style == "channel" and rank:
            axis = int(torch.randint(rank, (), generator=self.generator))
            for other in set(range(rank)) - {axis}:
                value = value.narrow(other, 0, 1)
            if axis in self.program.infos[operand].static_axes:
                shape = [-1 if other == axis else 1 for other in range(rank)]
                known = (torch.rand(value.shape[axis], generator=self.generator) < 0.6).reshape(shape)
        for axis in range(rank):
            value = value if self.program.infos[operand].is_static(axis) else value.narrow(axis, 0, 1)
        self.base[operand] = value.expand(self.base[operand].shape).clone()
        return Facts(value, known)

    def __str__(self) -> str:
        """The call, and of each operand what is known (None: unknown)."""
        lines = [str(self.op.source.format_node())]
        for operand, facts in zip(self.op.operands, self.facts, strict=True):
            known = facts.known | torch.zeros_like(facts.value, dtype=torch.bool)
            value = facts.value.expand(known.shape)
            lines.append(f"{operand}, {tuple(value.shape)}: {_listed(value.tolist(), known.tolist())}")
        return "\n".join(lines)

    def fill(self, wide: bool = True) -> dict[fx.Node, Tensor]:
        """Values that agree with the facts, the unknown entries of varied scale and sign."""
        found = {}
        pick = int(torch.randint(len(self.palette), (), generator=self.generator))
        everywhere = self.palette[pick] if wide and self.coin(0.25) else None
        for (node, variable), facts in zip(self.variables, self._variable_facts(), strict=True):
            fresh = self._fresh(node, variable) if wide else variable.sample(self.generator)
            if everywhere is not None:
                fresh = everywhere.to(fresh.dtype).expand(fresh.shape)
            found[node] = torch.where(facts.known, self.base[node], fresh)
        return found

    def _fresh(self, node: fx.Node, variable: X) -> Tensor:
        is_limited = (variable.low, variable.high) != (X.low, X.high)
        if variable.dtype == torch.bool or (is_limited and self.coin()):
            return variable.sample(self.generator)
        if not variable.dtype.is_floating_point:
            if self.reads_positions:  # not every kernel checks them
                return variable.sample(self.generator)
            return torch.randint(-4, 9, variable.shape, generator=self.generator).to(variable.dtype)
        unit = torch.randn(variable.shape, generator=self.generator, dtype=variable.dtype)
        value: Tensor = unit * 10.0 ** float(torch.empty(()).uniform_(-1.5, 1.5, generator=self.generator))
        if self.coin(0.3):
            value = value.abs() * (1 if self.coin() else -1)
        if self.coin(0.4):
            picked = self.palette[
                torch.randint(len(self.palette), variable.shape, generator=self.generator)
            ].to(value.dtype)
            value = torch.where(torch.rand(variable.shape, generator=self.generator) < 0.5, picked, value)
        partners = [self.base[other] for other, _ in self.variables if other is not node]
        partners += self.constants.values()
        for partner in partners:
            if self.coin(0.2) and _broadcasts(partner.shape, variable.shape):
                equal = torch.rand(variable.shape, generator=self.generator) < 0.5
                value = torch.where(equal, partner.to(value.dtype), value)
        return value


def _listed(value: object, known: object) -> object:
    if isinstance(value, list) and isinstance(known, list):
        return [_listed(*pair) for pair in zip(value, known, strict=True)]
    return value if known else None


def _palette(sample: Sample) -> Tensor:
    numbers = [float(leaf) for leaf in leaves(sample) if isinstance(leaf, (int, float)) and abs(leaf) < 100]
    return torch.tensor([0.0, 0.0, 0.5, 1.0, -1.0, 2.0, -2.0, 3.0, *numbers], dtype=torch.float64)


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    return len(shape) <= len(target) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(target), strict=False)
    )


def incorrect(trial: Trial, law: str) -> str | None:
    """How the rule breaks a law on this trial, at both sizes of dynamic axes; None where it holds."""
    check = {"forward": laws.check_forward, "backward": laws.check_backward, "couple": laws.check_rewrite}[
        law
    ]
    try:
        for _ in range(2):
            trial.base = trial.values()
            check(trial)
            trial.resize()
    except Exception as failure:  # a rule that raises on a call that torch runs is wrong too
        return f"{type(failure).__name__}: {failure}".split("\n")[0]
    return None


def missing(trial: Trial, law: str) -> Count:
    """What the rule claims on this trial and what it misses; for a rule that is right."""
    if all(fact.all_known for fact in trial.facts):
        return Count()  # the analysis runs such a call itself
    if law == "couple":
        return _missing_couple(trial)
    found = _missing_forward if law == "forward" else _missing_backward
    return sum((found(trial, op) for op in trial.ops), Count())


def _fillings(trial: Trial, op: Op, count: int) -> Iterator[tuple[dict[fx.Node, Tensor], Tensor]]:
    """Fillings that the call takes, with its results: wide ones, or else those of the sample's own range."""
    refused = 0
    for _ in range(count):
        values = trial.fill(wide=refused < 3)
        result = _run(trial, op, values)
        if result is None:
            refused += 1
        else:
            yield values, result


def _run(trial: Trial, op: Op, values: dict[fx.Node, Tensor]) -> Tensor | None:
    """The result, None where torch refuses the values (an integer divided by 0, an index out of bounds)."""
    try:
        return trial.run(op, values)
    except (RuntimeError, IndexError, ZeroDivisionError):
        return None


def _missing_forward(trial: Trial, op: Op) -> Count:
    """Entries whose smallest and largest value over all fillings and sizes of dynamic axes agree."""
    info, facts = op.out, trial.forward(op)
    sizes = [size if info.is_static(axis) else 1 for axis, size in enumerate(info.sizes)]
    known = facts.known.expand(sizes)
    low, high = torch.full(sizes, torch.inf), torch.full(sizes, -torch.inf)
    low, high = low.double(), high.double()
    for count in (FILLINGS, CONFIRMATIONS):
        for position, (_, result) in enumerate(_fillings(trial, op, count)):
            least, most = _extremes(info, result)
            low, high = torch.minimum(low, least), torch.maximum(high, most)
            if position % 8 == 7 and not bool((_agree(low, high) & ~known).any()):
                return Count(int(known.sum()), 0)
        trial.resize()  # what holds at one size of a dynamic axis alone is no fact
    return Count(int(known.sum()), int((_agree(low, high) & ~known).sum()))


def _agree(low: Tensor, high: Tensor) -> Tensor:
    return torch.isfinite(low) & torch.isfinite(high) & (high - low <= SAME * high.abs())


def _extremes(info: TensorInfo, result: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value along dynamic axes; entries that are not finite say nothing."""
    value = result.detach().to(torch.float64)
    least = torch.where(torch.isfinite(value), value, torch.inf)
    most = torch.where(torch.isfinite(value), value, -torch.inf)
    for axis in range(value.ndim):
        if not info.is_static(axis):
            least, most = least.amin(axis, keepdim=True), most.amax(axis, keepdim=True)
    return least, most


def _missing_backward(trial: Trial, op: Op) -> Count:
    """Live, unknown entries that no change of a demanded, unknown result entry can be traced to."""
    wanted = trial.mask(op.out) & ~trial.forward(op).known
    asked = wanted.expand(op.out.sizes)
    if not bool(asked.any()):
        return Count()
    live = {node: full_mask(op.info_of(node), False) for node, _ in trial.variables}
    masks = rule_for(op).backward(op, wanted, trial.facts)
    for operand, mask in zip(op.operands, masks, strict=True):
        if operand in live:
            live[operand] = live[operand] | mask
    unknown = dict(zip(op.operands, (~fact.known for fact in trial.facts), strict=True))
    suspects = {node: (live[node] & unknown[node]).expand(x.shape).clone() for node, x in trial.variables}
    dead = sum(int((~live[node] & unknown[node]).expand(x.shape).sum()) for node, x in trial.variables)
    for values, _ in _fillings(trial, op, 4):
        for node, moved in _gradients(trial, op, values, asked).items():
            suspects[node] &= ~_spread(trial, node, moved)
    entries = [
        (node, index) for node in suspects for index in suspects[node].flatten().nonzero().flatten().tolist()
    ]
    random.Random(0).shuffle(entries)
    quiet = _quiet(trial, op, asked, entries[:LARGEST_SEARCH], FILLINGS)
    return Count(dead, len(_quiet(trial, op, asked, quiet, CONFIRMATIONS)))


def _gradients(trial: Trial, op: Op, values: dict[fx.Node, Tensor], asked: Tensor) -> dict[fx.Node, Tensor]:
    """Where a random combination of the asked entries has a gradient; empty for what has no gradients."""
    inputs = {node: value.clone() for node, value in values.items()}
    tracked = [node for node, value in inputs.items() if value.is_floating_point()]
    for node in tracked:
        inputs[node].requires_grad_()
    try:
        result = trial.run(op, inputs)
        picked = result[asked & torch.isfinite(result.detach())]
        weights = torch.randn(picked.shape, generator=trial.generator, dtype=picked.dtype)
        found = torch.autograd.grad(
            (picked * weights).sum(), [inputs[node] for node in tracked], allow_unused=True
        )
    except (RuntimeError, NotImplementedError):
        return {}
    return {node: part.to_dense() != 0 for node, part in zip(tracked, found, strict=True) if part is not None}


def _spread(trial: Trial, node: fx.Node, mask: Tensor) -> Tensor:
    """A mask over the entries of an operand, the same at all positions along dynamic axes."""
    info = trial.program.infos[node]
    for axis in range(info.rank):
        if not info.is_static(axis):
            mask = mask.any(axis, keepdim=True).expand(mask.shape)
    return mask


def _quiet(
    trial: Trial, op: Op, asked: Tensor, entries: list[tuple[fx.Node, int]], count: int
) -> list[tuple[fx.Node, int]]:
    """The entries of operands whose changes never change what is asked for: all of them, or those of each half."""
    if not entries:
        return []
    compared = 0
    for (values, result), (fresh, _) in zip(
        _fillings(trial, op, count), _fillings(trial, op, count), strict=False
    ):
        changed = {node: value.clone() for node, value in values.items()}
        for node, index in entries:
            changed[node].view(-1)[index] = fresh[node].reshape(-1)[index]
        after = _run(trial, op, changed)
        if after is None:
            continue
        compared += 1
        before, after = result[asked], after[asked]
        if not bool(torch.isclose(before, after, rtol=1e-12, atol=0.0, equal_nan=True).all()):
            if len(entries) == 1:
                return []
            half = len(entries) // 2
            return _quiet(trial, op, asked, entries[:half], count) + _quiet(
                trial, op, asked, entries[half:], count
            )
    return entries if 2 * compared >= count else []


def _missing_couple(trial: Trial) -> Count:
    """Indices kept beyond the necessary ones, and those of them that the rewrite can do without.

    Those of constants follow the others and cost nothing: they are not counted.
    """
    start = laws.start_keeping(trial)
    solved = _with_keep(trial, start, ())
    laws.solve(trial, solved)
    if not laws.left_over(trial, solved):
        return Count()
    widened = [
        (node, axis, int(index))
        for node in _values(trial)
        for axis in _axes(trial, node)
        for index in (solved.keep.get(node, axis) & ~start.keep.get(node, axis)).nonzero().flatten()
    ]
    spare: set[tuple[fx.Node, int, int]] = set()
    for group in () if trial.reads_positions else _removals(trial, widened):
        if not group <= spare and _does_without(trial, start, set(widened) - group):
            spare |= group
    counted = [node for node in _values(trial) if node.op != "get_attr"]
    axes = [(node, axis) for node in counted for axis in _axes(trial, node)]
    reasons = tuple(
        why
        for node, axis in axes
        for why, number in solved.keep.reasons(node.name, axis)
        for _ in range(number)
    )
    removed = sum(int((~solved.keep.get(node, axis)).sum()) for node, axis in axes)
    missed = sum(node in counted for node, _, _ in spare)
    return Count(removed, missed, sum(node in counted for node, _, _ in widened) - missed, reasons)


def _axes(trial: Trial, node: fx.Node) -> list[int]:
    """The axes that have channels to remove: static ones of more than one index."""
    info = trial.program.infos[node]
    return [axis for axis in info.static_axes if info.sizes[axis] > 1]


def _removals(
    trial: Trial, widened: list[tuple[fx.Node, int, int]]
) -> Iterator[set[tuple[fx.Node, int, int]]]:
    """What might go: everything, one index of all axes of a size, one index alone."""
    if widened:
        yield set(widened)
    for size, index in {(trial.program.infos[node].sizes[axis], index) for node, axis, index in widened}:
        yield {
            entry
            for entry in widened
            if entry[2] == index and trial.program.infos[entry[0]].sizes[entry[1]] == size
        }
    for entry in widened:
        if entry[0].op != "get_attr":
            yield {entry}


def _does_without(trial: Trial, start: Analysis, widened: set[tuple[fx.Node, int, int]]) -> bool:
    """Whether the rewrite obeys law 3 with the necessary indices and these."""
    fewer = _with_keep(trial, start, widened)
    if _may_broadcast(trial, fewer.keep):
        return False
    try:
        for _ in range(3):
            laws.check_kept(trial, fewer)
    except Exception:  # with fewer indices the rewrite may fail in any way
        return False
    return True


def _with_keep(trial: Trial, start: Analysis, widened: Iterable[tuple[fx.Node, int, int]]) -> Analysis:
    """Keep sets of what is necessary and of some more indices."""
    keep = KeepSets(trial.program.infos)
    for node in _values(trial):
        keep.start(node, start.demand[node.name] & ~start.facts[node.name].known)
    for node, axis, index in widened:
        keep.widen(node, axis, torch.arange(trial.program.infos[node].sizes[axis]) == index)
    return Analysis(start.facts, start.demand, keep)


def _values(trial: Trial) -> list[fx.Node]:
    """Operands and results."""
    return list(dict.fromkeys((*trial.op.operands, *(op.node for op in trial.ops))))


def _may_broadcast(trial: Trial, keep: KeepSets) -> bool:
    """Whether one index is left of an axis and several of another of its size, so that the first may be repeated."""
    counts: dict[int, set[int]] = {}
    for node in _values(trial):
        for axis in _axes(trial, node):
            counts.setdefault(trial.program.infos[node].sizes[axis], set()).add(keep.count(node, axis))
    return any(1 in found and max(found) > 1 for found in counts.values())


def size_of(trial: Trial) -> int:
    """The number of entries of the operands: what makes a finding easy to read."""
    return sum(value.numel() for value in (*trial.base.values(), *trial.constants.values()))
