"""Program to ONNX: torch's exporter, onnx-graphsurgeon for cleaning, names and metadata set last."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import torch
from torch import fx
from torch.export import Dim

from passes.ir import schema
from passes.ir.analysis import size_source
from passes.ir.program import Input, Program, TensorInfo
from passes.rules.layer import SPATIAL_RANK
from passes.rules.window import ADAPTIVE_MEAN_POOLS, MEAN_POOLS
from sbp_compile.capture.export import quiet_export
from sbp_compile.capture.interface import Interface
from sbp_compile.emit.module import emit_graph_module
from sbp_compile.emit.onnx_gathers import gather_rows
from sbp_compile.emit.onnx_norms import normalise_channels
from sbp_compile.emit.onnx_perceptrons import flatten_perceptrons
from sbp_compile.emit.onnx_powers import spell_powers
from sbp_compile.emit.onnx_scalars import keep_scalars
from sbp_compile.emit.onnx_transposed import spell_output_padding
from sbp_compile.emit.opsets import EXPORTED, lowered, nearest, opset_of, without_weights
from sbp_compile.errors import UnsupportedModelError, UsageError
from sbp_compile.output_options import OPSET

LARGEST_EMBEDDED = 2_000_000_000


def onnx_model(
    program: Program,
    output_names: Sequence[str | None],
    metadata: Mapping[str, str],
    *,
    opset: int | None = None,
    dtype: torch.dtype | None = None,
    interface: Interface | None = None,
) -> onnx.ModelProto:
    """Return the ONNX model of a Program, rounded to `dtype` (its own); outputs without a name are left out.

    `opset`: as old as it may be; if not given 20, or 18 where windows are averaged. `interface`: of the ONNX file that
    the network came from: its texts are kept, and its opset, or the next one in which the network can be written.
    Dimensions are named as the user has named them, else `batch` for the leading dynamic axis and `<input>_<axis>` for
    the others.
    Raises UnsupportedModelError where torch's exporter has no translation of an operator, and UsageError where the
    network cannot be written in that opset.
    """
    _refuse_groups_of_examples(program)
    wanted = opset
    if wanted is None:
        wanted = (EXPORTED if _averages(program) else OPSET) if interface is None else interface.opset
    names = [name for name in output_names if name is not None]
    module = _emitted(keep_scalars(program), output_names, dtype)
    proto = _export(program, module, len(names), max(wanted, EXPORTED))
    del module
    program.constants.free_dropped()  # modules and exported programs
    model = _cleaned(proto, [entry.shown for entry in program.inputs], names)
    del proto
    program.constants.free_dropped()  # graphs
    if wanted < EXPORTED:
        model = lowered(model, wanted) if opset is not None else nearest(model, wanted)
    results = zip(program.outputs, output_names, strict=True)
    _name_dimensions(model, program, [result for result, name in results if name is not None])
    model.graph.value_info.extend(_inferred(model))
    _describe(model, metadata, interface)
    return model


def _averages(program: Program) -> bool:
    """Whether windows are averaged: onnxruntime's kernel for AveragePool from opset 19 on is five times slower."""
    return any(
        node.target in MEAN_POOLS
        or (node.target in ADAPTIVE_MEAN_POOLS and set(program.op(node).args["output_size"]) != {1})
        for node in program.calls()
    )


def _refuse_groups_of_examples(program: Program) -> None:
    """Refuse convolutions that have a kernel for each example: in ONNX the number of groups is fixed."""
    for node in program.calls():
        if node.target in SPATIAL_RANK and isinstance(schema.bind(node).get("groups"), fx.Node):
            raise UnsupportedModelError(
                f"{node.name} has as many groups as the batch has examples, and ONNX wants a fixed number: "
                "compile with dynamic_batch=False, or write .pt2"
            )


def _inferred(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Shapes of the values inside, as ONNX's own rules have them."""
    try:
        inferred = onnx.shape_inference.infer_shapes(without_weights(model), strict_mode=True)
        return list(inferred.graph.value_info)
    except onnx.shape_inference.InferenceError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UnsupportedModelError(
            f"ONNX's shape inference refuses what torch's exporter wrote: {lines[-1]}; write .pt2 instead"
        ) from error


def save_onnx(model: onnx.ModelProto, path: Path, *, external_data: bool = False) -> None:
    """Check a model and write it; beyond 2 GB, or if asked, its weights go to a second file beside it.

    The second file, `<path>.<16 hexadecimal digits>.data`, is named after its content, so that the file that refers
    to it never finds another's weights there. It is referred to by its name alone: the two must stay together.
    """
    if weight_bytes(model) < LARGEST_EMBEDDED and not external_data:
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString(deterministic=True))
    else:
        location = f"{path.name}.{_content_hash(model)}.data"
        onnx.save_model(model, str(path), save_as_external_data=True, location=location)
        onnx.checker.check_model(str(path))


def external_data_pattern(name: str) -> str:
    """Return a regular expression for the names of the second files that belong to a file of that name."""
    return rf"{re.escape(name)}\.[0-9a-f]{{16}}\.data"


def _content_hash(model: onnx.ModelProto) -> str:
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(repr((tensor.name, tensor.data_type, *tensor.dims)).encode())
        digest.update(tensor.raw_data)
    return digest.hexdigest()[:16]


def weight_bytes(model: onnx.ModelProto) -> int:
    """Return the bytes of a model's weights (what the size of its file comes to, a few kilobytes aside)."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def _describe(model: onnx.ModelProto, metadata: Mapping[str, str], interface: Interface | None) -> None:
    model.producer_name, model.producer_version = "sbp_compile", metadata.get("sbp_compile.version", "")
    if interface is not None:
        _keep_texts(model, interface)
        metadata = {**interface.metadata, **metadata}
    del model.metadata_props[:]
    for key in sorted(metadata):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, metadata[key]


def _keep_texts(model: onnx.ModelProto, interface: Interface) -> None:
    for name, text in interface.texts.items():
        setattr(model, name, text)
    model.model_version = interface.version
    model.graph.name = interface.graph_name or model.graph.name
    model.graph.doc_string = interface.graph_document
    for value in (*model.graph.input, *model.graph.output):
        value.doc_string = interface.documents.get(value.name, "")


def _export(program: Program, module: fx.GraphModule, outputs: int, opset: int) -> onnx.ModelProto:
    args = tuple(torch.zeros(entry.sizes, dtype=entry.dtype) for entry in program.inputs)
    with quiet_export(), _quiet_onnx():
        exported = torch.export.export(module, args, dynamic_shapes=_dynamic_shapes(program), strict=False)
        try:
            converted = torch.onnx.export(
                exported,
                args,
                dynamo=True,
                opset_version=opset,
                input_names=[entry.name for entry in program.inputs],
                output_names=[f"sbp_compile.{position}" for position in range(outputs)],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise UnsupportedModelError(
                f"torch's ONNX exporter cannot translate the network: {_first_cause(error)}; write .pt2 instead"
            ) from error
    assert converted is not None
    proto: onnx.ModelProto = converted.model_proto
    for value in converted.model.graph.initializers.values():
        value.const_value = None  # the rewriter remembers its last match, and the whole graph with it
    _refuse_other_opset(proto, opset)
    return proto


def _refuse_other_opset(proto: onnx.ModelProto, opset: int) -> None:
    """Refuse what the exporter wrote in another opset, without a word, because its converter has no way there."""
    found = opset_of(proto)
    if found != opset:
        raise UsageError(
            f"opset {opset} cannot express this network, as far as the ONNX version converter knows; opset {found} can"
        )


def _first_cause(error: BaseException) -> str:
    """What the chain of errors began with, as one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0].rstrip(".")


def _dynamic_shapes(program: Program) -> dict[str, Any]:
    """One `batch` for the leading dynamic axis; torch finds out how the other dynamic axes hang together."""
    batch = _batch(program)
    dim = Dim("batch", min=1)
    return {
        entry.name: {
            axis: dim if pair == batch else Dim.AUTO
            for axis, pair in enumerate(_pairs(entry))
            if pair[0] != pair[1]
        }
        for entry in program.inputs
    }


def _batch(program: Program) -> tuple[int, int] | None:
    """Return both sizes of the first dynamic axis that leads an input."""
    return next((pair for entry in program.inputs for pair in _pairs(entry)[:1] if pair[0] != pair[1]), None)


def _pairs(entry: Input) -> list[tuple[int, int]]:
    return list(zip(entry.sizes, entry.other_sizes, strict=True))


def _emitted(
    program: Program, output_names: Sequence[str | None], dtype: torch.dtype | None
) -> fx.GraphModule:
    """Return the module of a Program with the outputs that have a name."""
    module = emit_graph_module(program, dtype)
    wanted = [name is not None for name in output_names]
    output = next(iter(reversed(module.graph.nodes)))
    results: Any = output.args[0]
    output.args = (tuple(value for value, keep in zip(results, wanted, strict=True) if keep),)
    module.graph.eliminate_dead_code()
    _fix_strides(module.graph)
    module.recompile()
    return module


def _fix_strides(graph: fx.Graph) -> None:
    """Have every reshape read a contiguous copy, which ONNX knows nothing of.

    The exporter takes a reshape for a view where the strides that it traces allow one, and runs the graph again with
    other strides (those of attention depend on the kernel that torch would take), for which there is no view.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default):
        with graph.inserting_before(node):
            contiguous: dict[str, Any] = {"memory_format": torch.contiguous_format}
            node.update_arg(0, graph.call_function(torch.ops.aten.clone.default, node.args[:1], contiguous))


def _cleaned(proto: onnx.ModelProto, input_names: list[str], output_names: list[str]) -> onnx.ModelProto:
    """Name inputs and outputs, remove dead nodes, drop the exporter's notes (source lines among them).

    The exporter would give an output a name that a value inside the graph may already have.
    """
    graph = gs.import_onnx(proto)
    taken, inputs = {*input_names, *output_names}, {id(tensor) for tensor in graph.inputs}
    for name, tensor in graph.tensors(check_duplicates=True).items():
        if name in taken and id(tensor) not in inputs:
            tensor.name = f"{name}.inner"
    for tensor, name in zip([*graph.inputs, *graph.outputs], [*input_names, *output_names], strict=True):
        tensor.name = name
    gather_rows(graph)
    flatten_perceptrons(graph)
    spell_output_padding(graph)
    normalise_channels(graph)
    spell_powers(graph)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    model: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    model.ir_version = proto.ir_version
    parts = (model.graph.node, model.graph.input, model.graph.output, model.graph.initializer)
    for entry in (model.graph, *itertools.chain(*parts)):
        del entry.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
    del model.graph.value_info[:]
    return model


def _name_dimensions(model: onnx.ModelProto, program: Program, results: Sequence[fx.Node]) -> None:
    known: dict[tuple[str, int], str] = {}
    batch = _batch(program)
    for entry in program.inputs:
        for axis, pair in enumerate(_pairs(entry)):
            if pair[0] != pair[1]:
                name = "batch" if axis == 0 and pair == batch else f"{entry.name}_{axis}"
                known[entry.name, axis] = dict(entry.axis_names).get(axis, name)
    for value, entry in zip(model.graph.input, program.inputs, strict=True):
        info = TensorInfo(entry.sizes, entry.other_sizes, entry.dtype, entry.far_sizes)
        _set_dimensions(value, info, program, known)
    for value, node in zip(model.graph.output, results, strict=True):
        if node in program.infos:
            _set_dimensions(value, program.infos[node], program, known)


def _set_dimensions(
    value: onnx.ValueInfoProto,
    info: TensorInfo,
    program: Program,
    known: Mapping[tuple[str, int], str],
) -> None:
    shape = value.type.tensor_type.shape
    for axis in range(min(info.rank, len(shape.dim))):
        if info.is_static(axis):
            shape.dim[axis].dim_value = info.sizes[axis]
            continue
        source = size_source(program, info, axis)
        shape.dim[axis].dim_param = known[source] if source is not None else f"{value.name}_{axis}"


@contextmanager
def _quiet_onnx() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
