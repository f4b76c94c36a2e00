"""A noisy network as a run of training left it, from its checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from sbp_compile.errors import UsageError
from sbp_compile.training.checkpoint import State, read_state
from sbp_compile.training.networks import dense_network, noisy_network

WITH_NOISE = ("sbp", "sbpa")


def restored(path: Path, example: Tensor) -> tuple[nn.Module, State]:
    """Return the noisy network of a checkpoint, in eval mode, and the state that was read.

    `example`: an input of the network, (N, C, H, W). Raises ModelFileError for a file that is no checkpoint, UsageError
    for one of another method or whose pretraining was not over.
    """
    state = read_state(path)
    method = state.about.get("method")
    if method not in WITH_NOISE or state.phase == 0 or not state.module:
        raise UsageError(
            f"{path} (method {method}) has no noise layers yet: give the checkpoint of a run with --method "
            f"{' or '.join(WITH_NOISE)}"
        )
    dense = dense_network(state.about["network"], example)
    dense.load_state_dict(state.dense)
    module = noisy_network(dense, example, 0.0)
    module.load_state_dict(state.module)
    return module.eval(), state
