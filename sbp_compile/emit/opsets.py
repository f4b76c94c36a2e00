"""Models in older opsets: what torch's exporter writes, brought down by ONNX's own converter.

The converter refuses some calls that read the same in both opsets, and operators that the standard defines by others.
The first are kept away from it, the second are spelled out. What comes out is checked and run like any other file.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx.checker
import onnx.inliner
import onnx.numpy_helper
import onnx.shape_inference
import onnx.version_converter

from sbp_compile.errors import UsageError

EXPORTED = 18  # what torch's exporter writes without a conversion
OLDEST = 11
_ASIDE = "sbp_compile.same"
_LARGEST_READ = 1024

_NEUTRAL = {
    "layout": 0,
    "antialias": 0,
    "keep_aspect_ratio_policy": b"stretch",
    "reduction": b"none",
    "allowzero": 0,
    "training_mode": 0,
}
_RENAMED = {"BatchNormalization"}
"""Whose operands are called otherwise from some opset on, and mean the same."""
_OBSOLETE = "noop_with_empty_axes"
_SPELLED_OUT = {"LayerNormalization": 17, "HardSwish": 14, "Mish": 18}


def lowered(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return a model of the exporter's opset in an older one; `UsageError` where ONNX's converter has no way there."""
    if opset < OLDEST:
        raise UsageError(f"opset {opset} cannot express this network; {OLDEST} is the oldest that is written")
    light = without_weights(model)
    _weights_as_inputs(light.graph)
    try:
        light = _spelled_out(light, opset)
        _cut_shapes(light.graph, opset)
        for step in range(EXPORTED - 1, opset - 1, -1):
            _put_aside(light.graph, step)
            light.opset_import.append(onnx.helper.make_opsetid(_ASIDE, 1))
            light = onnx.version_converter.convert_version(light, step)
            _take_back(light)
        onnx.checker.check_model(light)
        onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True)
    except Exception as error:  # the converter is C++ and raises what it likes
        raise UsageError(
            f"opset {opset} cannot express this network, as far as the ONNX version converter knows; opset "
            f"{EXPORTED} can"
        ) from error
    _inputs_as_weights(light.graph, [tensor for tensor in model.graph.initializer if _is_large(tensor)])
    light.ir_version = model.ir_version
    return light


def nearest(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return a model of the exporter's opset in the oldest one from `opset` on that it can be written in."""
    for candidate in range(max(opset, OLDEST), EXPORTED):
        try:
            return lowered(model, candidate)
        except UsageError:
            continue
    return model


def opset_of(model: onnx.ModelProto) -> int:
    """Return the opset of ONNX's own operators in a model."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in {"", "ai.onnx"})


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with large weights by their names and shapes alone.

    What is C++ copies the model, and refuses one beyond 2 GB; and protobuf gives no memory back of a field that was
    cleared in place.
    """
    light = onnx.ModelProto()
    _copy_fields(model, light, without="graph")
    _copy_fields(model.graph, light.graph, without="initializer")
    for tensor in model.graph.initializer:
        copied = light.graph.initializer.add()
        if _is_large(tensor):
            _copy_fields(tensor, copied, without="raw_data")
            copied.data_location = onnx.TensorProto.EXTERNAL
        else:
            copied.CopyFrom(tensor)
    return light


def _is_large(tensor: onnx.TensorProto) -> bool:
    return len(tensor.raw_data) > _LARGEST_READ


def _copy_fields(source: Any, target: Any, *, without: str) -> None:
    for field, value in source.ListFields():
        if field.name == without:
            continue
        held = getattr(target, field.name)
        if hasattr(held, "MergeFrom"):
            held.MergeFrom(value)
        else:
            setattr(target, field.name, value)


def _weights_as_inputs(graph: onnx.GraphProto) -> None:
    """Declare weights without data as inputs."""
    kept = []
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            graph.input.append(value)
        else:
            kept.append(tensor)
    _replace(graph.initializer, kept)


def _inputs_as_weights(graph: onnx.GraphProto, held: list[onnx.TensorProto]) -> None:
    names = {tensor.name for tensor in held}
    _replace(graph.input, [entry for entry in graph.input if entry.name not in names])
    graph.initializer.extend(held)


def _replace(field: Any, kept: list[Any]) -> None:
    copies = []
    for entry in kept:
        copies.append(type(entry)())
        copies[-1].CopyFrom(entry)
    del field[:]
    field.extend(copies)


def _spelled_out(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Write operators that are younger than the opset by the others that the standard defines them by."""
    present = {node.op_type for node in model.graph.node}
    young = [("", name) for name, since in _SPELLED_OUT.items() if since > opset and name in present]
    if not young:
        return model
    own = {entry.name for entry in model.graph.input}
    for tensor in model.graph.initializer:  # the inliner asks for types
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        )
    model = onnx.shape_inference.infer_shapes(model)
    model = onnx.inliner.inline_selected_functions(model, young, inline_schema_functions=True)
    _replace(model.graph.input, [entry for entry in model.graph.input if entry.name in own])
    del model.graph.value_info[:]
    return model


def _cut_shapes(graph: onnx.GraphProto, opset: int) -> None:
    """Write a part of a shape, which Shape gives from opset 15 on, as a slice of the whole."""
    if opset >= 15:
        return
    nodes = []
    for number, node in enumerate(graph.node):
        bounds = {entry.name: entry.i for entry in node.attribute if node.op_type == "Shape"}
        nodes.append(node)
        if not bounds:
            continue
        del node.attribute[:]
        names = [f"{_ASIDE}.{number}.{part}" for part in ("whole", "starts", "ends")]
        ends = [bounds.get("start", 0)], [bounds.get("end", 2**31)]
        for name, values in zip(names[1:], ends, strict=True):
            graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [1], values))
        nodes.append(onnx.helper.make_node("Slice", names, [node.output[0]]))
        node.output[0] = names[0]
    _replace(graph.node, nodes)


def _put_aside(graph: onnx.GraphProto, opset: int) -> None:
    """Move calls that read the same in an opset and the next one to a domain that the converter leaves alone."""
    zeros = {entry.name for entry in graph.initializer if _holds_zero(entry)}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] not in zeros:  # nothing that allowzero could say
            _replace(node.attribute, [entry for entry in node.attribute if entry.name != "allowzero"])
        if node.op_type.startswith("Reduce"):  # an attribute that the converter leaves behind
            _replace(
                node.attribute, [entry for entry in node.attribute if entry.name != _OBSOLETE or entry.i]
            )
        if not node.domain and _reads_the_same(node, opset):
            node.domain = _ASIDE


def _holds_zero(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == onnx.TensorProto.INT64 and not onnx.numpy_helper.to_array(tensor).all()


def _reads_the_same(node: onnx.NodeProto, opset: int) -> bool:
    """Whether a call of the next opset is spelled the same; attributes that are neutral and younger are taken off."""
    try:
        old, new = (onnx.defs.get_schema(node.op_type, version) for version in (opset, opset + 1))
    except onnx.defs.SchemaError:
        return False
    if old.since_version == new.since_version:
        return True
    younger = {
        entry.name
        for entry in node.attribute
        if entry.name not in old.attributes
        and _NEUTRAL.get(entry.name) == onnx.helper.get_attribute_value(entry)
    }
    given = {entry.name for entry in node.attribute} - younger
    silent = (old.attributes.keys() | new.attributes.keys()) - given - _NEUTRAL.keys() - {_OBSOLETE}
    same = (
        given <= old.attributes.keys()
        and all(_default(old, name) == _default(new, name) for name in silent)
        and _takes(old, node)
        and (
            node.op_type in _RENAMED
            or [entry.name for entry in old.inputs][: len(node.input)]
            == [entry.name for entry in new.inputs][: len(node.input)]
        )
    )
    if same:
        _replace(node.attribute, [entry for entry in node.attribute if entry.name not in younger])
    return same


def _default(schema: Any, name: str) -> bytes | None:
    """Return an attribute's default; None where it has none, or where the opset does not know it."""
    return (
        schema.attributes[name].default_value.SerializeToString() or None
        if name in schema.attributes
        else None
    )


def _takes(schema: Any, node: onnx.NodeProto) -> bool:
    """Whether an operator takes that many operands, and may do without those that are left out."""
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    left_out = [entry for entry, name in zip(schema.inputs, node.input, strict=False) if not name]
    return schema.min_input <= len(node.input) <= schema.max_input and all(
        entry.option == optional for entry in left_out
    )


def _take_back(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.domain == _ASIDE:
            node.domain = ""
    _replace(model.opset_import, [entry for entry in model.opset_import if entry.domain != _ASIDE])
