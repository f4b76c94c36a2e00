"""Graph-to-graph passes that shrink a network to the channels that matter; they need torch and nothing else."""

from collections.abc import Mapping

from passes.absorb_constants import AbsorbConstants
from passes.align_heads import AlignHeads
from passes.analyze_channels import AnalyzeChannels
from passes.canonicalize import Canonicalize
from passes.choose_widths import PLAIN, ChooseWidths, Tuner, widths_of
from passes.compose_readings import ComposeReadings
from passes.fold_permutations import FoldPermutations
from passes.fold_scales import FoldScales
from passes.ir.cost import Copied, CostModel, CountingModel, FewestCalls, FewestMacs
from passes.ir.errors import LintError, PassError, UnsupportedError
from passes.ir.pipeline import Note, Pass, Pipeline, Result, Step
from passes.ir.program import Input, Program, TensorInfo
from passes.lay_out_constants import LayOutConstants
from passes.merge_normalized import MergeNormalized
from passes.merge_parallel import MergeParallel
from passes.merge_serial import MergeSerial
from passes.remove_dead import RemoveDead
from passes.rules import Rule, registered_rules, rule
from passes.separate_axes import SeparateAxes
from passes.separate_edges import SeparateEdges
from passes.separate_positions import SeparatePositions
from passes.settle_norms import SettleNorms
from passes.shrink_channels import ShrinkChannels
from passes.targets import TARGETS, Target, this_cpu


def default_pipeline(
    cost: CostModel | None = None, target: Target | None = None, tuner: Tuner | None = None
) -> Pipeline:
    """The passes in the order that the compiler runs them, until nothing changes.

    `cost` decides what is cheaper where there is a choice (default: `CountingModel`, whose maps give way to channels
    where the target runs those faster, and with a tuner each of `COSTS` is tried); `target` knows which widths run fast
    (default: none, the minimal network); `tuner` measures what the target's table guesses, and which network is the
    fastest.
    """
    others = {} if cost is not None else {name: _passes(other) for name, other in COSTS.items()}
    return ChooseWidths(
        _passes(cost or CountingModel()),
        name="default",
        target=target,
        tuner=tuner,
        alternatives=others,
        spares_maps=cost is None,
    )


COSTS: Mapping[str, CostModel] = {"every gather and map": FewestMacs(), PLAIN: FewestCalls()}
"""Other answers to what the default cost model guesses: for a tuner to measure, and one for estimates to judge."""


def _passes(cost: CostModel) -> tuple[Pass, ...]:
    rounds = Pipeline(
        (
            FoldScales(),  # first: a scale of zero becomes a zero row or column, which the sweeps see
            FoldPermutations(),  # a permutation that went into weights couples nothing any more
            MergeParallel(cost),  # needs scales where they are folded to; one layer couples less than two
            MergeNormalized(),  # columns become zero, which the sweeps see, too
            AnalyzeChannels(),  # facts, demand and keep sets of this very graph
            AlignHeads(),  # needs facts and demand; the same columns in every head, as far as their order is free
            AnalyzeChannels(),  # again, if something was aligned
            LayOutConstants(
                cost
            ),  # needs the keep sets; what a basis of constants would stand for too dearly
            AnalyzeChannels(),  # again, if something was laid out
            AbsorbConstants(),  # needs the keep sets; leaves every removed channel without a reader
            ShrinkChannels(),  # needs both; slices
            Canonicalize(),  # constants that appeared are folded, neutral operations go
            ComposeReadings(),  # what is read of fewer entries may be read at once
        ),
        name="shrink",
        repeat=True,
    )
    return (
        Canonicalize(),  # one dialect for everything after it
        SeparateAxes(),  # channels that are multiplied with a dynamic axis can be numbered only apart from it
        ComposeReadings(),  # before any keep set: pieces of one value become independent of each other
        rounds,
        Pipeline(
            (MergeSerial(),), name="merge", repeat=True
        ),  # only now: what is between two layers may have shrunk to less than either side
        AnalyzeChannels(),
        SeparatePositions(cost),  # what is read at few positions; before channels, which then cost less
        AnalyzeChannels(),  # again, if something was separated
        SeparateEdges(cost),  # last: what no coupling could remove is worth a gather only now
        rounds,  # cuts what the gathers set free
        AnalyzeChannels(),  # what it needs is mostly there
        SettleNorms(),  # last: where channels are cut, weights and biases of norms are
        RemoveDead(),
    )


__all__ = [
    "COSTS",
    "TARGETS",
    "AbsorbConstants",
    "AlignHeads",
    "AnalyzeChannels",
    "Canonicalize",
    "ChooseWidths",
    "ComposeReadings",
    "Copied",
    "CostModel",
    "CountingModel",
    "FewestCalls",
    "FewestMacs",
    "FoldPermutations",
    "FoldScales",
    "Input",
    "LayOutConstants",
    "LintError",
    "MergeNormalized",
    "MergeParallel",
    "MergeSerial",
    "Note",
    "PassError",
    "Pipeline",
    "Program",
    "RemoveDead",
    "Result",
    "Rule",
    "SeparateAxes",
    "SeparateEdges",
    "SeparatePositions",
    "SettleNorms",
    "ShrinkChannels",
    "Step",
    "Target",
    "TensorInfo",
    "Tuner",
    "UnsupportedError",
    "default_pipeline",
    "registered_rules",
    "rule",
    "this_cpu",
    "widths_of",
]
