"""The way in for ONNX files: read and screened (`file`), made a plain module (`network`), run as it is (`runtime`).

Each operator's translation stands in one of the files that are named after families of operators.
"""

from sbp_compile.capture.from_onnx.examples import (
    check_axes,
    check_shapes,
    declared_inputs,
    example_inputs,
    interface_of,
)
from sbp_compile.capture.from_onnx.file import OnnxFile, load_onnx
from sbp_compile.capture.from_onnx.network import OnnxNetwork, onnx_network
from sbp_compile.capture.from_onnx.runtime import OriginalRun

__all__ = [
    "OnnxFile",
    "OnnxNetwork",
    "OriginalRun",
    "check_axes",
    "check_shapes",
    "declared_inputs",
    "example_inputs",
    "interface_of",
    "load_onnx",
    "onnx_network",
]
