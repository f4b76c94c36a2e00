"""Capture of a module as an exported program, with the batch left dynamic where the model allows it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from sbp_compile.errors import BatchPinnedWarning, InputError, UnsupportedModelError, UsageError
from sbp_compile.sharding import has_shards

DynamicBatch = bool | Literal["require"]

# Warnings that torch's exporter raises about its own code or about what is harmless here.
_TORCH_WARNINGS = (
    (r"The tensor attributes? .* assigned during export", UserWarning),  # hooks of torch.nn.utils.prune
    (r"No complete tensor found in the group", UserWarning),  # a parameter that is a part of a larger tensor
    (r"The given buffer is not writable", UserWarning),  # torch 2.11, when it reads a program
    (r".*(is|are) deprecated", FutureWarning),
    (r".*(is|are) deprecated", DeprecationWarning),
)


def export_module(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: DynamicBatch = True,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Capture `module` in eval mode, without gradients, by `torch.export.export(strict=False)`.

    `args`, `kwargs`: one call's arguments; the tensors in them may be nested in tuples, lists and dicts.
    `dynamic_batch`: the batch size is axis 0 of the first tensor that has axes; axis 0 of every tensor of
    that size becomes one dynamic dimension `batch`, from 1 up. A batch of 1 is repeated to 2 for the capture,
    since torch takes a size of 1 for a constant. A model that works with one batch size only is captured with
    the example's, after a `BatchPinnedWarning`; with "require" that is an error. `dynamic_shapes`: handed to
    torch as it is; `dynamic_batch` is then not looked at.

    The module is left as it was: training flags of all submodules and plain tensor attributes included.
    Raises `UsageError` or `InputError` for arguments of the wrong kind, `UnsupportedModelError` if the model
    cannot be captured.
    """
    if dynamic_batch not in (True, False, "require"):
        raise UsageError(f"dynamic_batch (={dynamic_batch!r}) must be True, False or 'require'")
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"module (={type(module).__name__}) must be a torch.nn.Module that was made, no class"
        )
    if not isinstance(args, tuple):
        raise InputError(
            f"args (={type(args).__name__}) must be a tuple of the module's positional arguments"
        )
    if has_shards(module):
        raise UnsupportedModelError(
            "the model is sharded over several processes: load its full state dict (get_model_state_dict of "
            "torch.distributed.checkpoint.state_dict) into a whole one, and give that"
        )
    kwargs = dict(kwargs or {})
    with evaluating(module), torch.no_grad(), quiet_export():
        if dynamic_shapes is not None:
            return _export(module, args, kwargs, dynamic_shapes)
        if dynamic_batch:
            return _export_dynamic(module, args, kwargs, required=dynamic_batch == "require")
        return _export(module, args, kwargs, None)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return `tree` (nested tuples, lists, dicts) with `function` applied to its tensors."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) in (tuple, list):
        return type(tree)(map_tensors(function, item) for item in tree)
    if type(tree) is dict:
        return {key: map_tensors(function, item) for key, item in tree.items()}
    return tree


def batch_size(tree: Any) -> int | None:
    """Return axis 0 of the first tensor in `tree` that has axes, or None."""
    sizes: list[int] = []
    map_tensors(lambda tensor: sizes.append(tensor.size(0)) if tensor.ndim else None, tree)
    return sizes[0] if sizes else None


@contextmanager
def quiet_export() -> Iterator[None]:
    """Silence, by name, the warnings of torch's exporter that a user can do nothing about."""
    with warnings.catch_warnings():
        for message, category in _TORCH_WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Clear every training flag for a while, and leave the attributes of all submodules as they were.

    The flags are cleared one by one because `eval()` may be overridden to do more. The attributes are put
    back because hooks assign some while the module runs (those of `torch.nn.utils.prune`): a capture that
    fails would leave torch's stand-ins in the user's module.
    """
    parts = list(module.modules())
    saved = [_attributes(part) for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, attributes in zip(parts, saved, strict=True):
            _restore(part, attributes)


_Attributes = tuple[dict[str, Any], list[tuple[dict[Any, Any], dict[Any, Any]]]]


def _attributes(part: nn.Module) -> _Attributes:
    """Return the module's attributes, and the tables among them (its buffers, ...) with their contents."""
    attributes = dict(vars(part))
    return attributes, [(value, dict(value)) for value in attributes.values() if isinstance(value, dict)]


def _restore(part: nn.Module, saved: _Attributes) -> None:
    attributes, tables = saved
    vars(part).clear()
    vars(part).update(attributes)
    for table, content in tables:
        table.clear()
        table.update(content)


def _export_dynamic(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, required: bool
) -> ExportedProgram:
    batch = batch_size((args, kwargs))
    if batch is None or batch == 0:
        if required:
            raise InputError(
                f"example batch (={batch}) cannot be made dynamic: give a tensor input with a batch axis"
            )
        return _export(module, args, kwargs, None)
    try:
        return _export(module, *_with_dynamic_batch(args, kwargs, batch))
    except UnsupportedModelError as refusal:
        if required:
            raise UnsupportedModelError(f"the batch cannot be made dynamic: {refusal}") from refusal
        program = _export(module, args, kwargs, None)
        message = f"the model pins its batch: captured for batch {batch} only ({refusal})"
    warnings.warn(message, BatchPinnedWarning, stacklevel=4)
    return program


def _with_dynamic_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any], batch: int
) -> tuple[tuple[Any, ...], dict[str, Any], ShapesCollection]:
    """Return arguments with a batch of at least 2, and the dynamic shapes that go with them."""
    axis = Dim("batch", min=1)
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]  # torch leaves it without types

    def mark(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.size(0) != batch:
            return tensor
        tensor = tensor.detach() if batch > 1 else torch.cat([tensor, tensor])
        shapes[tensor] = {0: axis}
        return tensor

    args, kwargs = map_tensors(mark, (args, kwargs))
    return args, kwargs, shapes


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        name = type(module).__name__
        raise UnsupportedModelError(
            f"{name} cannot be captured by torch.export: {_first_reason(error)}"
        ) from error


def _first_reason(error: Exception) -> str:
    """Return the line of a torch message that says what is wrong: an error that it quotes, or the first bullet."""
    quoted = re.search(r"got \w+\([\"'](.+)[\"']\)", str(error))
    if quoted:
        return quoted[1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    bullets = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return (bullets or lines or [type(error).__name__])[0]
