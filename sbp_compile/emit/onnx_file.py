"""Program to ONNX: torch's exporter, onnx-graphsurgeon for cleaning, names and metadata set last."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import torch
from torch import Tensor, fx
from torch.export import Dim

from passes.ir.analysis import size_source
from passes.ir.program import Input, Program
from sbp_compile.capture.export import quiet_export
from sbp_compile.emit.module import emission_dtype, emit_graph_module

OPSET = 20
LARGEST_EMBEDDED = 2_000_000_000


def onnx_model(
    program: Program,
    output_names: Sequence[str | None],
    metadata: Mapping[str, str],
    *,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """The ONNX model of a Program, constants rounded to its dtype; outputs without a name are left out."""
    module = emit_graph_module(program)
    names = [name for name in output_names if name is not None]
    _keep_outputs(module, [name is not None for name in output_names])
    proto = _export(program, module, names, opset)
    return finish_model(_cleaned(proto), program, names, metadata)


def finish_model(
    model: onnx.ModelProto, program: Program, names: Sequence[str], metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """Interface dimensions named, shapes inferred, metadata set, checked."""
    _name_dimensions(model, program, names)
    if model.ByteSize() < LARGEST_EMBEDDED:
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        onnx.checker.check_model(model)
    model.producer_name, model.producer_version = "sbp_compile", metadata.get("sbp_compile.version", "")
    del model.metadata_props[:]
    for key in sorted(metadata):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, metadata[key]
    return model


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a model; beyond 2 GB its weights go to a file of the same name plus `.data`."""
    if model.ByteSize() < LARGEST_EMBEDDED:
        path.write_bytes(model.SerializeToString(deterministic=True))
    else:
        onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data")


def _export(program: Program, module: fx.GraphModule, names: list[str], opset: int) -> onnx.ModelProto:
    args = tuple(_example(entry.sizes, entry.dtype, emission_dtype(program)) for entry in program.inputs)
    with quiet_export(), _quiet_onnx():
        exported = torch.export.export(module, args, dynamic_shapes=_dynamic_shapes(program), strict=False)
        converted = torch.onnx.export(
            exported,
            args,
            dynamo=True,
            opset_version=opset,
            input_names=[entry.name for entry in program.inputs],
            output_names=names,
            verbose=False,
        )
    assert converted is not None
    proto: onnx.ModelProto = converted.model_proto
    return proto


def _example(sizes: tuple[int, ...], dtype: torch.dtype, floating: torch.dtype) -> Tensor:
    return torch.zeros(sizes, dtype=floating if dtype.is_floating_point else dtype)


def _dynamic_shapes(program: Program) -> dict[str, Any]:
    """One `batch` for the leading dynamic axis; torch finds out how the other dynamic axes hang together."""
    batch = next((pair for entry in program.inputs for pair in _pairs(entry)[:1] if pair[0] != pair[1]), None)
    dim = Dim("batch", min=1)
    return {
        entry.name: {
            axis: dim if pair == batch else Dim.AUTO for axis, pair in enumerate(_pairs(entry)) if pair[0] != pair[1]
        }
        for entry in program.inputs
    }


def _pairs(entry: Input) -> list[tuple[int, int]]:
    return list(zip(entry.sizes, entry.other_sizes, strict=True))


def _keep_outputs(module: fx.GraphModule, wanted: list[bool]) -> None:
    output = next(iter(reversed(module.graph.nodes)))
    results = tuple(value for value, keep in zip(output.args[0], wanted, strict=True) if keep)  # type: ignore[arg-type]
    output.args = (results,)
    module.graph.eliminate_dead_code()
    module.recompile()


def _cleaned(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Dead nodes removed, nodes sorted, exporter notes (source lines among them) dropped."""
    graph = gs.import_onnx(proto)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    model: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    model.ir_version = proto.ir_version
    for entry in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer, model.graph):
        del entry.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
    del model.graph.value_info[:]
    return model


def _name_dimensions(model: onnx.ModelProto, program: Program, names: Sequence[str]) -> None:
    """`batch` for the leading dynamic axis, `<input>_<axis>` for the others; outputs follow their source."""
    known = {}
    for entry in program.inputs:
        for axis, pair in enumerate(_pairs(entry)):
            if pair[0] != pair[1]:
                known.setdefault((entry.name, axis), "batch" if axis == 0 else f"{entry.name}_{axis}")
    infos = dict(zip([entry.name for entry in program.inputs], program.inputs, strict=True))
    for value in model.graph.input:
        _set_dimensions(value, infos[value.name], program, known)
    results = [node for node in program.outputs if isinstance(node, fx.Node)]
    del names
    for value, node in zip(model.graph.output, [node for node in results if node in program.infos], strict=False):
        _set_dimensions(value, program.infos[node], program, known)


def _set_dimensions(value: Any, info: Any, program: Program, known: dict[tuple[str, int], str]) -> None:
    shape = value.type.tensor_type.shape
    for axis, (size, other) in enumerate(zip(info.sizes, info.other_sizes, strict=True)):
        if axis >= len(shape.dim):
            return
        if size == other:
            shape.dim[axis].dim_value = size
            continue
        source = size_source(program, info, axis)
        shape.dim[axis].dim_param = known[source] if source is not None else f"{value.name}_{axis}"


@contextmanager
def _quiet_onnx() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
