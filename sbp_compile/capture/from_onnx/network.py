"""An ONNX graph as a plain module: every call of the graph is made with torch's operators, in its order.

torch.export follows this module like any other. Weights keep their names, sizes stay sizes (`values.py`), and whatever
depends on the values of a tensor where torch needs a number is refused by name.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from sbp_compile.capture.from_onnx import (  # each fills the table of translations
    control,
    layers,
    normalization,
    pointwise,
    pooling,
    recurrent,
    reduction,
    resize,
    selection,
    shapes,
)
from sbp_compile.capture.from_onnx.file import OnnxFile
from sbp_compile.capture.from_onnx.graph import Graph, GraphReader
from sbp_compile.capture.from_onnx.node import TRANSLATIONS, Node
from sbp_compile.capture.from_onnx.refusals import reason_for
from sbp_compile.capture.from_onnx.sizes import as_known, evaluate, shape_of
from sbp_compile.capture.from_onnx.values import Known, Value, is_small, known, optional_tensor, rank, tensor
from sbp_compile.errors import CompileError, UnsupportedModelError

_FAMILIES = (
    control, layers, normalization, pointwise, pooling, recurrent, reduction, resize, selection, shapes,
)  # fmt: skip
_TRAINED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "BatchNormalization"})
_LARGEST_VALUE = 2**31


class OnnxNetwork(nn.Module):
    """The network of an ONNX file; `onnx_network` makes it, with a `forward` that has the graph's inputs.

    `input_names`, `output_names`: as in the file.
    """

    def __init__(self, file: OnnxFile) -> None:
        super().__init__()
        reader = GraphReader(file.opsets, file.path.parent)
        self._graph = reader.read(file.model.graph, file.initializers)
        self.input_names, self.output_names = self._graph.inputs, self._graph.outputs
        self._names: dict[str, str] = {}
        self._small: dict[str, Any] = {}
        weights = {name for node, _ in _nodes(self._graph) if node.op in _TRAINED for name in node.inputs}
        for graph in _graphs(self._graph):
            for name, value in graph.constants.items():
                self._adopt(name, value, trained=name in weights)

    def forward(self, *args: Tensor) -> Any:
        """Compute the graph's outputs: one tensor, or a tuple of them."""
        values: dict[str, Value] = dict(zip(self.input_names, args, strict=True))
        results = [_as_result(value) for value in self.run(self._graph, values)]
        return results[0] if len(results) == 1 else tuple(results)

    def check(self, args: Sequence[Tensor]) -> None:
        """Make the calls on sizes alone: refuses by name what torch.export would refuse in words of its own.

        Nothing is computed, so values that would fill the memory are refused before they are made.
        """
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        sizes = {name: value.to("meta") for name, value in state.items()}
        with torch.no_grad(), torch.device("meta"):
            torch.func.functional_call(self, sizes, tuple(value.to("meta") for value in args))

    def calls(self, args: Sequence[Tensor], watch: Callable[[str, Value], None]) -> None:
        """Make the calls of the graph, and show each value to `watch`."""
        self.run(self._graph, dict(zip(self.input_names, args, strict=True)), watch)

    def run(
        self,
        graph: Graph,
        values: dict[str, Value],
        watch: Callable[[str, Value], None] | None = None,
    ) -> list[Value]:
        """Make the calls of a graph; `values`: of its inputs and of what it captures, and of all others afterwards.

        Raises `UnsupportedModelError` for an operator without a translation, and for what a translation refuses.
        """
        values.update((name, self._constant(name)) for name in graph.constants)
        for node, proto in graph.nodes:
            results = self._call(node, proto, values)
            for name, result in zip(node.outputs, results, strict=False):
                if name:
                    values[name] = result
                    if watch is not None:
                        watch(name, result)
        return [values[name] for name in graph.outputs]

    def _call(self, node: Node, proto: onnx.NodeProto, values: dict[str, Value]) -> Sequence[Value]:
        operands = [values[name] if name else None for name in node.inputs]
        try:
            if not any(isinstance(value, Graph) for value in node.attributes.values()):
                found = _known_results(node, proto, operands)
                if found is not None:
                    return found
            results = self._translated(node, operands, values)
        except CompileError:
            raise
        except Exception as error:  # of torch's operators, on operands that do not fit
            raise node.refusal(f"torch cannot make this call ({_first_line(error)})") from error
        results = results if isinstance(results, tuple) else (results,)
        for position, result in enumerate(results):
            _refuse_giant(node, result)
            assert result is not None or not node.wants(position)
        if any(node.wants(position) for position in range(len(results), len(node.outputs))):
            raise node.refusal(f"its output {len(results)} is not supported")
        return results

    def _translated(self, node: Node, operands: list[Value], values: dict[str, Value]) -> Any:
        if node.domain or node.op not in TRANSLATIONS:
            raise node.refusal(reason_for(node))
        if node.op in control.WITH_GRAPHS:
            return TRANSLATIONS[node.op](node, *operands, run=self.run, outside=values)
        return TRANSLATIONS[node.op](node, *operands)

    def _constant(self, name: str) -> Value:
        home, _, leaf = self._names[name].rpartition(".")
        held: Tensor = getattr(self.get_submodule(home), leaf)
        small = self._small.get(name)
        return held if small is None else as_known(small, held.dtype, held)

    def _adopt(self, name: str, value: Tensor, *, trained: bool) -> None:
        """Register a constant under its own name, made one that Python has."""
        home, leaf = self._home(name)
        if trained and value.is_floating_point():
            home.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        else:
            home.register_buffer(leaf, value)
        if is_small(value):
            self._small[name] = value.numpy()

    def _home(self, name: str) -> tuple[nn.Module, str]:
        parts = [_identifier(part) for part in re.split(r"[./:]+", name) if part] or ["constant"]
        home: nn.Module = self
        taken: list[str] = []
        for part in parts[:-1]:
            part = _free(part, lambda text, home=home: not hasattr(home, text) or text in home._modules)  # type: ignore[misc]
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home.get_submodule(part)
            taken.append(part)
        leaf = _free(parts[-1], lambda text: not hasattr(home, text))
        self._names[name] = ".".join([*taken, leaf])
        return home, leaf


def onnx_network(file: OnnxFile) -> OnnxNetwork:
    """Return a plain module that makes the calls of an ONNX graph.

    Raises `ModelFileError` for a graph that is none (cycles, names that are used twice), `UnsupportedModelError`, when
    it runs, for operators that have no translation and for structure that depends on data.
    """

    def forward(self: OnnxNetwork, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        return OnnxNetwork.forward(*bound.args)

    made: OnnxNetwork = type("OnnxGraph", (OnnxNetwork,), {"forward": forward})(file)
    names = argument_names(made.input_names)
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    parameters += [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    signature = inspect.Signature(parameters)
    forward.__signature__ = signature  # type: ignore[attr-defined]  # inspect reads it, mypy does not know
    return made.eval()


def argument_names(names: Iterable[str]) -> list[str]:
    """Return names of Python arguments for the names of a graph's inputs, each once."""
    found: list[str] = []
    for name in names:
        name = re.sub(r"^val_(?=\d+$)", "input_val_", name)  # torch's ONNX exporter gives such names itself
        found.append(_free(_identifier(name), lambda text: text not in found))
    return found


def _known_results(node: Node, proto: onnx.NodeProto, operands: list[Value]) -> Sequence[Value] | None:
    """Return the results of a call whose operands are known at capture, or that only asks for sizes."""
    if node.op in {"Shape", "Size"} and not node.domain:
        sizes = operands[0].entries.shape if isinstance(operands[0], Known) else tensor(operands[0]).shape
        return [shape_of(node, sizes)] if node.op == "Shape" else [known(_product(sizes))]
    present = [operand for operand in operands if operand is not None]
    if not all(isinstance(operand, Known) for operand in present):
        return None
    return evaluate(node, proto, operands)  # type: ignore[arg-type]


def _product(sizes: Iterable[Any]) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return product


def _as_result(value: Value) -> Any:
    if isinstance(value, list):
        raise UnsupportedModelError(
            "an output of the graph is a sequence of tensors; only tensors can be returned"
        )
    return optional_tensor(value)


def _refuse_giant(node: Node, result: Value) -> None:
    if isinstance(result, Tensor) and rank(result):
        size = result.element_size()
        for extent in result.shape:
            size *= extent if isinstance(extent, int) else 1
        if size > _LARGEST_VALUE:
            raise node.refusal(
                f"its result of shape {list(result.shape)} takes {size / 2**30:.0f} GiB; give a smaller example "
                "with --input"
            )


def _graphs(graph: Graph) -> Iterator[Graph]:
    yield graph
    for node, _ in graph.nodes:
        for value in node.attributes.values():
            if isinstance(value, Graph):
                yield from _graphs(value)


def _nodes(graph: Graph) -> Iterator[tuple[Node, Any]]:
    for part in _graphs(graph):
        yield from part.nodes


def _identifier(text: str) -> str:
    name = re.sub(r"\W", "_", text, flags=re.ASCII)
    return f"_{name}" if not name or name[0].isdigit() or keyword.iskeyword(name) else name


def _free(text: str, is_free: Callable[[str], bool]) -> str:
    """Return the text, lengthened until it is free."""
    while not is_free(text):
        text += "_"
    return text


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
