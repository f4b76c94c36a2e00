"""What the compiler would leave of a network: channels of each layer and multiply-adds, before any file is written."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from passes import FewestMacs, default_pipeline
from sbp_compile.capture.export import export_module
from sbp_compile.capture.program import program_from_export
from sbp_compile.report.report import build_report


@dataclass(frozen=True)
class Structure:
    """Kept units of each layer, in order, all units, and multiply-adds of one example, kept and all.

    A unit is an output channel of a convolution and an input feature of a linear layer: 3-18-284-283 for LeNet-5, as
    the paper counts.
    """

    kept: tuple[int, ...]
    units: tuple[int, ...]
    macs: int
    dense_macs: int


class StructureCounter:
    """A network without noise layers, captured once, to be asked what its zeros leave as they change.

    `example`: an input (N, ...), N at least 2. Raises what capture raises. The network is left as it was.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        self._program = program_from_export(export_module(network, (example,)))

    def count(self, network: nn.Module) -> Structure:
        """Count with the weights that `network`, of the same architecture, has now; no gather is too dear."""
        constants = dict(self._program.constants)
        for name, value in network.state_dict().items():
            if name in constants:
                constants[name] = value.detach().to("cpu", constants[name].dtype)
        program = self._program.replace(constants=constants)
        small = default_pipeline(FewestMacs())(program).program
        report = build_report(program, small, (), (), verification=None, seconds={})
        rows = [
            (row.inputs, row.inputs_kept) if row.kind == "linear" else (row.channels, row.kept)
            for row in report.layers
        ]
        units, kept = (tuple(counts) for counts in zip(*rows, strict=True)) if rows else ((), ())
        return Structure(kept, units, report.after.macs, report.before.macs)


def structure(network: nn.Module, example: Tensor) -> Structure:
    """Count once; arguments and errors as for `StructureCounter`."""
    return StructureCounter(network, example).count(network)
