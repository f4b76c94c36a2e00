"""Input arrays for a model, from what it declares: names, dtypes and shapes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbp_compile.errors import InputError, UnsupportedModelError, UsageError

Shapes = Mapping[str, int | Sequence[int | str]]
Dimension = int | str | None
_Given = Mapping[str, Sequence[int | str]]

_BATCH_NAMES = frozenset({"batch", "batch_size"})
_FLOATS = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}
_INTEGERS = {f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Declared:
    """One input as the model declares it; a dimension is a size, a symbolic name, or None."""

    name: str
    type: str
    shape: tuple[Dimension, ...]

    @property
    def batch_axis(self) -> int:
        """The axis named `batch`, else axis 0."""
        named = (axis for axis, size in enumerate(self.shape) if size in _BATCH_NAMES)
        return next(named, 0)


def make_inputs(
    model: str, declared: Sequence[Declared], *, batch: int, shapes: Shapes, seed: int
) -> dict[str, NDArray[np.generic]]:
    """Make random arrays for every input, the same for equal name, dtype, shape and seed.

    Floats are standard normal. Integers are 0 or 1, which every index table and every mask accepts, except
    uint8, which is 0 to 255 as in images. Raises InputError where a size is missing or does not fit,
    UnsupportedModelError for an input that is no tensor of numbers.
    """
    given = {name: [value] if isinstance(value, int) else list(value) for name, value in shapes.items()}
    sizes = {item.name: _shape(model, item, batch, given) for item in declared}
    _check_batch(model, declared, sizes, batch)
    return {item.name: _array(model, item, sizes[item.name], seed) for item in declared}


def check_names(shapes: Shapes, declared: Iterable[Declared]) -> None:
    """Raise UsageError for a name in `shapes` that is neither an input nor a symbolic axis of any model."""
    known = {name for item in declared for name in (item.name, *item.shape) if isinstance(name, str)}
    for name in shapes:
        if name not in known:
            raise UsageError(f"shape '{name}' is no input or axis of these models; known: {_listed(known)}")


def _shape(model: str, item: Declared, batch: int, shapes: _Given) -> tuple[int, ...]:
    if item.name in shapes:
        return _given_shape(model, item, batch, shapes[item.name])
    return tuple(_size(model, item, axis, batch, shapes) for axis in range(len(item.shape)))


def _given_shape(model: str, item: Declared, batch: int, given: Sequence[int | str]) -> tuple[int, ...]:
    shape = tuple(batch if size in _BATCH_NAMES else size for size in given)
    fits = len(shape) == len(item.shape) and all(
        isinstance(size, int) and size > 0 and (not isinstance(want, int) or want == size)
        for size, want in zip(shape, item.shape, strict=False)
    )
    if not fits:
        raise InputError(
            f"shape {_written(given)} does not fit input '{item.name}' of {model}, "
            f"which is declared as {_written(item.shape)}"
        )
    return tuple(int(size) for size in shape)


def _size(model: str, item: Declared, axis: int, batch: int, shapes: _Given) -> int:
    size = item.shape[axis]
    if isinstance(size, int):
        return size
    match shapes.get(size or ""):
        case [int(given)] if given > 0:
            return given
    if axis == item.batch_axis:
        return batch
    example = ",".join("batch" if at == item.batch_axis else str(want) for at, want in enumerate(item.shape))
    raise InputError(
        f"input '{item.name}' of {model} has a dynamic axis {axis} ({size or 'unnamed'}): give its size with "
        f"--shape {item.name}={example} (a number for each axis)"
    )


def _check_batch(
    model: str, declared: Sequence[Declared], sizes: Mapping[str, tuple[int, ...]], batch: int
) -> None:
    found = {sizes[item.name][item.batch_axis] for item in declared if item.shape}
    if found and batch not in found:
        raise InputError(
            f"{model} has a batch of {_listed(found)}, not {batch}: ask for the batch that it has"
        )


def _array(model: str, item: Declared, shape: tuple[int, ...], seed: int) -> NDArray[np.generic]:
    rng = np.random.default_rng([seed, zlib.crc32(item.name.encode())])
    if item.type in _FLOATS:
        return rng.standard_normal(shape).astype(_FLOATS[item.type])
    if item.type in _INTEGERS:
        end = 256 if item.type == "tensor(uint8)" else 2
        return rng.integers(0, end, shape).astype(_INTEGERS[item.type])
    if item.type == "tensor(bool)":
        return rng.integers(0, 2, shape).astype(np.bool_)
    raise UnsupportedModelError(
        f"input '{item.name}' of {model} is {item.type}: only tensors of numbers can be timed"
    )


def _written(shape: Sequence[Dimension]) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(sorted(str(value) for value in values)) or "none"
