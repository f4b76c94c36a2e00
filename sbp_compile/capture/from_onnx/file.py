"""An ONNX file: parsed, screened and checked, its weights taken out; nothing in it is run.

onnx's checker sees the graph without its weights, whose sizes are compared here with the data that are there. Functions
that the file defines are inlined by onnx, and so are operators that the standard itself defines by others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx.checker
import onnx.inliner
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from torch import Tensor

from sbp_compile.capture.from_onnx.node import ONNX_DOMAINS, TRANSLATIONS
from sbp_compile.capture.from_onnx.tensors import all_tensors, read_tensor
from sbp_compile.errors import CompileError, ModelFileError, UnsupportedModelError

OLDEST_OPSET = 11
_LARGEST_PARSED = 2**31 - 1
_T = TypeVar("_T")


@dataclass(frozen=True)
class OnnxFile:
    """What a file holds: the model without its initializers, these as tensors, and the digest of all of it."""

    path: Path
    model: onnx.ModelProto
    initializers: Mapping[str, Tensor]
    sha256: str

    @property
    def opsets(self) -> dict[str, int]:
        """The opset of each domain; that of ONNX itself under the empty name."""
        return {_plain(entry.domain): entry.version for entry in self.model.opset_import}

    @property
    def opset(self) -> int:
        """The opset of ONNX's own operators."""
        return self.opsets[""]


def load_onnx(path: Path) -> OnnxFile:
    """Read an ONNX file.

    Raises `ModelFileError` for one that is damaged or whose external data are missing or lie outside of its folder,
    `UnsupportedModelError` for an opset below 11 or tensors of a kind that cannot be compiled.
    """
    content = path.read_bytes()
    model = _parsed(content)
    digest = hashlib.sha256(content)
    del content
    _check_texts(model)
    _check_opset(model)
    _refuse_sparse(model.graph)
    external = {
        tensor.name
        for tensor in all_tensors(model.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    initializers = _taken_out(model.graph, path.parent)
    for name in sorted(external & initializers.keys()):
        digest.update(initializers[name].reshape(-1).view(torch.uint8).numpy().data)
    return OnnxFile(path, _checked(model, initializers), initializers, digest.hexdigest())


def _parsed(content: bytes) -> onnx.ModelProto:
    if len(content) > _LARGEST_PARSED:
        raise ModelFileError(
            "it is larger than 2 GB, which no ONNX file can be; save its weights as external data"
        )
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except (DecodeError, RuntimeError, ValueError, RecursionError) as error:
        raise ModelFileError(
            f"it is no ONNX model, or a truncated or damaged one ({_first_line(error)})"
        ) from error
    if not model.ir_version or not model.HasField("graph"):
        raise ModelFileError("it is no ONNX model, or a truncated one: it has no graph")
    return model


def _check_texts(message: Any) -> None:
    """Refuse names and texts that are no UTF-8: the parser lets them pass, and reading them fails then."""
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.type == field.TYPE_MESSAGE:
            for inner in values:
                _check_texts(inner)
        elif field.type == field.TYPE_STRING and not all(isinstance(text, str) for text in values):
            raise ModelFileError(f"it has a damaged text in the field {field.name!r}")


def _check_opset(model: onnx.ModelProto) -> None:
    own = [entry.version for entry in model.opset_import if _plain(entry.domain) == ""]
    if len(own) != 1:
        raise ModelFileError(f"it names {len(own)} opsets of ONNX's own operators; expected one")
    if own[0] < OLDEST_OPSET:
        raise UnsupportedModelError(
            f"the file is of opset {own[0]}; opsets from {OLDEST_OPSET} on are read: export it again, or convert it "
            "with onnx.version_converter.convert_version"
        )
    newest = onnx.defs.onnx_opset_version()
    if own[0] > newest:
        raise UnsupportedModelError(
            f"the file is of opset {own[0]}, the onnx package here (onnx {onnx.__version__}) knows them up to "
            f"{newest}: update it, or export the network with an older opset"
        )


def _refuse_sparse(graph: onnx.GraphProto) -> None:
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise UnsupportedModelError(
            f"weight {name!r} is stored as a sparse tensor; save the model with dense weights"
        )


def _taken_out(graph: onnx.GraphProto, folder: Path) -> dict[str, Tensor]:
    """Return the initializers as tensors, and leave none of their data in the graph."""
    found: dict[str, Tensor] = {}
    for tensor in graph.initializer:
        if not tensor.name or tensor.name in found:
            raise ModelFileError(f"it has two weights of the name {tensor.name!r}")
        found[tensor.name] = read_tensor(tensor, folder, f"weight {tensor.name!r}")
        for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
    declared = {entry.name for entry in graph.input}
    for tensor in graph.initializer:
        if tensor.name not in declared:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    del graph.initializer[:]
    return found


def _checked(model: onnx.ModelProto, initializers: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Return the model with its functions inlined, checked before and after.

    What it says of values inside and of the outputs' shapes is not looked at: many files leave it away, some lie.
    """
    del model.graph.value_info[:]
    for entry in model.graph.output:
        if entry.type.WhichOneof("value") == "tensor_type":
            entry.type.tensor_type.shape.SetInParent()
    _by_onnx(lambda: onnx.checker.check_model(model))
    if model.functions:
        model = _by_onnx(lambda: onnx.inliner.inline_local_functions(model, convert_version=True))
    composed = sorted(_composed(model.graph))
    if composed:
        expand = [("", name) for name in composed]
        model = _by_onnx(
            lambda: onnx.inliner.inline_selected_functions(model, expand, inline_schema_functions=True)
        )
    if model.functions or composed:
        _by_onnx(lambda: onnx.checker.check_model(model))
    return model


def _composed(graph: onnx.GraphProto) -> set[str]:
    """Return operators that have no translation of their own, but a definition by others in the standard."""
    found = set()
    for node in graph.node:
        if node.domain in ONNX_DOMAINS and node.op_type not in TRANSLATIONS and _has_definition(node.op_type):
            found.add(node.op_type)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found |= _composed(inner)
    return found


def _has_definition(operator: str) -> bool:
    try:
        schema = onnx.defs.get_schema(operator)
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]


def _by_onnx(function: Callable[[], _T]) -> _T:
    try:
        return function()
    except CompileError:
        raise
    except Exception as error:  # onnx's C++ raises what it likes
        raise ModelFileError(f"it is no valid ONNX model: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _plain(domain: str) -> str:
    return "" if domain in ONNX_DOMAINS else domain
