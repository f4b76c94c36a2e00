"""Tensors of an ONNX file: sizes and places are checked against what is there before anything is made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from sbp_compile.errors import ModelFileError, UnsupportedModelError

_Type = onnx.TensorProto
DTYPES: Mapping[int, torch.dtype] = {
    _Type.FLOAT: torch.float32,
    _Type.DOUBLE: torch.float64,
    _Type.FLOAT16: torch.float16,
    _Type.BFLOAT16: torch.bfloat16,
    _Type.INT8: torch.int8,
    _Type.INT16: torch.int16,
    _Type.INT32: torch.int32,
    _Type.INT64: torch.int64,
    _Type.UINT8: torch.uint8,
    _Type.BOOL: torch.bool,
    _Type.COMPLEX64: torch.complex64,
    _Type.COMPLEX128: torch.complex128,
}
_MOST_AXES = 64  # as many as torch has


def dtype_of(element_type: int, what: str) -> torch.dtype:
    """Return torch's dtype of an ONNX element type; `UnsupportedModelError` where there is none (text, 4 bits)."""
    if element_type not in DTYPES:
        known = element_type in _Type.DataType.values()
        name = _Type.DataType.Name(element_type).lower() if known else f"number {element_type}"
        raise UnsupportedModelError(
            f"{what} has element type {name}, with which nothing can be compiled; export the network in float32"
        )
    return DTYPES[element_type]


def read_tensor(proto: onnx.TensorProto, folder: Path, what: str) -> Tensor:
    """Return a tensor of the file, in memory of its own. `folder`: where external data are; `what`: for messages.

    Raises `ModelFileError` where the sizes claim other data than there are, or the data lie outside of the folder.
    """
    dtype = dtype_of(proto.data_type, what)
    shape = tuple(proto.dims)
    if len(shape) > _MOST_AXES or any(size < 0 for size in shape):
        raise ModelFileError(f"{what} has shape {list(shape)[:_MOST_AXES]}, which no tensor can have")
    size = math.prod(shape) * dtype.itemsize
    if proto.data_location == _Type.EXTERNAL:
        return _from_bytes(_external_bytes(proto, folder, size, what), shape, dtype)
    if proto.HasField("raw_data"):
        if len(proto.raw_data) != size:
            raise ModelFileError(
                f"{what} of shape {list(shape)} needs {size} bytes, the file has {len(proto.raw_data)}; is it "
                "truncated?"
            )
        return _from_bytes(np.frombuffer(proto.raw_data, np.uint8), shape, dtype)
    return _from_fields(proto, shape, dtype, what)


def external_places(proto: onnx.TensorProto) -> Mapping[str, str]:
    """Return what a tensor says of its external data."""
    return {entry.key: entry.value for entry in proto.external_data}


def all_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a graph: initializers and attributes, those of inner graphs too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from all_tensors(inner)


def _from_bytes(content: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    held = torch.empty(shape, dtype=dtype)
    if held.numel():
        held.view(-1).view(torch.uint8).numpy()[:] = content
    return held


def _from_fields(proto: onnx.TensorProto, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Tensor:
    """Return a tensor whose numbers are in the typed fields; only those say how many there are."""
    fields = (proto.float_data, proto.double_data, proto.int32_data, proto.int64_data, proto.uint64_data)
    held, count = max(map(len, fields)), math.prod(shape)
    if held < count:
        raise ModelFileError(f"{what} of shape {list(shape)} needs {count} numbers, the file has {held}")
    try:
        array = np.ascontiguousarray(numpy_helper.to_array(proto))
    except Exception as error:  # onnx documents no closed list of what it raises on damaged tensors
        raise ModelFileError(f"{what} cannot be read ({error})") from error
    if array.nbytes != count * dtype.itemsize:
        raise ModelFileError(f"{what} of shape {list(shape)} has {array.size} numbers")
    return _from_bytes(array.reshape(-1).view(np.uint8), shape, dtype)


def _external_bytes(proto: onnx.TensorProto, folder: Path, size: int, what: str) -> np.ndarray:
    places = external_places(proto)
    path = external_path(places.get("location", ""), folder, what)
    try:
        offset, length = int(places.get("offset", 0)), int(places.get("length", size))
    except ValueError as error:
        raise ModelFileError(f"{what} has external data at a place that is no number ({error})") from error
    held = path.stat().st_size
    if offset < 0 or length != size or offset + size > held:
        raise ModelFileError(
            f"{what} of shape {list(proto.dims)} needs {size} bytes at {offset} in {path.name!r}, which has {held} "
            f"(claimed: {length}); is the file truncated?"
        )
    return np.fromfile(path, np.uint8, count=size, offset=offset)


def external_path(location: str, folder: Path, what: str) -> Path:
    """Return where external data lie; `ModelFileError` unless that is a plain file in the model's own folder.

    Absolute paths, `..`, drives and links that lead out are refused.
    """
    parts = (*PurePosixPath(location).parts, *PureWindowsPath(location).parts)
    outside = (
        not location
        or "\0" in location
        or ".." in parts
        or PurePosixPath(location).is_absolute()
        or bool(PureWindowsPath(location).anchor)
    )
    home = folder.resolve()
    path = folder / location if not outside else folder
    if outside or not path.resolve().is_relative_to(home):
        raise ModelFileError(
            f"{what} has its data in {location!r}, outside of the model's folder; only files beside the model are read"
        )
    if not path.is_file():
        raise ModelFileError(
            f"{what} has its data in {location!r}, and there is no such file beside the model"
        )
    return path
