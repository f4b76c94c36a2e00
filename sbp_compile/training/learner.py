"""A method's module as the processes train it: whole in each of them (DDP), or each with its shards (FSDP2).

States are those of a single process in both cases, whole and under the same names, so that any of them goes on from
another's checkpoint.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from sbp_compile.capture.export import evaluating, map_tensors
from sbp_compile.errors import UsageError
from sbp_compile.sharding import is_sharded, part_of, whole
from sbp_compile.training.distributed import World
from sbp_compile.training.methods import Method

State = dict[str, Any]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Learner:
    """Whole: `method` is what learns, `called` its module as training calls it."""

    def __init__(self, method: Method, world: World) -> None:
        self.method, self.called = method, world.wrap(method.module)

    def state(self, optimizer: torch.optim.Optimizer) -> tuple[State, State]:
        """Return the states of module and optimiser; where there are shards all processes ask, the first one gets."""
        return self.method.module.state_dict(), optimizer.state_dict()

    def load(self, optimizer: torch.optim.Optimizer, module: State, state: State) -> None:
        """Go on from what `state` returned, in a run of any kind."""
        self.method.module.load_state_dict(module)
        optimizer.load_state_dict(state)

    @contextmanager
    def whole(self) -> Iterator[Method]:
        """Yield the method with a whole module as it is now, good in the first process; all of them call."""
        yield self.method

    def finish(self) -> None:
        """Leave what was learnt in the method that was given, in every process."""


class ShardedLearner(Learner):
    """Sharded: `method` is a twin of the one that was given, whose module waits on the CPU meanwhile.

    Capture, evaluation and files need a whole module, and the one that waits takes the parameters over for them. The
    processes begin with what the first one has; buffers are its own, too.
    """

    def __init__(self, method: Method, world: World, example: Tensor) -> None:
        self._given, self._world, self._device = method, world, example.device
        _check(method.module)
        blocks = _blocks(method.module, example)
        _spread(method.module.state_dict().values())
        method.module.to("cpu")
        self.method = copy.copy(method)
        self.method.module = self.called = copy.deepcopy(method.module)
        _shard(self.called, blocks, example.device.type)

    def state(self, optimizer: torch.optim.Optimizer) -> tuple[State, State]:
        """Gather both, one tensor after another."""
        found = [map_tensors(self._gathered, dict(of.state_dict())) for of in (self.called, optimizer)]
        return (found[0], found[1]) if self._world.rank == 0 else ({}, {})

    def load(self, optimizer: torch.optim.Optimizer, module: State, state: State) -> None:
        """Take this process's part of both."""
        own = self.called.state_dict()
        self.called.load_state_dict({name: part_of(value, own.get(name)) for name, value in module.items()})
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = {
            index: {key: part_of(value, parameters[index]) for key, value in held.items()}
            for index, held in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": moments})

    @contextmanager
    def whole(self) -> Iterator[Method]:
        """Lend the module that waits, on the device."""
        state, module = map_tensors(self._gathered, dict(self.called.state_dict())), self._given.module
        if self._world.rank == 0:
            module.load_state_dict(state)
            module.to(self._device)
        yield self._given
        module.to("cpu")

    def finish(self) -> None:
        """Gather in every process."""
        state = self.called.state_dict()
        _spread(value for value in state.values() if not is_sharded(value))
        self._given.module.load_state_dict({name: whole(value) for name, value in state.items()})
        self._given.module.to(self._device)

    def _gathered(self, value: Tensor) -> Tensor | None:
        found = whole(value)
        return found.cpu() if self._world.rank == 0 else None


def make_learner(method: Method, world: World, example: Tensor) -> Learner:
    """Begin to train `method` in these processes; `example`: an input (N, ...) on the device.

    Raises UsageError for a network that cannot be sharded.
    """
    return ShardedLearner(method, world, example) if world.shards else Learner(method, world)


def _check(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.ndim or not parameter.is_contiguous():
            reason = "is not contiguous" if parameter.ndim else "is a single number"
            raise UsageError(
                f"--shard: parameter {name!r} {reason}, so fully_shard does not take it: train without --shard"
            )
    dtypes = {str(parameter.dtype) for parameter in module.parameters()}
    if len(dtypes) > 1:
        raise UsageError(
            f"--shard: parameters are of several dtypes ({', '.join(sorted(dtypes))}): train without --shard"
        )


def _spread(values: Iterable[Tensor]) -> None:
    """Give every process what the first one has."""
    for value in values:
        sent = value.contiguous()
        distributed.broadcast(sent, 0)
        value.copy_(sent)


def _shard(module: nn.Module, blocks: Sequence[str], device: str) -> None:
    # Here, since only runs with shards need it, and it takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    for name in blocks:
        fully_shard(module.get_submodule(name), mesh=mesh)
    fully_shard(module, mesh=mesh)


def _blocks(module: nn.Module, example: Tensor) -> list[str]:
    """Names of what is gathered on its own: members of containers that a call of the network calls once.

    Whatever else there is, parameters that are used in several places among them, is gathered with the network.
    """
    names = [name for name in _members(module) if _owns_its_parameters(module.get_submodule(name), module)]
    calls: Counter[nn.Module] = Counter()
    handles = [
        module.get_submodule(name).register_forward_pre_hook(lambda part, _: calls.update([part]))
        for name in names
    ]
    with evaluating(module), torch.no_grad():
        module(example)
    for handle in handles:
        handle.remove()
    return [name for name in names if calls[module.get_submodule(name)] == 1]


def _members(module: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(module, _CONTAINERS) and not isinstance(child, _CONTAINERS):
            yield f"{prefix}{name}"
        else:
            yield from _members(child, f"{prefix}{name}.")


def _owns_its_parameters(part: nn.Module, module: nn.Module) -> bool:
    within, everywhere = (
        Counter(id(parameter) for _, parameter in of.named_parameters(remove_duplicate=False))
        for of in (part, module)
    )
    return bool(within) and all(everywhere[key] == number for key, number in within.items())
