"""Builds a new graph from an old one, node by node, slicing every value to its kept entries.

Without an analysis nothing is sliced, and the Rewriter is a plain graph copier with substitutions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from passes.ir.analysis import Analysis, is_constant, size_source
from passes.ir.constants import Constants, Held, hold
from passes.ir.errors import PassError
from passes.ir.program import Op, Origin, Program

aten = torch.ops.aten


class Rewriter:
    """The new graph under construction; `env` maps old nodes to new ones."""

    def __init__(self, program: Program, analysis: Analysis | None = None) -> None:
        self.program = program
        self.analysis = analysis
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.inputs: dict[str, fx.Node] = {}
        self.constants = Constants()
        self.dtypes: dict[str, torch.dtype] = {}

    def value(self, node: fx.Node) -> fx.Node:
        """The new node that carries an old node's kept entries; constants are emitted on first use."""
        if node not in self.env:
            held = self.program.held(node)
            if held is not None:
                self.env[node] = self._sliced_constant(node, held)
            elif self.analysis is not None and is_constant(self.program, node, self.analysis.facts):
                self.env[node] = self._materialize(node)
            else:
                raise PassError(f"{node.name}: its value is used but was not emitted; {self.context(node)}")
        return self.env[node]

    def map(self, argument: Any) -> Any:
        """An argument structure with every old node replaced by its new one."""
        return fx.node.map_arg(argument, self.value)

    def copy(self, node: fx.Node) -> fx.Node:
        """The same call on the new operands."""
        return self.call(node.target, self.map(node.args), self.map(dict(node.kwargs)), like=node)

    def piece(self, op: Op, args: Callable[[], Iterable[Any]] | None = None) -> fx.Node:
        """One result of a call with several, which is made once for all of them: with `args`, or as it is."""
        source = op.source
        if source not in self.env:
            if args is None:
                self.env[source] = self.copy(source)
            else:
                self.env[source] = self.call(op.target, args(), like=source)
        return self.call(operator.getitem, (self.env[source], op.position), like=op.node)

    def call(
        self,
        target: Any,
        args: Iterable[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        like: fx.Node,
        step: str = "",
    ) -> fx.Node:
        """A new call in the place of an old one, with its name and provenance.

        With `step` the call is an intermediate result: it carries no original value and is named after the step.
        """
        name = f"{like.name.removesuffix(f'_{step}')}_{step}" if step else like.name
        node = self.graph.create_node("call_function", target, tuple(args), kwargs or {}, name=name)
        node.meta = self._meta(like)
        if step:
            node.meta.pop("origin", None)
        return node

    def constant(self, value: Tensor, name: str, dtype: torch.dtype) -> fx.Node:
        """A new constant of that emission dtype; an equal one under the same base name is shared."""
        return self.shared(hold(value.contiguous(), dtype), name, dtype)

    def shared(self, held: Held, name: str, dtype: torch.dtype) -> fx.Node:
        """The same for a constant that is held already, which is not copied."""
        if not held.tensor.is_contiguous():
            return self.constant(held.read(), name, dtype)
        for candidate in _names(name):
            if candidate not in self.constants:
                self.constants.put(candidate, held)
                self.dtypes[candidate] = dtype
            elif self.dtypes[candidate] != dtype or not self.constants.held(candidate).is_same(held):
                continue
            return self.graph.create_node("get_attr", candidate, (), {})
        raise AssertionError

    def dtype_of(self, node: fx.Node) -> torch.dtype:
        """The emission dtype of an old constant."""
        return self.program.dtypes[str(node.target)]

    def index(self, node: fx.Node, axis: int) -> Tensor | None:
        """Kept indices of an old value along an axis, int64; None for all."""
        return None if self.analysis is None else self.analysis.keep.index(node, axis)

    def size(self, node: fx.Node, axis: int) -> int:
        """The new size of an old value along a static axis."""
        if self.analysis is None:
            return self.program.infos[node].sizes[axis]
        return self.analysis.keep.count(node, axis)

    def is_emitted(self, node: fx.Node) -> bool:
        """Whether anything of an old value is kept."""
        return self.analysis is None or not self.analysis.keep.is_empty(node)

    def slice(self, value: Tensor, node: fx.Node) -> Tensor:
        """A tensor laid out like an old value, stored or full, cut to the kept entries."""
        for axis in range(value.ndim):
            index = self.index(node, axis)
            if index is not None and value.shape[axis] > 1:
                value = value.index_select(axis, index)
        return value

    def placeholder(self, node: fx.Node) -> None:
        self.env[node] = self.graph.create_node("placeholder", node.target, (), {}, name=node.name)
        self.env[node].meta = self._meta(node)
        self.inputs[str(node.target)] = self.env[node]

    def output(self, results: Iterable[Any] | None = None) -> None:
        """Close the graph (with the old outputs by default)."""
        outputs = self.program.outputs if results is None else tuple(results)
        self.graph.create_node("output", "output", (self.map(outputs),), {}, name="output")

    def finish(self) -> Program:
        """The new Program, without dead nodes and unused constants."""
        remove_unused(self.graph)
        give_each_use_its_own_constant(self.graph)
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        constants = self.constants.only(used)
        dtypes = {name: self.dtypes[name] for name in constants}
        return self.program.replace(graph=self.graph, constants=constants, dtypes=dtypes)

    def size_node(self, source: tuple[str, int], like: fx.Node) -> fx.Node:
        """The run-time size of an input's axis."""
        return self.call(aten.sym_size.int, (self.inputs[source[0]], source[1]), like=like, step="size")

    def context(self, node: fx.Node) -> str:
        """The lines of the old graph around a node, for error messages."""
        nodes = self.program.nodes
        position = nodes.index(node)
        return " | ".join(
            entry.format_node() or entry.name for entry in nodes[max(0, position - 1) : position + 2]
        )

    def _sliced_constant(self, node: fx.Node, held: Held) -> fx.Node:
        """The constant cut to its kept entries; one that stays whole is shared with the old Program."""
        name, dtype = str(node.target), self.dtype_of(node)
        axes = [axis for axis in range(len(held.shape)) if held.shape[axis] > 1]
        if all(self.index(node, axis) is None for axis in axes):
            return self.shared(held, name, dtype)
        return self.constant(self.slice(held.read(), node), name, dtype)

    def _materialize(self, node: fx.Node) -> fx.Node:
        """A wholly known value as a constant, expanded to its run-time shape."""
        assert self.analysis is not None
        info = self.program.infos[node]
        stored = self.slice(self.analysis.facts[node.name].value, node)
        dtype = node.meta.get("dtype", info.dtype)
        constant = self.constant(stored, f"{node.name}_constant", dtype)
        sizes: list[Any] = []
        for axis in range(info.rank):
            source = None if info.is_static(axis) else size_source(self.program, info, axis)
            sizes.append(self.size(node, axis) if source is None else self.size_node(source, node))
        if list(stored.shape) == sizes:
            return constant
        return self.call(aten.expand.default, (constant, sizes), like=node)

    def _meta(self, old: fx.Node) -> dict[str, Any]:
        meta = dict(old.meta)
        origin = meta.get("origin")
        if origin is not None and self.analysis is not None and old in self.program.infos:
            meta["origin"] = Origin(origin.name, self._composed(old, origin))
        return meta

    def _composed(self, old: fx.Node, origin: Origin) -> tuple[Tensor | None, ...]:
        rank = self.program.infos[old].rank
        before = origin.kept or (None,) * rank
        after = [self.index(old, axis) for axis in range(rank)]
        return tuple(
            then if first is None else (first if then is None else first[then])
            for first, then in zip(before, after, strict=True)
        )


def with_replaced(program: Program, made: Callable[[Rewriter, fx.Node], fx.Node | None]) -> Program:
    """The Program with some calls replaced: by what `made` gives, or copied where that is None."""
    rewriter = Rewriter(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            rewriter.placeholder(node)
        elif node.op == "call_function":
            rewriter.env[node] = made(rewriter, node) or rewriter.copy(node)
    rewriter.output()
    return rewriter.finish()


def remove_unused(graph: fx.Graph) -> None:
    """Erase every call and constant without a user, in place; all of the dialect's calls are pure."""
    for node in reversed(list(graph.nodes)):
        if node.op in {"call_function", "get_attr"} and not node.users:
            graph.erase_node(node)


def give_each_use_its_own_constant(graph: fx.Graph) -> None:
    """Split `get_attr` nodes with several users, in place: facts and keep sets belong to a use, not to a tensor."""
    for node in list(graph.nodes):
        if node.op == "get_attr":
            for user in list(node.users)[1:]:
                with graph.inserting_before(user):
                    twin = graph.create_node("get_attr", node.target, (), {})
                user.replace_input_with(node, twin)


def _names(base: str) -> Iterable[str]:
    yield base
    number = 1
    while True:
        yield f"{base}_{number}"
        number += 1
