"""One call's example inputs, from names, shapes and dtypes, and their dynamic axes."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from sbp_compile.errors import InputError, UnsupportedModelError, UsageError

Named = Mapping[str, Tensor]
Axes = Mapping[str, Mapping[int, str]]

_INPUT = re.compile(
    r"(?:(?P<name>[^=]+)=)?(?P<shape>\d+(?:x\d+)*|scalar)(?::(?P<dtype>\w+))?(?::(?P<range>-?\d+\.\.-?\d+))?"
)
_AXES = re.compile(r"(?:(?P<name>[^:=]+):)?(?P<axes>\d+=\w+(?:,\d+=\w+)*)")
_HOW_INPUT = "write NAME=SHAPE[:DTYPE[:LOW..HIGH]], such as x=1x3x224x224:float32 or tokens=2x16:int64:0..999"
_HOW_AXES = "write NAME:AXIS=SIZE_NAME[,...], such as x:0=batch,2=height"
_MOST_BYTES = 2**33
_COLLECTING = frozenset({inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD})
_DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
    "complex128",
)  # fmt: skip


def parse_input(text: str, number: int = 0) -> tuple[str, Tensor]:
    """Return (name, random tensor) of `name=1x3x224x224:float32`; the name is empty where none is given.

    Floats are standard normal, integers within LOW..HIGH (both included, 0..1 if not given). `number`: of the input,
    the seed. Raises `UsageError`.
    """
    match = _INPUT.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--input {text!r} cannot be read; {_HOW_INPUT}")
    dtype_name = match["dtype"] or "float32"
    if dtype_name not in _DTYPES:
        raise UsageError(f"--input {text!r}: dtype {dtype_name!r} is not one of {', '.join(_DTYPES)}")
    dtype = getattr(torch, dtype_name)
    shape = [] if match["shape"] == "scalar" else [int(size) for size in match["shape"].split("x")]
    if math.prod(shape) * dtype.itemsize > _MOST_BYTES:
        raise UsageError(
            f"--input {text!r} would take {math.prod(shape) * dtype.itemsize / 2**30:.0f} GiB; give fewer"
        )
    low, high = (int(bound) for bound in (match["range"] or "0..1").split(".."))
    if low > high or (match["range"] and dtype.is_floating_point):
        raise UsageError(f"--input {text!r}: the range must be LOW..HIGH, of an integer input")
    return (match["name"] or "").strip(), random_tensor(shape, dtype, low=low, high=high, seed=number)


def random_tensor(
    shape: Sequence[int], dtype: torch.dtype, *, low: int = 0, high: int = 1, seed: int = 0
) -> Tensor:
    """Return a tensor of standard normal values, of integers from `low` to `high`, or of booleans."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def parse_axes(texts: Sequence[str]) -> dict[str, dict[int, str]]:
    """Return names of dynamic axes by input and axis, from `name:0=batch,2=height`; or `UsageError`."""
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        match = _AXES.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"--dynamic {text!r} cannot be read; {_HOW_AXES}")
        axes = found.setdefault((match["name"] or "").strip(), {})
        for part in match["axes"].split(","):
            axis, name = part.split("=")
            if not name.isidentifier():
                raise UsageError(f"--dynamic {text!r}: {name!r} is not a name; {_HOW_AXES}")
            if axes.setdefault(int(axis), name) != name:
                raise UsageError(
                    f"--dynamic {text!r}: axis {axis} is called {axes[int(axis)]!r} and {name!r}"
                )
    return found


def bind(function: Any, given: Named, source: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of a call of `function` with named inputs; a name that is a number is a position.

    `source`: what messages call the network. Raises `InputError` for a name that it does not have, and for one that it
    needs and that is not given.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [entry.name for entry in parameters if entry.kind not in _COLLECTING]
    if not names:
        return tuple(given.values()), {}
    named = match_names(given, names, source)
    missing = [entry.name for entry in parameters if _is_needed(entry) and entry.name not in named]
    if missing:
        raise InputError(f"{source} needs {', '.join(missing)} too: {example_flags(missing)}")
    args: list[Any] = []
    for entry in parameters:
        if entry.kind in {*_COLLECTING, entry.KEYWORD_ONLY} or entry.name not in named:
            break
        args.append(named.pop(entry.name))
    return tuple(args), dict(named)


def bind_exported(
    exported: ExportedProgram, given: Named, source: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Do the same for an exported program: its inputs are tensors known by name, shape and dtype."""
    specs = [spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    names = [spec.arg.name for spec in specs if isinstance(spec.arg, TensorArgument)]
    named = match_names(given, names, source)
    missing = [name for name in names if name not in named]
    if missing:
        raise InputError(
            f"{source} needs {', '.join(missing)} too: {' '.join(exported_flags(exported, missing))}"
        )
    leaves = [
        named[spec.arg.name] if isinstance(spec.arg, TensorArgument) else getattr(spec.arg, "value", None)
        for spec in specs
    ]
    in_spec = exported.call_spec.in_spec
    assert in_spec is not None
    args, kwargs = in_spec.unflatten(leaves)
    return args, kwargs


def match_names(given: Named, names: Sequence[str], source: str) -> dict[str, Tensor]:
    """Return the inputs under the network's own names; the only input of a network may have any name."""
    if len(given) == len(names) == 1:
        return {names[0]: next(iter(given.values()))}
    found = {}
    for key, tensor in given.items():
        name = _named(key, names)
        if name not in names:
            raise InputError(f"{source} has no input {key!r}; its inputs are {', '.join(names)}")
        found[name] = tensor
    return found


def example_flags(names: Sequence[str]) -> str:
    """Return what to add to the command line for inputs of which only the names are known."""
    flags = " ".join(f"--input {name}=SHAPE:DTYPE" for name in names)
    return f"add {flags} (such as {names[0] if names else 'x'}=1x3x224x224:float32), or --inputs data.npz"


def exported_flags(exported: ExportedProgram, names: Sequence[str] | None = None) -> list[str]:
    """Return the options that describe an exported program's inputs; symbolic sizes as 2."""
    flags = []
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if (
            node.op != "placeholder"
            or not isinstance(value, Tensor)
            or node.name not in exported.graph_signature.user_inputs
        ):
            continue
        if names is None or node.name in names:
            shape = "x".join(str(size if str(size).isdecimal() else 2) for size in value.shape) or "scalar"
            flags.append(f"--input {node.name}={shape}:{str(value.dtype).removeprefix('torch.')}")
    return flags


def dynamic_shapes(
    axes: Axes, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], source: str
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Return arguments and torch's dynamic shapes in which the named axes are dynamic and all others are not.

    An axis of size 1 is repeated to 2, since torch takes a size of 1 for a constant. Axes in front share one dimension
    where they have one name; of the others torch finds out itself how they hang together. `names`: of the positional
    arguments. Raises `InputError` for an input or axis that is not there.
    """
    given = dict(zip(names, args, strict=False)) | kwargs
    known = list(given)
    wanted = {_named(key, known): entries for key, entries in axes.items()}
    for name, entries in wanted.items():
        if not isinstance(given.get(name), Tensor):
            raise InputError(f"--dynamic: {source} has no input {name!r}; its inputs are {', '.join(known)}")
        for axis in entries:
            given[name] = _at_least_two(given[name], name, axis)
    dims = {
        name: Dim(name if name.isidentifier() else f"size_{number}", min=1)
        for number, entries in enumerate(wanted.values())
        for axis, name in entries.items()
        if axis == 0
    }
    shapes: dict[str, dict[int, Any] | None] = {
        name: {axis: dims.get(label, Dim.AUTO) for axis, label in wanted.get(name, {}).items()}
        if isinstance(given[name], Tensor)
        else None
        for name in known
    }
    positional = tuple(given[name] for name in known[: len(args)])
    return positional, {name: given[name] for name in known[len(args) :]}, shapes


def captured_axes(exported: ExportedProgram, axes: Axes, names: Sequence[str], source: str) -> Axes:
    """Return the axes under the names that the inputs have in the exported program.

    `names`: of the arguments. Raises `UnsupportedModelError` where the network fixed an axis that was to be dynamic.
    """
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    inputs = [str(name) for name in exported.graph_signature.user_inputs]
    own_names = dict(zip(names, inputs, strict=True)) if len(names) == len(inputs) else {}
    found = {}
    for key, entries in axes.items():
        name = _named(key, names)
        found[own_names.get(name, name)] = entries
        value = values.get(own_names.get(name, name))
        for axis in entries:
            if (
                isinstance(value, Tensor) and str(value.shape[axis]).isdecimal()
            ):  # a fixed size may stay a SymInt
                raise UnsupportedModelError(
                    f"--dynamic {name}:{axis}: the code of {source} fixes the size to {value.shape[axis]}; leave the "
                    "axis away"
                )
    return found


def _named(key: str, names: Sequence[str]) -> str:
    """Return the input's name for a name, a position, or nothing where there is one input."""
    if key.isdecimal() and int(key) < len(names):
        return names[int(key)]
    return names[0] if not key and len(names) == 1 else key


def _at_least_two(value: Tensor, name: str, axis: int) -> Tensor:
    if axis >= value.ndim:
        raise InputError(
            f"--dynamic {name}:{axis}: input {name!r} has shape {list(value.shape)}, no axis {axis}"
        )
    return torch.cat([value, value], dim=axis) if value.shape[axis] == 1 else value


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty and parameter.kind not in _COLLECTING
