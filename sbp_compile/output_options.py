"""What may be asked of an output file, and which kinds of file there are."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from sbp_compile.errors import UsageError

OPSET = 20
INT8_OPSET = 13

ONNX, EXPORTED, WEIGHTS = ".onnx", ".pt2", ".safetensors"
TORCHSCRIPT = (".ts", ".pt")
# What a file of generated source imports, itself or by torch.
_SHADOWED = frozenset({*sys.stdlib_module_names, "torch", "numpy", "safetensors"})
SUFFIXES = (ONNX, EXPORTED, *TORCHSCRIPT, WEIGHTS)


@dataclass(frozen=True)
class OutputOptions:
    """How a network is written.

    `opset`: of an ONNX file (None: 20, or 18 with average pools). `external_data`: weights of an ONNX file in a second
    file, whatever their size. `fp16`: weights and computation in half precision; inputs and outputs as in the original.
    `fp16_io`: inputs and outputs in half precision, too. `int8`: an .npz file with example inputs (and `labels`), for
    an ONNX file in 8 bits that is calibrated on them.
    """

    opset: int | None = None
    external_data: bool = False
    fp16: bool = False
    fp16_io: bool = False
    int8: Path | None = None

    def check(self, path: Path) -> None:
        """Raise `UsageError` where the suffix is not known or an option says nothing about such a file."""
        if path.suffix not in SUFFIXES:
            raise UsageError(f"output {path.name!r} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
        if not _is_utf8(path):
            raise UsageError(
                f"output {str(path)!r} is no name in UTF-8, which the runtimes need; give it another name"
            )
        if path.suffix == WEIGHTS and path.stem in _SHADOWED:
            raise UsageError(
                f"{path.stem}.py beside {path.name!r} would be imported in place of the library of that name; give the "
                "output another name"
            )
        if self.opset is not None and (isinstance(self.opset, bool) or not isinstance(self.opset, int)):
            raise UsageError(f"opset (={self.opset!r}) must be an integer")
        if self.fp16_io and not self.fp16:
            raise UsageError("fp16_io needs fp16: half precision at the interface alone saves nothing")
        if self.int8 is not None and (self.fp16 or self.external_data):
            other = "fp16" if self.fp16 else "external_data"
            raise UsageError(f"int8 and {other} exclude each other")
        if self.int8 is not None and self.opset is not None and self.opset < INT8_OPSET:
            raise UsageError(
                f"int8 needs opset {INT8_OPSET} or newer, whose weights have a scale for each channel"
            )
        for name in ("opset", "external_data", "int8"):
            if getattr(self, name) not in {None, False} and path.suffix != ONNX:
                raise UsageError(f"{_flag(name)} is for .onnx outputs, not for {path.name!r}")


def _is_utf8(path: Path) -> bool:
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        return False
    return True


def option_names() -> list[str]:
    """Return the names of all options."""
    return [field.name for field in fields(OutputOptions)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
