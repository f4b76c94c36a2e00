"""An ONNX file in 8 bits, by onnxruntime's own static quantisation.

Weights per output channel in 7 bits and a sign, activations in 8 bits without one, as QDQ pairs around the layers. One
bit of the weights is left free: x86 processors without VNNI add two products of 8 bits in 16, which would overflow and
make the result depend on the processor.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from sbp_compile.errors import UnsupportedModelError

Feed = Mapping[str, NDArray[np.generic]]

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def quantised(model: onnx.ModelProto, path: Path, feeds: Sequence[Feed]) -> onnx.ModelProto:
    """Return the 8-bit version of a model that lies at `path`, calibrated on `feeds` (smallest and largest values).

    Names, opset and metadata stay. Raises `UnsupportedModelError` where onnxruntime cannot quantise it or there is
    nothing to quantise.
    """
    if not any(node.op_type in LAYERS for node in model.graph.node):
        raise UnsupportedModelError("the network has no layer to quantise; write it without int8")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared, target = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        try:
            _quantise(path, prepared, target, feeds)
        except Exception as error:  # onnxruntime documents no closed list
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsupportedModelError(
                f"onnxruntime cannot quantise the network ({reason}); write it without int8"
            ) from error
        found = onnx.load(str(target))
    del found.metadata_props[:]
    found.metadata_props.extend(model.metadata_props)
    found.producer_name, found.producer_version = model.producer_name, model.producer_version
    return found


def _quantise(path: Path, prepared: Path, target: Path, feeds: Sequence[Feed]) -> None:
    # Imported here: half a second that only quantisation needs.
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self.left, None)

    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that onnxruntime logs."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
