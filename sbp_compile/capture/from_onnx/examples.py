"""Example inputs of an ONNX file, from what it says of its inputs' shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from sbp_compile.capture.example_inputs import Axes, random_tensor
from sbp_compile.capture.from_onnx.file import OnnxFile
from sbp_compile.capture.from_onnx.tensors import dtype_of
from sbp_compile.capture.interface import Interface
from sbp_compile.errors import InputError, ModelFileError, UnsupportedModelError, UsageError

_BATCH = 2
_MOST_BYTES = 2**30
_PASSED_ON = frozenset({"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose"})


@dataclass(frozen=True)
class Declared:
    """One input: its name in the file, torch's dtype, and its sizes: a number, or a name where it is open.

    `sizes`: None where the file says nothing; `highest`: of an integer, as far as the graph tells.
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[int | str, ...] | None
    highest: int = 1

    @property
    def open_axes(self) -> dict[int, str]:
        """The axes of open size, with their names."""
        return {axis: size for axis, size in enumerate(self.sizes or ()) if isinstance(size, str)}

    def flag(self) -> str:
        """Return the option that gives an example, with words where only the user knows a number."""
        shape = "SHAPE"
        if self.sizes is not None:
            parts = [
                _BATCH if axis == 0 and isinstance(size, str) else size
                for axis, size in enumerate(self.sizes)
            ]
            shape = "x".join(str(part).upper() for part in parts) or "scalar"
        bounds = "" if self.dtype.is_floating_point or self.dtype is torch.bool else f":0..{self.highest}"
        return f"--input {self.name}={shape}:{str(self.dtype).removeprefix('torch.')}{bounds}"


def declared_inputs(file: OnnxFile) -> list[Declared]:
    """Return the inputs of the file's graph. Raises `UnsupportedModelError` for inputs that are no tensors."""
    found = []
    for entry in file.model.graph.input:
        if entry.name in file.initializers:
            continue
        if entry.type.WhichOneof("value") != "tensor_type":
            raise UnsupportedModelError(
                f"input {entry.name!r} is a sequence or another container; expected a tensor"
            )
        kind = entry.type.tensor_type
        dtype = dtype_of(kind.elem_type, f"input {entry.name!r}")
        sizes = tuple(_sizes(entry.name, kind.shape)) if kind.HasField("shape") else None
        found.append(Declared(entry.name, dtype, sizes, _highest(file, entry.name)))
    return found


def _sizes(name: str, shape: onnx.TensorShapeProto) -> list[int | str]:
    found: list[int | str] = []
    for axis, size in enumerate(shape.dim):
        if size.WhichOneof("value") == "dim_value" and size.dim_value >= 0:
            found.append(size.dim_value)
        elif size.WhichOneof("value") == "dim_value":
            raise ModelFileError(f"input {name!r} has size {size.dim_value} along axis {axis}")
        else:
            found.append(size.dim_param or f"{name}_{axis}")
    return found


def _highest(file: OnnxFile, name: str) -> int:
    """Return the highest index that an input may hold, if it is used to gather rows of a table; else 1."""
    names, rows = {name}, []
    for node in file.model.graph.node:
        if node.op_type in _PASSED_ON and node.input and node.input[0] in names:
            names.update(node.output)
        if node.op_type == "Gather" and len(node.input) == 2 and node.input[1] in names:
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 0)
            table = file.initializers.get(node.input[0])
            if table is not None and table.ndim:
                rows.append(table.shape[axis % table.ndim])
    return max(min(rows) - 1, 0) if rows else 1


def example_inputs(inputs: Sequence[Declared], source: str) -> dict[str, Tensor]:
    """Return random inputs of the declared shapes, 2 for leading open axes; `InputError` where others are open."""
    if any(entry.sizes is None or set(entry.open_axes) - {0} for entry in inputs):
        flags = " ".join(entry.flag() for entry in inputs)
        raise InputError(f"{source} leaves sizes of its inputs open: add {flags}, or --inputs data.npz")
    leading = {entry.sizes[0] for entry in inputs if entry.sizes and isinstance(entry.sizes[0], str)}
    found = {}
    for number, entry in enumerate(inputs):
        assert entry.sizes is not None
        shape = [_BATCH if size in leading else int(size) for size in entry.sizes]
        if math.prod(shape) * entry.dtype.itemsize > _MOST_BYTES:
            raise InputError(
                f"input {entry.name!r} of {source} has shape {list(entry.sizes)}, which takes "
                f"{math.prod(shape) * entry.dtype.itemsize / 2**30:.0f} GiB; at most 1 GiB is tried"
            )
        found[entry.name] = random_tensor(shape, entry.dtype, high=entry.highest, seed=number)
    return found


def check_shapes(inputs: Sequence[Declared], given: Sequence[Tensor]) -> None:
    """Raise `InputError` where an example has another dtype, rank or size than the file fixes."""
    if len(given) != len(inputs):
        raise InputError(f"{len(given)} inputs are given, the file takes {len(inputs)}")
    for entry, value in zip(inputs, given, strict=True):
        fits = entry.sizes is None or (
            value.ndim == len(entry.sizes)
            and all(
                isinstance(wanted, str) or wanted == size
                for wanted, size in zip(entry.sizes, value.shape, strict=True)
            )
        )
        if not fits or value.dtype != entry.dtype:
            sizes = "any shape" if entry.sizes is None else str(list(entry.sizes))
            raise InputError(
                f"input {entry.name!r} is given as {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}, "
                f"the file takes {sizes} of {str(entry.dtype).removeprefix('torch.')}"
            )


def check_axes(inputs: Sequence[Declared], arguments: Sequence[str], axes: Axes) -> None:
    """Raise `UsageError` for an axis that is to be dynamic where the file fixes its size."""
    for entry, argument in zip(inputs, arguments, strict=True):
        for axis in axes.get(argument, {}):
            if entry.sizes is not None and axis < len(entry.sizes) and isinstance(entry.sizes[axis], int):
                raise UsageError(
                    f"--dynamic {entry.name}:{axis}: the file fixes that size to {entry.sizes[axis]}; export the "
                    "network again with this axis dynamic"
                )


def interface_of(file: OnnxFile, inputs: Mapping[str, str]) -> Interface:
    """Return what the file says beside its graph; `inputs`: names by those of the captured network."""
    model, graph = file.model, file.model.graph
    taken = set(inputs.values())
    outputs = [f"{entry.name}_output" if entry.name in taken else entry.name for entry in graph.output]
    origin = {"sbp_compile.source_producer": f"{model.producer_name} {model.producer_version}".strip()}
    return Interface(
        inputs,
        tuple(outputs),
        file.opset,
        metadata={**origin, **{entry.key: entry.value for entry in model.metadata_props}},
        texts={name: getattr(model, name) for name in ("doc_string", "domain")},
        documents={entry.name: entry.doc_string for entry in (*graph.input, *graph.output)},
        version=model.model_version,
        graph_name=graph.name,
        graph_document=graph.doc_string,
    )
