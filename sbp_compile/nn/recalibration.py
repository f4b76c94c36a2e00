"""Batch norms behind noise: in training their statistics are those of noisy inputs, afterwards those of expected ones.

The variance that noise adds is in what a batch norm remembers, and is gone in eval mode (for dropout: Li et al. 2019,
arXiv 1801.05134). So the statistics are taken anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sbp_compile.nn.noise import NoiseArgumentError

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def recalibrate_norms(module: nn.Module, batches: Iterable[Tensor]) -> int:
    """Take the running statistics of all batch norms anew with everything else in eval mode; returns their number.

    `batches`: inputs of `module`, each with the batch first; every batch counts the same, and what it leaves is the
    mean over batches of their means and variances. Norms without running statistics stay as they are; where nothing
    is left to do, no batch is read. Modes and momentum are put back; weights do not change. Raises NoiseArgumentError
    where there is no batch; then, and where the module fails, the statistics stay what they were.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _NORMS) and norm.running_mean is not None]
    if not norms:
        return 0
    modes = [(part, part.training) for part in module.modules()]
    before = [(norm, norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    module.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over all batches
            norm.train()
        _run(module, batches)
    except BaseException:
        for norm, _, state in before:
            norm.load_state_dict(state)
        raise
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum
        for part, training in modes:
            part.training = training
    return len(norms)


def _run(module: nn.Module, batches: Iterable[Tensor]) -> None:
    count = 0
    with torch.no_grad():
        for batch in batches:
            module(batch)
            count += 1
    if not count:
        raise NoiseArgumentError("`batches` is empty: give at least one batch of inputs")
