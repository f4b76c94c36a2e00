"""Small models to time: two that differ by a factor of hundreds, and one with two dynamic axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

MakeModel = Callable[..., bytes]


def _matmul_model(
    width: int, *, shape: Sequence[int | str] = ("batch", 8), dtype: int = TensorProto.FLOAT
) -> bytes:
    """8 features expanded to `width` and mixed there: dear for a large width."""
    weights = [np.ones((8, width), np.float32) / 8, np.ones((width, width), np.float32) / width]
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["float", "w0"], ["h"]),
        helper.make_node("MatMul", ["h", "w1"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "two_matmuls",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape[:-1], width])],
        [numpy_helper.from_array(weight, f"w{at}") for at, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.fixture(scope="session")
def matmul_model() -> MakeModel:
    return _matmul_model


@pytest.fixture(scope="session")
def cheap() -> bytes:
    return _matmul_model(8)


@pytest.fixture(scope="session")
def dear() -> bytes:
    return _matmul_model(700)


@pytest.fixture(scope="session")
def sequence() -> bytes:
    return _matmul_model(8, shape=("batch", "length", 8))


@pytest.fixture
def files(tmp_path: Path, cheap: bytes, dear: bytes, sequence: bytes) -> Path:
    """A folder with the three models and a file that is none."""
    for name, content in {
        "cheap": cheap,
        "dear": dear,
        "sequence": sequence,
        "notes": b"these are notes",
    }.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
    return tmp_path
