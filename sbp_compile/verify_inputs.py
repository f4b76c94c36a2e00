"""The inputs that the proof runs on: the examples, random ones like them, and the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from passes.ir.program import Input, Program
from sbp_compile.capture.array_file import as_tensor, read_arrays
from sbp_compile.errors import InputError


def random_inputs(program: Program, examples: Sequence[Tensor], seed: int = 0) -> list[tuple[Tensor, ...]]:
    """Return random inputs like the examples: at batch 1 and 3 where the leading axes are the dynamic batch.

    Integers stay within the example's range, floats have its mean and scale. Other dynamic axes get the
    example's size in the first, another admissible size in the second.
    """
    generator = torch.Generator().manual_seed(seed)
    leading = {entry.key(0) for entry in program.inputs if entry.sizes and not entry.is_static(0)}
    found = []
    for batch in (1, 3):
        shapes = [
            _shape(entry, example, batch if len(leading) == 1 else None, other=batch == 3)
            for entry, example in zip(program.inputs, examples, strict=True)
        ]
        found.append(
            tuple(
                _random_like(example, shape, generator)
                for example, shape in zip(examples, shapes, strict=True)
            )
        )
    return found


def _shape(entry: Input, example: Tensor, batch: int | None, *, other: bool) -> tuple[int, ...]:
    shape = list(example.shape)
    for axis in range(len(shape)):
        if entry.is_static(axis):
            continue
        if axis == 0 and batch is not None:
            shape[axis] = batch
        elif other:
            shape[axis] = entry.sizes[axis]
    return tuple(shape)


def _random_like(example: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    example = example.detach().cpu()
    if example.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if example.is_complex():
        return torch.randn(shape, generator=generator, dtype=example.dtype)
    if not example.is_floating_point():
        low, high = (int(example.min()), int(example.max())) if example.numel() else (0, 1)
        return torch.randint(low, high + 1, shape, generator=generator).to(example.dtype)
    values = example.to(torch.float64)
    values = values[torch.isfinite(values)]
    scale = float(values.std()) if values.numel() > 1 else 1.0
    centre = float(values.mean()) if values.numel() else 0.0
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (noise * (scale or 1.0) + centre).to(example.dtype)


def load_inputs(path: str | Path, program: Program) -> tuple[Tensor, ...]:
    """Read verification inputs from an .npz file with one array for each input name.

    A single array under another name will do for a network with one input. Raises `InputError`.
    """
    return inputs_of(read_arrays(path), path, program)


def inputs_of(
    arrays: Mapping[str, NDArray[np.generic]], path: str | Path, program: Program
) -> tuple[Tensor, ...]:
    """Return the arrays of an .npz file as inputs; raises as `load_inputs` does."""
    names = [entry.shown for entry in program.inputs]
    if set(arrays) != set(names) and len(arrays) == len(names) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    if set(arrays) != set(names):
        raise InputError(
            f"inputs in {str(path)!r} are named {sorted(arrays)}, the model's are {sorted(names)}"
        )
    tensors = [as_tensor(name, arrays[name]) for name in names]
    return check_inputs(program, tensors)


def check_inputs(program: Program, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return one call's tensors in the dtypes of the network's inputs; `InputError` where they do not fit."""
    if len(tensors) != len(program.inputs):
        raise InputError(f"{len(tensors)} input tensors were given, the network takes {len(program.inputs)}")
    seen: dict[tuple[int, ...], tuple[str, int]] = {}
    found = []
    for entry, tensor in zip(program.inputs, tensors, strict=True):
        found.append(_fitted(entry, tensor))
        for axis, size in enumerate(tensor.shape):
            if entry.is_static(axis):
                continue
            name, wanted = seen.setdefault(entry.key(axis), (entry.shown, size))
            if size != wanted:
                raise InputError(
                    f"input {entry.shown!r} has size {size} along axis {axis}, where {name!r} has {wanted}; "
                    "the two must agree"
                )
    return tuple(found)


def _fitted(entry: Input, value: Tensor) -> Tensor:
    if value.numel() == 0:
        raise InputError(
            f"input {entry.shown!r} of shape {list(value.shape)} is empty, and nothing can be proven on it; give an "
            "example of at least one entry"
        )
    pairs = list(zip(entry.sizes, entry.other_sizes, strict=True))
    fits = value.ndim == len(pairs) and all(
        size == wanted or (wanted != other and size > 0)
        for size, (wanted, other) in zip(value.shape, pairs, strict=True)
    )
    if not fits:
        wanted = [size if size == other else "any" for size, other in pairs]
        raise InputError(f"input {entry.shown!r} has shape {list(value.shape)}, the model takes {wanted}")
    if (
        value.is_floating_point() != entry.dtype.is_floating_point
        or value.is_complex() != entry.dtype.is_complex
    ):
        raise InputError(f"input {entry.shown!r} has dtype {value.dtype}, the model takes {entry.dtype}")
    return value.detach().to("cpu", entry.dtype)
