"""What a Program costs: multiply-adds, parameters and bytes; the protocol through which passes ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from passes.ir.program import Program, TensorInfo

aten = torch.ops.aten

CONTRACTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default})
TRANSPOSED = frozenset(
    {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
)


class Copied(NamedTuple):
    """What a gather copies for one example: runs of entries, and the entries in them all.

    `is_packed`: whether a layer may have given them packed in blocks, so that they have to be unpacked for it.
    """

    runs: int
    entries: int
    is_packed: bool = True


class CostModel(Protocol):
    """Decides what is cheaper; the default counts, others measure."""

    def gathers_pay(self, copies: Sequence[Copied], saved_macs: int) -> bool:
        """Whether gathers, by what each copies, are cheaper than `saved_macs` multiply-adds."""

    def map_pays(self, entries: int, saved_macs: int) -> bool:
        """Whether adding a constant to `entries` entries of one example is cheaper than `saved_macs` multiply-adds."""


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one example, parameters, and their bytes after emission."""

    macs: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class CountingModel:
    """The default: what a gather costs, in multiply-adds: each call, each run of entries copied, each entry.

    Fitted to docs/results/adapters.md; entries that are not packed anyway, as behind a concatenation, are cheaper.
    What it takes there pays at batch 1; it is up to 9% off where the narrower layer has a width that the runtime
    handles badly (24 channels), and for a small linear layer at batch 16.

    A constant map costs its own call and each entry (docs/results/maps.md), and must not make the file much larger.
    """

    macs_per_gather: int = 12_000
    macs_per_run: int = 180
    macs_per_entry: int = 60
    macs_per_plain_entry: int = 12
    macs_per_map: int = 4_000
    macs_per_map_entry: int = 5
    largest_map: int = 1 << 17

    def gathers_pay(self, copies: Sequence[Copied], saved_macs: int) -> bool:
        cost = sum(
            self.macs_per_gather
            + self.macs_per_run * copied.runs
            + (self.macs_per_entry if copied.is_packed else self.macs_per_plain_entry) * copied.entries
            for copied in copies
        )
        return saved_macs > cost

    def map_pays(self, entries: int, saved_macs: int) -> bool:
        if entries > self.largest_map:
            return False
        return saved_macs > self.macs_per_map + self.macs_per_map_entry * entries


@dataclass(frozen=True)
class FewestMacs:
    """Takes every gather and every constant map that saves a multiply-add, whether or not that saves time."""

    def gathers_pay(self, copies: Sequence[Copied], saved_macs: int) -> bool:
        return saved_macs > 0

    def map_pays(self, entries: int, saved_macs: int) -> bool:
        return saved_macs > 0


@dataclass(frozen=True)
class FewestCalls:
    """Takes no gather and no constant map, whatever they save."""

    def gathers_pay(self, copies: Sequence[Copied], saved_macs: int) -> bool:
        return False

    def map_pays(self, entries: int, saved_macs: int) -> bool:
        return False


def macs_by_node(program: Program) -> dict[str, int]:
    """Multiply-adds of each contraction and matrix product, for one example, by node name."""
    batch = _example_batch(program)
    found = {}
    for node in program.calls():
        info = program.infos.get(node)
        if info is None or program.op(node).has_empty_tensors:
            continue
        if node.target in CONTRACTIONS:
            weight = program.infos.get(node.args[1])  # type: ignore[arg-type]
            if weight is not None:
                found[node.name] = _numel(info) * _numel(weight) // weight.sizes[0] // batch(info)
        elif node.target in TRANSPOSED:
            x, weight = (program.infos.get(operand) for operand in node.args[:2])  # type: ignore[arg-type]
            if x is not None and weight is not None:
                found[node.name] = _numel(x) * _numel(weight) // weight.sizes[0] // batch(x)
        elif node.target in {aten.mm.default, aten.bmm.default, aten.matmul.default}:
            left = program.infos.get(node.args[0])  # type: ignore[arg-type]
            if left is not None and left.rank:
                found[node.name] = _numel(info) * left.sizes[-1] // batch(info)
        elif node.target is aten.scaled_dot_product_attention.default:
            query, key = (program.infos.get(operand) for operand in node.args[:2])  # type: ignore[arg-type]
            if query is not None and key is not None:
                weights = _numel(query) // query.sizes[-1] * key.sizes[-2]
                found[node.name] = weights * (query.sizes[-1] + info.sizes[-1]) // batch(info)
    return found


def count(program: Program) -> Cost:
    """The whole Program's cost."""
    numbers = {name: program.constants.held(name).numel() for name in program.constants}
    size = sum(number * program.dtypes[name].itemsize for name, number in numbers.items())
    return Cost(sum(macs_by_node(program).values()), sum(numbers.values()), size)


def _numel(info: TensorInfo) -> int:
    return int(torch.Size(info.sizes).numel())


def _example_batch(program: Program):  # type: ignore[no-untyped-def]
    """How many examples a value of the first example shape holds."""
    sizes = program.inputs[0].sizes if program.inputs else ()
    batch = sizes[0] if sizes else 1

    def examples(info: TensorInfo) -> int:
        return batch if batch and info.rank and info.sizes[0] % batch == 0 else 1

    return examples
