"""A TorchScript graph as a plain module: every call of the inlined graph is made again, in its order.

torch.export refuses ScriptModules but follows this module like any other. Parameters and buffers keep their names.
Branches and loops are taken as they fall for the example inputs' structure; one that depends on the values of a
tensor is refused by name. `ScriptModule.inlined_graph` is documented, the methods of its nodes are not:
tests/capture/test_torchscript.py fails when a version of torch changes them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sbp_compile.capture.torchscript_calls import TO_NUMBERS, as_tensor, call, on_data, place, takes_scalar
from sbp_compile.capture.torchscript_values import is_number
from sbp_compile.errors import UnsupportedModelError

_MOST_ITERATIONS = 10_000
_IGNORED = frozenset({"prim::Enter", "prim::Exit", "profiler::_record_function_exit"})


class GraphNetwork(nn.Module):
    """The network of a ScriptModule; `graph_network` makes it, with a `forward` that has the script's parameters."""

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self._graph = script.inlined_graph
        self._attributes: dict[str, Any] = {}
        self._scalars: dict[str, Any] = {}
        self._adopt(script)

    def forward(self, *args: Any) -> Any:
        """Compute the graph's result."""
        run = _Run(self, self._scalars)
        first, *inputs = self._graph.inputs()
        run.values.update(zip((value.debugName() for value in inputs), args, strict=True))
        run.objects[first.debugName()] = ()
        run.block(self._graph)
        [result] = self._graph.outputs()
        return run.result(result)

    def attribute(self, path: tuple[str, ...]) -> Any:
        """Return an attribute of the script by its path: a tensor under its own name here, anything else as it is."""
        name = ".".join(path)
        if name in self._attributes:
            return self._attributes[name]
        value: Any = self
        for part in path:
            value = getattr(value, part)
        return value

    def constant(self, name: str) -> Tensor:
        """Return the tensor of a `prim::Constant` node by the name of its value."""
        return self.get_buffer(_constant_name(name))

    def _adopt(self, script: torch.jit.ScriptModule) -> None:
        """Take over parameters, buffers, tensors that are plain attributes, and constants of the graph."""
        shared: dict[int, nn.Parameter] = {}
        for name, parameter in script.named_parameters(remove_duplicate=False):
            home, leaf = self._home(name)
            made = shared.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
            home.register_parameter(leaf, made)
        for name, buffer in script.named_buffers(remove_duplicate=False):
            home, leaf = self._home(name)
            home.register_buffer(leaf, buffer)
        paths: dict[str, tuple[str, ...]] = {next(self._graph.inputs()).debugName(): ()}
        for node in _nodes(self._graph):
            if node.kind() == "prim::GetAttr":
                self._adopt_attribute(script, node, paths)
            elif node.kind() == "prim::Constant" and _constant_kind(node) == "t":
                self._adopt_constant(node)

    def _adopt_attribute(self, script: torch.jit.ScriptModule, node: Any, paths: dict[str, Any]) -> None:
        path = (*paths[node.input().debugName()], node.s("name"))
        paths[node.output().debugName()] = path
        value: Any = script
        for part in path:
            value = getattr(value, part)
        if isinstance(value, torch.jit.ScriptModule):
            return
        if _is_class(node.output()):
            raise UnsupportedModelError(
                f"TorchScript attribute {'.'.join(path)!r} is an object ({value}), which cannot be captured"
            )
        if not isinstance(value, Tensor):
            self._attributes[".".join(path)] = value
            return
        home, leaf = self._home(".".join(path))
        if not hasattr(home, leaf):
            home.register_buffer(leaf, value.detach())

    def _adopt_constant(self, node: Any) -> None:
        name, value = node.output().debugName(), node.t("value").detach()
        self.register_buffer(_constant_name(name), value)
        if value.ndim == 0:
            self._scalars[name] = value.item()

    def _home(self, name: str) -> tuple[nn.Module, str]:
        """Return the module that holds a tensor of that dotted name, made where it is missing, and the last part."""
        *parts, leaf = name.split(".")
        home: nn.Module = self
        for part in parts:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home.get_submodule(part)
        return home, leaf


def graph_network(script: torch.jit.ScriptModule) -> GraphNetwork:
    """Return a plain module that makes the calls of a ScriptModule's forward, in eval mode.

    Raises `UnsupportedModelError` for objects; for methods that were not inlined, attributes that change, branches on
    data and unknown operators when it runs and meets them.
    """

    def forward(self: GraphNetwork, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        return GraphNetwork.forward(*bound.args)

    signature = _signature(script)
    forward.__signature__ = signature  # type: ignore[attr-defined]  # inspect reads it, mypy does not know
    name = str(getattr(script, "original_name", "") or "TorchScript")
    made: GraphNetwork = type(name, (GraphNetwork,), {"forward": forward})(script)
    return made.eval()


class _Run:
    """One run of a graph: the values so far by their names in it."""

    def __init__(self, network: GraphNetwork, scalars: Mapping[str, Any]) -> None:
        self._network = network
        self._scalars = scalars
        self.values: dict[str, Any] = {}
        self.objects: dict[str, tuple[str, ...]] = {}

    def block(self, block: Any) -> None:
        """Make the calls of a graph or a block of it."""
        for node in block.nodes():
            self._node(node)

    def result(self, value: Any) -> Any:
        """Return what the graph returns; sizes that a trace made tensors of become tensors."""
        return _of_type(self.values[value.debugName()], value.type())

    def _node(self, node: Any) -> None:
        kind = node.kind()
        if kind in _IGNORED:
            return
        if kind in _REFUSED:
            raise UnsupportedModelError(f"TorchScript operation {kind!r}: {_REFUSED[kind]}{place(node)}")
        special = _SPECIAL.get(kind)
        if special is not None:
            special(self, node)
            return
        operands = self._operands(node)
        if takes_scalar(node, operands) and isinstance(operands[0], Tensor):
            name = list(node.inputs())[1].debugName()
            if name in self._scalars:
                operands[1] = self._scalars[name]
                self._store(node, call(node, operands, with_scalar=True))
                return
        self._store(node, call(node, operands))

    def _operands(self, node: Any) -> list[Any]:
        """Return a node's operands; constants of one entry become numbers beside sizes that a trace made tensors of."""
        names = [value.debugName() for value in node.inputs()]
        operands = [self.values[name] for name in names]
        sizes = [
            _is_tensor_type(value) and is_number(operand)
            for value, operand in zip(node.inputs(), operands, strict=True)
        ]
        if any(sizes) or node.kind().partition("::")[2] in TO_NUMBERS:
            return [self._scalars.get(name, operand) for name, operand in zip(names, operands, strict=True)]
        return operands

    def _store(self, node: Any, found: Any) -> None:
        outputs = [value.debugName() for value in node.outputs()]
        if len(outputs) == 1:
            self.values[outputs[0]] = found
        elif outputs:
            self.values.update(zip(outputs, found, strict=True))

    def _constant(self, node: Any) -> None:
        name, kind = node.output().debugName(), _constant_kind(node)
        self.values[name] = self._network.constant(name) if kind == "t" else _constant(node, kind)

    def _attribute(self, node: Any) -> None:
        path = (*self.objects[node.input().debugName()], node.s("name"))
        if _is_class(node.output()):
            self.objects[node.output().debugName()] = path
        else:
            self.values[node.output().debugName()] = self._network.attribute(path)

    def _tuple(self, node: Any) -> None:
        self._store(node, tuple(self.values[value.debugName()] for value in node.inputs()))

    def _list(self, node: Any) -> None:
        self._store(node, [self.values[value.debugName()] for value in node.inputs()])

    def _dict(self, node: Any) -> None:
        keys, items = _halves([self.values[value.debugName()] for value in node.inputs()])
        self._store(node, dict(zip(keys, items, strict=True)))

    def _unpack(self, node: Any) -> None:
        found = self.values[node.input().debugName()]
        self.values.update(zip((value.debugName() for value in node.outputs()), found, strict=True))

    def _branch(self, node: Any) -> None:
        taken = 0 if self._decide(node, node.input()) else 1
        block = list(node.blocks())[taken]
        self.block(block)
        self._copy(block.outputs(), node.outputs())

    def _loop(self, node: Any) -> None:
        count, go_on, *carried = node.inputs()
        [block] = node.blocks()
        index, *inner = block.inputs()
        self._copy(carried, inner)
        most, done = self.values[count.debugName()], 0
        while done < most and self._decide(node, go_on):
            if done >= _MOST_ITERATIONS:
                raise UnsupportedModelError(
                    f"a TorchScript loop runs over {_MOST_ITERATIONS} times{place(node)}"
                )
            self.values[index.debugName()] = done
            self.block(block)
            go_on, *results = block.outputs()
            self._copy(results, inner)
            done += 1
        self._copy(inner, node.outputs())

    def _decide(self, node: Any, condition: Any) -> bool:
        value = self.values[condition.debugName()]
        if isinstance(value, Tensor):
            raise on_data(node)
        return bool(value)

    def _copy(self, sources: Any, targets: Any) -> None:
        found = [self.values[value.debugName()] for value in sources]
        self.values.update(zip((value.debugName() for value in targets), found, strict=True))

    def _first(self, node: Any) -> None:
        self._store(node, self.values[next(iter(node.inputs())).debugName()])

    def _fail(self, node: Any) -> None:
        text = self.values[next(iter(node.inputs())).debugName()]
        raise UnsupportedModelError(
            f"the TorchScript raises an exception on the example inputs: {text}{place(node)}"
        )

    def _unset(self, node: Any) -> None:
        self._store(node, None)


_SPECIAL: Mapping[str, Callable[[_Run, Any], None]] = {
    "prim::Constant": _Run._constant,
    "prim::GetAttr": _Run._attribute,
    "prim::TupleConstruct": _Run._tuple,
    "prim::ListConstruct": _Run._list,
    "prim::DictConstruct": _Run._dict,
    "prim::TupleUnpack": _Run._unpack,
    "prim::ListUnpack": _Run._unpack,
    "prim::If": _Run._branch,
    "prim::Loop": _Run._loop,
    "prim::RaiseException": _Run._fail,
    "prim::unchecked_cast": _Run._first,
    "prim::unchecked_unwrap_optional": _Run._first,
    "aten::_unwrap_optional": _Run._first,
    "prim::data": _Run._first,
    "prim::Uninitialized": _Run._unset,
}


def _of_type(found: Any, kind: Any) -> Any:
    """Return a value in which numbers have become tensors where its type says so."""
    if is_number(found):
        return as_tensor(found) if kind.kind() == "TensorType" else found
    if kind.kind() == "OptionalType":
        return _of_type(found, kind.getElementType())
    if kind.kind() == "ListType":
        return [_of_type(item, kind.getElementType()) for item in found]
    if kind.kind() == "DictType":
        return {name: _of_type(item, kind.getValueType()) for name, item in found.items()}
    if kind.kind() == "TupleType":
        return tuple(_of_type(item, part) for item, part in zip(found, kind.elements(), strict=True))
    return found


def _is_tensor_type(value: Any) -> bool:
    return bool(value.type().kind() == "TensorType")


def _is_class(value: Any) -> bool:
    return bool(value.type().kind() == "ClassType")


def _halves(items: list[Any]) -> tuple[list[Any], list[Any]]:
    return items[::2], items[1::2]


def _constant_name(name: str) -> str:
    return f"constant_{re.sub(r'[^0-9A-Za-z_]', '_', name)}"


def _constant_kind(node: Any) -> str | None:
    return str(node.kindOf("value")) if node.hasAttribute("value") else None


def _constant(node: Any, kind: str | None) -> Any:
    if kind is None:
        return None
    value = node.output().toIValue() if kind == "ival" else getattr(node, kind)("value")
    if kind == "i" and node.output().type().kind() == "BoolType":
        return bool(value)
    return torch.device(value) if node.output().type().kind() == "DeviceObjType" else value


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


_REFUSED = {
    "prim::SetAttr": "the network changes its own state",
    "prim::CallMethod": "a method is called that could not be inlined",
    "prim::CallFunction": "a function is called that could not be inlined",
    "prim::CreateObject": "an object of a script class is made",
    "prim::fork": "work runs in parallel tasks",
    "prim::PythonOp": "Python code is called",
}


def _signature(script: torch.jit.ScriptModule) -> inspect.Signature:
    forward: Any = script.forward
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for argument in forward.schema.arguments[1:]:
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        kind = (
            inspect.Parameter.KEYWORD_ONLY if argument.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        )
        parameters.append(inspect.Parameter(argument.name, kind, default=default))
    return inspect.Signature(parameters)
