"""analyze_channels: the two sweeps and the keep sets, attached to the Program."""

from __future__ import annotations

from dataclasses import dataclass

from passes.ir.analysis import analyze
from passes.ir.pipeline import Result
from passes.ir.program import Program
from passes.rules import rule_for


@dataclass(frozen=True)
class AnalyzeChannels:
    """The pass; it has no options and changes nothing but the Program's analysis."""

    name: str = "analyze_channels"

    def __call__(self, program: Program) -> Result:
        if program.analysis is not None:
            return Result(program, False)
        return Result(program.replace(analysis=analyze(program, rule_for)), False)
