"""Operators that torch composes of others and passes has no rule for: taken apart before a Program is made.

`run_decompositions({})` leaves every composite operator as it stands, and an alias such as `torch.concat` or
`torch.multiply` would be an operator that nobody knows. Not listed are those that onnxruntime has a kernel for
(`grid_sampler`), and what falls apart into operators without a rule either (`fft_fft`, `linalg_inv`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.export import default_decompositions

aten = torch.ops.aten

_ALIASES = (
    "absolute", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctan2", "arctanh", "clip",
    "concat", "concatenate", "divide", "fix", "ger", "greater", "greater_equal", "less", "less_equal",
    "moveaxis", "movedim", "multiply", "negative", "not_equal", "row_stack", "special_erf",
    "special_erfc", "special_exp2", "special_expit", "special_expm1", "special_log1p",
    "special_log_softmax", "special_logsumexp", "special_round", "special_softmax", "special_xlogy",
    "subtract", "swapaxes", "swapdims", "true_divide",
)  # fmt: skip
_COMPOSED = (
    "addr", "argsort", "atleast_1d", "atleast_2d", "atleast_3d", "binary_cross_entropy_with_logits",
    "block_diag", "broadcast_tensors", "cartesian_prod", "column_stack", "cross", "cross_entropy_loss",
    "cumulative_trapezoid", "diag", "diag_embed", "diagflat", "diff", "dstack", "fliplr", "flipud",
    "hinge_embedding_loss", "hstack", "huber_loss", "inner", "isclose", "kl_div", "kron", "l1_loss",
    "linalg_cross", "linalg_matrix_norm", "linalg_matrix_power", "linalg_multi_dot", "linalg_norm",
    "linalg_vecdot", "logaddexp2", "meshgrid", "mse_loss", "nanmean", "nansum", "outer", "smooth_l1_loss",
    "special_entr", "special_ndtr", "special_sinc", "sum_to_size", "take_along_dim", "trace", "trapezoid",
    "unsafe_chunk", "vdot", "vstack",
)  # fmt: skip


@cache
def composites() -> dict[Any, Callable[..., Any]]:
    """Return torch's own decomposition of every overload of the listed operators that it has one for."""
    table = default_decompositions()
    found = {}
    for name in (*_ALIASES, *_COMPOSED):
        packet = getattr(aten, name, None)  # not every release of torch has all
        for overload in packet.overloads() if packet is not None else ():
            op = getattr(packet, overload)
            if op in table:
                found[op] = table[op]
    return found
