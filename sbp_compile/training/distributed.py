"""Several processes that train one network (torchrun): equal parameters, shares of a batch, noise of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sbp_compile.errors import UsageError


@dataclass(frozen=True)
class World:
    """The rank of this process, and how many there are; `sharded`: each is to hold its part of the parameters."""

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def shards(self) -> bool:
        """Whether parameters are in parts: one process has them whole."""
        return self.sharded and self.size > 1

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return what is called in training: gradients are averaged over the processes in its backward pass."""
        return DistributedDataParallel(module) if self.size > 1 else module

    def agree(self, due: bool, device: torch.device) -> bool:
        """Whether to write a checkpoint: the first process says so; where there are shards, to all of them."""
        if not self.shards:
            return due and self.rank == 0
        answer = torch.tensor([int(due)], device=device)
        distributed.broadcast(answer, 0)
        return bool(answer)

    def meet(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            distributed.barrier()

    def share(self, batch: Tensor) -> tuple[Tensor, float]:
        """Return this rank's examples of a batch, and the factor on their mean loss.

        With the factor the mean over the ranks is the mean over the batch, however it divides. A rank for which
        none is left takes one at weight 0, so that all of them do the same work.
        """
        if self.size == 1:
            return batch, 1.0
        mine = batch[self.rank :: self.size]
        factor = self.size * len(mine) / len(batch)
        return (mine, factor) if len(mine) else (batch[:1], 0.0)

    def seed(self, seed: int, phase: int, step: int) -> None:
        """Put torch's random state where this step of this rank begins: the same, whatever came before.

        So a run can be taken up at any step, with any number of processes.
        """
        sequence = np.random.SeedSequence((seed, phase, step, self.rank))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))


@contextmanager
def joined(device: str, *, sharded: bool = False) -> Iterator[World]:
    """Join the processes that torchrun started, by gloo on CPUs and nccl on GPUs; alone without torchrun."""
    if "WORLD_SIZE" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield World()
        return
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"--nproc-per-node is more than the {torch.cuda.device_count()} GPUs here: start one process for each"
            )
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(distributed.get_rank(), distributed.get_world_size(), sharded)
    finally:
        distributed.destroy_process_group()
