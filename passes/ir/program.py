"""A Program: a functional ATen graph, its constants in float64, and the sizes of every value.

The graph holds `placeholder` nodes (the network's tensor inputs), `get_attr` nodes (constants, one node for each use),
`call_function` nodes and one `output` node whose argument is a flat tuple. Passes never change a Program: they build a
new graph. Floating-point constants are float64 whatever the model's dtype (complex ones complex128); `dtypes` says what
each is rounded to at emission. Large ones may be held narrower (passes/ir/constants.py), and are widened when they are
read.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from passes.ir import schema
from passes.ir.constants import Constants, Held
from passes.ir.errors import LintError, PassError

if TYPE_CHECKING:
    from passes.ir.analysis import Analysis


class Sized:
    """Something with three example shapes; see Input for what they are."""

    sizes: tuple[int, ...]
    other_sizes: tuple[int, ...]
    far_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.far_sizes:
            object.__setattr__(self, "far_sizes", self.other_sizes)

    def key(self, axis: int) -> tuple[int, ...]:
        """An axis' size under each example shape: equal keys, equal sizes."""
        return self.sizes[axis], self.other_sizes[axis], self.far_sizes[axis]

    def is_static(self, axis: int) -> bool:
        return len(set(self.key(axis))) == 1


@dataclass(frozen=True)
class Input(Sized):
    """One tensor input of the network.

    `sizes`, `other_sizes` and `far_sizes` are three admissible shapes that agree along exactly the static axes. The
    first two are of everyday size; the third lies far off, so that sizes like n // 70 do not agree by chance
    (default: the second again). `axis_names`: (axis, name) of dynamic axes that the user has named.
    `label`: the user's name for it, where that is another than the graph's (any text; empty: the same).
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    other_sizes: tuple[int, ...]
    far_sizes: tuple[int, ...] = ()
    axis_names: tuple[tuple[int, str], ...] = ()
    label: str = ""

    @property
    def shown(self) -> str:
        """What the user calls the input."""
        return self.label or self.name

    @property
    def working_dtype(self) -> torch.dtype:
        """The dtype the passes compute in: float64 for every floating-point input, complex128 for complex ones."""
        if self.dtype.is_complex:
            return torch.complex128
        return torch.float64 if self.dtype.is_floating_point else self.dtype


@dataclass(frozen=True)
class TensorInfo(Sized):
    """Sizes of a value under the inputs' example shapes (see Input), and its dtype."""

    sizes: tuple[int, ...]
    other_sizes: tuple[int, ...]
    dtype: torch.dtype
    far_sizes: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def is_empty(self) -> bool:
        """Whether it has no entries, whatever the input."""
        return any(key == (0, 0, 0) for key in zip(self.sizes, self.other_sizes, self.far_sizes, strict=True))

    @cached_property
    def static_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(self.rank) if self.is_static(axis))

    @property
    def all_static(self) -> bool:
        return self.sizes == self.other_sizes == self.far_sizes

    def has_shape_of(self, other: TensorInfo) -> bool:
        """Whether both have the same shape at run time."""
        return (self.sizes, self.other_sizes, self.far_sizes) == (
            other.sizes,
            other.other_sizes,
            other.far_sizes,
        )


@dataclass(frozen=True)
class Origin:
    """Which original value a node still carries: its name and, per axis, the kept indices (None: all)."""

    name: str
    kept: tuple[Tensor | None, ...] = ()

    def indices(self, axis: int, info: TensorInfo) -> Tensor:
        """The original indices along a static axis of the node, which has these sizes."""
        kept = self.kept[axis] if self.kept else None
        return torch.arange(info.sizes[axis]) if kept is None else kept


Pins = Mapping[str, Mapping[int, Tensor]]
"""By the original value's name and axis: original indices, int64."""


@dataclass(frozen=True, eq=False)
class Program:
    """A graph, its constants and its interface; see the module's docstring for the invariants."""

    graph: fx.Graph
    constants: Constants
    """Any mapping will do when a Program is made."""
    dtypes: Mapping[str, torch.dtype]
    inputs: tuple[Input, ...]
    analysis: Analysis | None = field(default=None)
    output_dtypes: tuple[torch.dtype | None, ...] = ()
    """What the original gives for each flat output: its dtype, None for what is no tensor; empty if not known."""
    pinned: Pins = field(default_factory=dict)
    """Entries that stay although nothing needs them; follows the original values through all passes."""

    def __post_init__(self) -> None:
        given: Mapping[str, Tensor] = self.constants
        if not isinstance(given, Constants):
            object.__setattr__(self, "constants", Constants(given, self.dtypes))

    def replace(self, **changes: Any) -> Program:
        """A Program with some fields changed; the analysis is dropped unless it is given."""
        return dataclasses.replace(self, **({"analysis": None} | changes))

    def analysed(self) -> Analysis:
        """The attached analysis. Raises PassError where there is none."""
        if self.analysis is None:
            raise PassError("the program carries no analysis; run analyze_channels first")
        return self.analysis

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    @property
    def output_node(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The flat outputs: nodes, or plain python constants."""
        return tuple(self.output_node.args[0])  # type: ignore[arg-type]

    def calls(self) -> Iterator[fx.Node]:
        return (node for node in self.graph.nodes if node.op == "call_function")

    def pinned_entries(self, node: fx.Node) -> dict[int, Tensor]:
        """Masks of the entries of a value that are pinned, by static axis: bool, (size,)."""
        origin: Origin | None = node.meta.get("origin")
        if origin is None or origin.name not in self.pinned or node not in self.infos:
            return {}
        info, found = self.infos[node], {}
        for axis, index in self.pinned[origin.name].items():
            if axis < info.rank and info.is_static(axis):
                found[axis] = torch.isin(origin.indices(axis, info), index)
        return found

    def constant(self, node: object) -> Tensor | None:
        """The tensor behind a `get_attr` node; None for anything else."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.constants[str(node.target)]
        return None

    def held(self, node: object) -> Held | None:
        """The same as it is held, for whoever does not look at its entries."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.constants.held(str(node.target))
        return None

    def by_origin(self) -> dict[str, fx.Node]:
        """The tensor values by the name of the original value that they carry."""
        return {node.meta["origin"].name: node for node in self.infos if "origin" in node.meta}

    @cached_property
    def infos(self) -> Mapping[fx.Node, TensorInfo]:
        """Sizes and dtype of every tensor value whose sizes can be derived without data."""
        first, second, third = self._meta_runs
        found = {}
        for node, value in first.items():
            other = second.get(node)
            if isinstance(value, Tensor) and isinstance(other, Tensor) and value.ndim == other.ndim:
                far = third.get(node)
                far_sizes = tuple(far.shape) if isinstance(far, Tensor) and far.ndim == value.ndim else ()
                found[node] = TensorInfo(tuple(value.shape), tuple(other.shape), value.dtype, far_sizes)
        return found

    @cached_property
    def unmeasured(self) -> frozenset[fx.Node]:
        """Calls whose sizes depend on data (`nonzero`), and whatever is computed from them."""
        return frozenset(
            node for node in self.calls() if any(node not in values for values in self._meta_runs[:2])
        )

    @cached_property
    def _meta_runs(self) -> tuple[dict[fx.Node, Any], ...]:
        shapes = (
            [entry.sizes for entry in self.inputs],
            [entry.other_sizes for entry in self.inputs],
            [entry.far_sizes for entry in self.inputs],
        )
        return tuple(run_on_meta(self, sizes) for sizes in shapes)

    def op(self, node: fx.Node) -> Op:
        """The rule's view of a call, made once for each Program."""
        if node not in self._ops:
            self._ops[node] = Op(self, node)
        return self._ops[node]

    @cached_property
    def _ops(self) -> dict[fx.Node, Op]:
        return {}

    @cached_property
    def outline(self) -> Program:
        """The same graph, sizes and keep sets without the constants' entries: to look back on, at little memory."""
        analysis = (
            None if self.analysis is None else self.analysis.outline({node.name for node in self.calls()})
        )
        found = self.replace(constants=self.constants.outline(), analysis=analysis)
        vars(found)["infos"] = self.infos
        return found

    def lint(self) -> None:
        """Raise LintError where the graph or the interface broke an invariant."""
        self.graph.lint()
        placeholders = [node.target for node in self.graph.nodes if node.op == "placeholder"]
        wanted = [entry.name for entry in self.inputs]
        if placeholders != wanted:
            raise LintError(f"placeholders: have {placeholders}, want {wanted}")
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target not in self.constants:
                raise LintError(f"{node.name}: constant {node.target!r} does not exist")
        for name in self.constants:
            dtype = self.constants.held(name).dtype
            if dtype.is_floating_point and dtype != torch.float64:
                raise LintError(f"constant {name!r}: have {dtype}, want torch.float64")
            if dtype.is_complex and dtype != torch.complex128:
                raise LintError(f"constant {name!r}: have {dtype}, want torch.complex128")


_FAILED = object()


def run_on_meta(program: Program, sizes: Iterable[tuple[int, ...]]) -> dict[fx.Node, Any]:
    """Run a Program on meta tensors of the given input sizes; values that need real data are left out."""
    env: dict[fx.Node, Any] = {}
    feeds = {
        entry.name: torch.empty(size, dtype=entry.working_dtype, device="meta")
        for entry, size in zip(program.inputs, sizes, strict=True)
    }
    metas = {name: program.constants.held(name).on_meta() for name in program.constants}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = feeds[str(node.target)]
        elif node.op == "get_attr":
            env[node] = metas[str(node.target)]
        elif node.op == "call_function":
            env[node] = _call_on_meta(node, env)
    return {node: value for node, value in env.items() if value is not _FAILED}


def _call_on_meta(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    if any(env[operand] is _FAILED for operand in node.all_input_nodes):
        return _FAILED
    if node.target is operator.getitem:  # cheaper than its key, which all pieces would be part of
        return _uncached_call_on_meta(node, env)
    try:
        key = node.target, _signature(node.args, env), _signature(node.kwargs, env)
        if key not in _META_RESULTS:
            if len(_META_RESULTS) >= LARGEST_MEMORY:
                _META_RESULTS.clear()
            _META_RESULTS[key] = _uncached_call_on_meta(node, env)
    except TypeError:  # an argument that cannot be a key, such as a slice or a subgraph
        return _uncached_call_on_meta(node, env)
    return _META_RESULTS[key]


def _uncached_call_on_meta(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    device = {} if node.kwargs.get("device") is None else {"device": torch.device("meta")}
    try:
        return schema.call(node, env.__getitem__, **device)
    except Exception:  # whatever the operators of the user's model raise without data
        return _FAILED


LARGEST_MEMORY = 1 << 16
# Sizes are derived anew for every Program, but most calls of a network were seen before, in it or in the one before it.
_META_RESULTS: dict[Any, Any] = {}


def _signature(value: Any, env: Mapping[fx.Node, Any]) -> Any:
    """What a result on meta tensors depends on, as a key: layouts of tensors, and all else with its type."""
    if isinstance(value, fx.Node):
        return _signature(env[value], env)
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, Mapping):
        return tuple((name, _signature(item, env)) for name, item in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_signature(item, env) for item in value)
    return type(value), value


class Op:
    """A call seen by a rule: arguments by name, tensor operands in order, sizes.

    A *piece* is one of several results: `node` is the `getitem` that reads it, at `position`, and everything else
    describes the call with several results, `source`. For any other call `source` is `node` itself.

    `cache` is the rule's own memory for what it derives from the call and its facts; an Op lives as long as its
    Program.
    """

    def __init__(self, program: Program, node: fx.Node) -> None:
        self.program = program
        self.node = node
        self.position: int | None = None
        self.source = node
        if is_piece(program, node):
            self.source, self.position = node.args  # type: ignore[assignment]
        self.target: Any = self.source.target
        self.info = program.infos.get(node)
        self.cache: dict[str, Any] = {}
        self.operands = tuple(
            operand
            for operand in _flat_nodes((self.source.args, dict(self.source.kwargs)))
            if operand in program.infos
        )

    @property
    def has_empty_tensors(self) -> bool:
        """Whether an operand or the result has no entries."""
        infos = (*map(self.info_of, self.operands), *([self.info] if self.info else []))
        return any(info.is_empty for info in infos)

    @cached_property
    def args(self) -> dict[str, Any]:
        return schema.bind(self.source)

    def arg(self, *names: str) -> Any:
        """The argument with the first of these names that the schema has."""
        return next(self.args[name] for name in names if name in self.args)

    def constant(self, name: str) -> Tensor | None:
        """The constant tensor passed as argument `name`, or None if it is absent or not a constant."""
        return self.program.constant(self.args.get(name))

    def held(self, name: str) -> Held | None:
        """The same as it is held, for whoever does not look at its entries."""
        return self.program.held(self.args.get(name))

    def info_of(self, operand: fx.Node) -> TensorInfo:
        return self.program.infos[operand]

    def run(self, value_of: Callable[[fx.Node], Any]) -> Any:
        """The call's value (a piece's own) with every node among the arguments replaced."""
        found = schema.call(self.source, value_of)
        return found if self.position is None else found[self.position]

    @property
    def pieces(self) -> tuple[fx.Node, ...]:
        """All pieces of a call with several results that are read, in graph order, or the one result."""
        return tuple(self.source.users) if self.position is not None else (self.node,)

    @property
    def is_read_by_pieces(self) -> bool:
        """Whether this is a call with several results of which each reader takes one."""
        readers = self.node.users
        return bool(readers) and all(is_piece(self.program, reader) for reader in readers)

    @property
    def out(self) -> TensorInfo:
        assert self.info is not None
        return self.info

    def axis(self, axis: int, operand: fx.Node | None = None) -> int:
        """A non-negative axis number of an operand (of the result by default)."""
        rank = self.out.rank if operand is None else self.info_of(operand).rank
        return axis % max(rank, 1)


def is_piece(program: Program, node: fx.Node) -> bool:
    """Whether a node reads one tensor out of a call with several results."""
    if node.target is not operator.getitem or node not in program.infos:
        return False
    source, position = node.args
    return isinstance(source, fx.Node) and source not in program.infos and isinstance(position, int)


def _flat_nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat_nodes(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _flat_nodes(item)
