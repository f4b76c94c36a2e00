"""Example inputs as data: the tensors as safetensors, what they are nested in as JSON."""

from __future__ import annotations

import json
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sbp_compile.errors import InputError, ModelFileError

_PLAIN = (type(None), bool, int, float, str)


def pack_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bytes, bytes]:
    """Return (JSON, safetensors) of one call's arguments.

    Tensors, None, numbers and strings, nested in tuples, lists and dicts with string keys; `InputError` for
    anything else. Devices, strides and gradients are not kept.
    """
    tensors: dict[str, Tensor] = {}
    tree = {"args": _pack(args, tensors), "kwargs": _pack(kwargs, tensors)}
    text = json.dumps(tree, separators=(",", ":"))
    return text.encode(), safetensors.torch.save(tensors)


def unpack_inputs(tree: bytes, tensors: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) from what `pack_inputs` wrote; `ModelFileError` if it is anything else."""
    try:
        loaded = safetensors.torch.load(tensors)
        parsed = json.loads(tree)
        args, kwargs = _unpack(parsed["args"], loaded), _unpack(parsed["kwargs"], loaded)
    except Exception as error:
        raise ModelFileError(f"the example inputs are damaged ({error!r})") from error
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise ModelFileError("the example inputs are damaged (args and kwargs expected)")
    return args, kwargs


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": _store(value, tensors)}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _pack(item, tensors) for key, item in value.items()}}
    if type(value) in _PLAIN:
        return {"value": value}
    raise InputError(
        f"example input of type {type(value).__name__} cannot be saved: "
        "expected tensors, numbers, strings or None, in tuples, lists and dicts"
    )


def _store(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = f"layout {tensor.layout} on device {tensor.device}"
        raise InputError(f"example input of {kind} cannot be saved: give a dense tensor with values")
    name = f"input_{len(tensors)}"
    # A clone, because safetensors refuses tensors that share memory.
    tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return name


def _unpack(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    [(kind, content)] = node.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "tuple":
            return tuple(_unpack(item, tensors) for item in content)
        case "list":
            return [_unpack(item, tensors) for item in content]
        case "dict":
            return {key: _unpack(item, tensors) for key, item in content.items()}
        case "value":
            return content
    raise ValueError(f"unknown kind {kind!r}")
