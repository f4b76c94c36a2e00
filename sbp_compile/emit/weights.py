"""The weights of the generated module, as a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sbp_compile.errors import OutputError


def save_weights(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a state dict; `metadata` as one JSON text, since safetensors keeps no order of entries.

    Raises `OutputError` where the file cannot be written.
    """
    described = {"sbp_compile": json.dumps(dict(metadata), sort_keys=True)}
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, described)
    except SafetensorError as error:
        raise OutputError(f"cannot write {path.name!r}: {error}") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a file that was just written."""
    return load_file(path)
