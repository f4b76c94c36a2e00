"""Graph-to-graph passes that shrink a network to the channels that matter; they need torch and nothing else."""

from passes.absorb_constants import AbsorbConstants
from passes.analyze_channels import AnalyzeChannels
from passes.canonicalize import Canonicalize
from passes.fold_scales import FoldScales
from passes.ir.errors import LintError, PassError, UnsupportedError
from passes.ir.pipeline import Note, Pipeline, Result, Step
from passes.ir.program import Input, Program, TensorInfo
from passes.merge_normalized import MergeNormalized
from passes.remove_dead import RemoveDead
from passes.rules import Rule, registered_rules, rule
from passes.select_inputs import SelectInputs
from passes.shrink_channels import ShrinkChannels


def default_pipeline() -> Pipeline:
    """The passes in the order that the compiler runs them, until nothing changes."""
    rounds = Pipeline(
        (
            FoldScales(),  # first: a scale of zero becomes a zero row or column, which the sweeps see
            MergeNormalized(),  # columns become zero, which the sweeps see, too
            AnalyzeChannels(),  # facts, demand and keep sets of this very graph
            AbsorbConstants(),  # needs the keep sets; leaves every removed channel without a reader
            ShrinkChannels(),  # needs both; slices
            Canonicalize(),  # constants that appeared are folded, neutral operations go
        ),
        name="shrink",
        repeat=True,
    )
    return Pipeline(
        (
            Canonicalize(),  # one dialect for everything after it
            rounds,
            AnalyzeChannels(),
            SelectInputs(),  # last: what no coupling could remove is worth a gather only now
            RemoveDead(),
        ),
        name="default",
    )


__all__ = [
    "AbsorbConstants",
    "AnalyzeChannels",
    "Canonicalize",
    "FoldScales",
    "Input",
    "LintError",
    "MergeNormalized",
    "Note",
    "PassError",
    "Pipeline",
    "Program",
    "RemoveDead",
    "Result",
    "Rule",
    "SelectInputs",
    "ShrinkChannels",
    "Step",
    "TensorInfo",
    "UnsupportedError",
    "default_pipeline",
    "registered_rules",
    "rule",
]
