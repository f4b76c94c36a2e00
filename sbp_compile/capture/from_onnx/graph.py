"""The graph of an ONNX file as nodes in their order, each value made once and before it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from sbp_compile.capture.from_onnx.node import ONNX_DOMAINS, Node
from sbp_compile.capture.from_onnx.tensors import read_tensor
from sbp_compile.errors import ModelFileError

_KINDS = onnx.AttributeProto
_DEEPEST = 16
_LITERALS = {
    "value_float": torch.float32,
    "value_floats": torch.float32,
    "value_int": torch.int64,
    "value_ints": torch.int64,
}


@dataclass(frozen=True)
class Graph:
    """Nodes that some output needs, in order; `constants`: of this graph, by name; `captured`: read from outside."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[tuple[Node, onnx.NodeProto], ...]
    constants: Mapping[str, Tensor]
    captured: frozenset[str] = field(default=frozenset())


class GraphReader:
    """Reads a graph and those within it; `constants` of all of them stand under the names of their values."""

    def __init__(self, opsets: Mapping[str, int], folder: Path) -> None:
        self._opsets = opsets
        self._folder = folder

    def read(
        self,
        graph: onnx.GraphProto,
        initializers: Mapping[str, Tensor],
        outside: frozenset[str] = frozenset(),
        fixed: frozenset[str] = frozenset(),
        depth: int = 0,
    ) -> Graph:
        """Return the graph. `outside`: values that it may capture; `fixed`: those among them that no input changes.

        Raises `ModelFileError` for a value that is made twice, or read before it is made (cycles are such).
        """
        if depth > _DEEPEST:
            raise ModelFileError(f"graphs are nested more than {_DEEPEST} deep")
        constants = dict(initializers)
        for proto in graph.initializer:
            constants[proto.name] = read_tensor(proto, self._folder, f"weight {proto.name!r}")
        inputs = tuple(entry.name for entry in graph.input if entry.name not in constants)
        defined = set(outside)
        _define([*constants, *inputs], defined)
        constant = {*fixed, *constants}
        nodes: list[tuple[Node, onnx.NodeProto]] = []
        for proto in graph.node:
            if proto.op_type == "Constant" and proto.domain in ONNX_DOMAINS and len(proto.output) == 1:
                constants[proto.output[0]] = self._literal(proto)
                constant.add(proto.output[0])
                _define(proto.output, defined)
                continue
            _refuse_undefined(proto, defined)
            node = self._node(proto, defined, constant, depth)
            if all(node.constant) and node.captured <= constant:
                constant.update(filter(None, proto.output))
            _define([name for name in proto.output if name], defined)
            nodes.append((node, proto))
        outputs = tuple(entry.name for entry in graph.output)
        if not outputs:
            raise ModelFileError("its graph computes no output")
        for name in outputs:
            if name not in defined:
                raise ModelFileError(f"output {name!r} is computed by nothing in the graph")
        live, read = _live(nodes, outputs)
        return Graph(inputs, outputs, live, constants, frozenset(read & outside))

    def _node(self, proto: onnx.NodeProto, defined: set[str], constant: set[str], depth: int) -> Node:
        attributes: dict[str, Any] = {}
        captured: frozenset[str] = frozenset()
        for entry in proto.attribute:
            if entry.type == _KINDS.GRAPH:
                inner = self.read(entry.g, {}, frozenset(defined), frozenset(constant), depth + 1)
                attributes[entry.name], captured = inner, captured | inner.captured
            else:
                attributes[entry.name] = self._attribute(proto, entry)
        domain = "" if proto.domain in ONNX_DOMAINS else proto.domain
        return Node(
            op=proto.op_type,
            name=proto.name,
            domain=domain,
            opset=self._opsets.get(domain, 1),
            inputs=tuple(proto.input),
            outputs=tuple(proto.output),
            attributes=attributes,
            constant=tuple(not name or name in constant for name in proto.input),
            captured=captured,
        )

    def _literal(self, proto: onnx.NodeProto) -> Tensor:
        """Return the tensor of a Constant node."""
        for entry in proto.attribute:
            value = self._attribute(proto, entry)
            if entry.name == "value" and isinstance(value, Tensor):
                return value
            if entry.name in _LITERALS and value is not None:
                return torch.tensor(value, dtype=_LITERALS[entry.name])
        raise ModelFileError(
            f"{_shown(proto)} holds no tensor of numbers (text and sparse tensors are not read)"
        )

    def _attribute(self, proto: onnx.NodeProto, entry: onnx.AttributeProto) -> Any:
        if entry.type == _KINDS.TENSOR:
            return read_tensor(entry.t, self._folder, f"attribute {entry.name!r} of {_shown(proto)}")
        if entry.type in (_KINDS.STRING, _KINDS.STRINGS):
            value = onnx.helper.get_attribute_value(entry)
            return [_text(item) for item in value] if isinstance(value, list) else _text(value)
        if entry.type in (_KINDS.INT, _KINDS.FLOAT, _KINDS.INTS, _KINDS.FLOATS):
            value = onnx.helper.get_attribute_value(entry)
            return value if isinstance(value, (int, float)) else list(value)
        return None  # a kind that no translation reads; it refuses what it needs and does not find


def _refuse_undefined(proto: onnx.NodeProto, defined: set[str]) -> None:
    for name in proto.input:
        if name and name not in defined:
            raise ModelFileError(
                f"{_shown(proto)} reads {name!r}, which nothing before it computes: the graph is cyclic, not sorted or "
                "has lost a part"
            )


def _define(names: Sequence[str], defined: set[str]) -> None:
    for name in names:
        if name in defined:
            raise ModelFileError(f"value {name!r} is computed twice; names in a graph must be different")
        defined.add(name)


def _shown(proto: onnx.NodeProto) -> str:
    return f"{proto.op_type} node {proto.name or ', '.join(proto.output)!r}"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _live(
    nodes: Sequence[tuple[Node, onnx.NodeProto]], outputs: Sequence[str]
) -> tuple[tuple[tuple[Node, onnx.NodeProto], ...], set[str]]:
    """Return the nodes that some output needs, told which of their results are read, and all names that are read."""
    read = set(outputs)
    found = []
    for node, proto in reversed(nodes):
        wanted = tuple(name in read for name in node.outputs)
        if any(wanted):
            read.update(filter(None, node.inputs), node.captured)
            found.append((node.wanting(wanted), proto))
    return tuple(reversed(found)), read
