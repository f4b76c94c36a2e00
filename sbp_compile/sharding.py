"""Parameters of which this process holds a part, after `torch.distributed.fsdp.fully_shard`: told apart, made whole.

torch's modules for them are looked up where they are loaded already, not imported: without them nothing is sharded,
and importing them takes a second.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is distributed over several processes (a DTensor)."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def sharded_modules(module: nn.Module) -> dict[str, Any]:
    """Every module in `module`, itself included, to which `fully_shard` was applied, by name."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None:
        return {}
    return {name: part for name, part in module.named_modules() if isinstance(part, loaded.FSDPModule)}


def has_shards(module: nn.Module) -> bool:
    """Whether `module` or a part of it is sharded, whole though its parameters may be for the moment."""
    return any(map(is_sharded, module.parameters())) or bool(sharded_modules(module))


def whole(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor, any other one as it is; the processes that share it must call together.

    Each process's part gets its part of the gradient: what is computed has to be the same in all of them.
    """
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def part_of(value: Any, like: Tensor | None) -> Any:
    """Return what this process holds of the whole tensor `value`, where `like` is sharded and of its shape.

    Any other value comes back as it is. Nothing is sent: every process has the value.
    """
    if like is None or not is_sharded(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
