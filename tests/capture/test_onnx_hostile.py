"""ONNX files that are damaged, or hostile: refused with an error of ours, and nothing is written."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from sbp_compile.capture import load_model
from sbp_compile.capture.from_onnx import load_onnx, onnx_network
from sbp_compile.cli import main
from sbp_compile.errors import CompileError, InputError, ModelFileError, UnsupportedModelError
from tests.capture.onnx_models import masked_model, parsed


def weight(model: onnx.ModelProto, name: str = "first") -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def external(model: onnx.ModelProto, location: str, **places: int) -> None:
    tensor = weight(model)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **places}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


def cyclic(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "d"


def dangling(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nobody"


def computed_twice(model: onnx.ModelProto) -> None:
    model.graph.node[4].output[0] = "c"


def two_weights_of_a_name(model: onnx.ModelProto) -> None:
    weight(model, "shift").name = "first"


def claims_100_gigabytes(model: onnx.ModelProto) -> None:
    weight(model).dims[0] = 10**9


def negative_size(model: onnx.ModelProto) -> None:
    weight(model).dims[0] = -6


def overflowing_size(model: onnx.ModelProto) -> None:
    weight(model).dims[:] = [2**62, 2**62, 2**62]


def no_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "nothing"


def absolute(model: onnx.ModelProto) -> None:
    external(model, "/etc/passwd")


def above(model: onnx.ModelProto) -> None:
    external(model, "../outside")


def link(model: onnx.ModelProto) -> None:
    external(model, "link")


def missing(model: onnx.ModelProto) -> None:
    external(model, "weights")


def beyond_its_file(model: onnx.ModelProto) -> None:
    external(model, "short", offset=2**40)


def not_utf_8(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = "§§§§"


HOSTILE: dict[Callable[[onnx.ModelProto], None], str] = {
    cyclic: "nothing before it computes|topologically sorted",
    dangling: "nothing before it computes|topologically sorted",
    computed_twice: "computed twice|SSA form|used as output names multiple times",
    two_weights_of_a_name: "two weights of the name 'first'",
    claims_100_gigabytes: "needs 108000000000 bytes",
    negative_size: "which no tensor can have",
    overflowing_size: "needs [0-9]+ bytes",
    no_output: "computed by nothing|not an output of any node",
    absolute: "outside of the model's folder",
    above: "outside of the model's folder",
    link: "outside of the model's folder",
    missing: "no such file beside the model",
    beyond_its_file: "is the file truncated",
}


@pytest.mark.parametrize("harm", HOSTILE, ids=lambda harm: harm.__name__)
def test_a_hostile_file_is_refused_and_nothing_is_written(
    harm: Callable[[onnx.ModelProto], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(bytes(648))
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "short").write_bytes(bytes(10))
    model = masked_model()
    harm(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    before = sorted(folder.iterdir())
    with pytest.raises(ModelFileError, match=HOSTILE[harm]):
        load_model(folder / "model.onnx")
    assert main([str(folder / "model.onnx"), "-o", str(folder / "small.onnx")]) == 3
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("sbp_compile: error: ")
    assert sorted(folder.iterdir()) == before


def test_a_text_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    model = masked_model()
    not_utf_8(model)
    content = model.SerializeToString().replace("§§§§".encode(), b"\xe2\xe3\xe2\xe3\xe2\xe3\xe2\xe3")
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelFileError, match="damaged text"):
        load_model(tmp_path / "model.onnx")


def test_an_absurd_input_is_not_made(tmp_path: Path) -> None:
    model = masked_model()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 10**9
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(InputError, match="at most 1 GiB"):
        load_model(tmp_path / "model.onnx")


def test_an_absurd_value_inside_is_not_made(tmp_path: Path) -> None:
    text = """g (float[2] x) => (float[] y) <int64[2] s = {3000000000, 2}>
    { z = ConstantOfShape(s) a = Add(z, x) y = ReduceSum(a) }"""
    onnx.save(parsed(text), str(tmp_path / "model.onnx"))
    with pytest.raises(UnsupportedModelError, match="ConstantOfShape"):
        load_model(tmp_path / "model.onnx")


def test_a_sparse_weight_is_refused(tmp_path: Path) -> None:
    model = masked_model()
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4]))
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(UnsupportedModelError, match="sparse"):
        load_model(tmp_path / "model.onnx")


def read(path: Path, content: bytes) -> bool:
    """Return whether a file is read; anything but a network or an error of ours fails the test."""
    path.write_bytes(content)
    try:
        onnx_network(load_onnx(path))
    except CompileError:
        return False
    return True


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    model = masked_model()
    del model.metadata_props[:]  # the opset is last then, and nothing can be lost unnoticed
    content = model.SerializeToString()
    for length in range(0, len(content) - 1, max(len(content) // 97, 1)):
        assert not read(tmp_path / "model.onnx", content[:length])


def test_flipped_bits_give_a_network_or_an_error_of_ours(tmp_path: Path) -> None:
    content, generator = masked_model().SerializeToString(), random.Random(0)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(content)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        outcomes.add(read(tmp_path / "model.onnx", bytes(damaged)))
    assert outcomes == {True, False}
