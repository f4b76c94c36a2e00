"""The model file: what goes in comes out, and every other file gets its own refusal."""

import hashlib
import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from sbp_compile.capture import file_archive, load_model, save_model
from sbp_compile.errors import (
    BatchPinnedWarning,
    InputError,
    ModelFileError,
    OutputError,
    UnsupportedModelError,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 1, 0, 1]))
        self.register_buffer("table", torch.arange(3), persistent=False)

    def forward(self, x: Tensor, *, options: dict[str, Any] | None = None) -> dict[str, Any]:
        y = self.norm(self.first(x)) * self.mask
        scale = 1.0 if options is None else options["scales"][0]
        return {"logits": self.second(y) * scale, "hidden": [y, (y + self.get_buffer("table")[2],)]}


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Ghost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("absent", torch.empty(4, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "net.model"
    save_model(Net(), torch.randn(2, 6), path)
    return path


def plain_pt2(path: Path) -> Path:
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),))
    program.example_inputs = None
    torch.export.save(program, path)
    return path


def test_a_saved_model_computes_the_same_after_loading(tmp_path: Path) -> None:
    net, x = Net(), torch.randn(5, 6)
    options = {"scales": [torch.tensor(3.0), None, 2, "text", 0.5, True]}
    save_model(net, x[:2], tmp_path / "net", kwargs={"options": options})
    loaded = load_model(tmp_path / "net")
    result, expected = loaded.exported_program.module()(x, options=options), net.eval()(x, options=options)
    assert torch.equal(result["logits"], expected["logits"])
    assert torch.equal(result["hidden"][1][0], expected["hidden"][1][0])
    assert loaded.example_inputs is not None
    assert torch.equal(loaded.example_inputs[0], x[:2])
    assert loaded.kwargs == {"options": options}


def test_example_inputs_of_every_dtype_and_nesting_come_back(tmp_path: Path) -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool]
    tensors = tuple(torch.ones(2, 3).to(dtype) for dtype in dtypes)
    view = torch.arange(12.0).view(4, 3).t()[:2]
    save_model(Apply(lambda xs, v: ([x + 1 for x in xs], v[0][1])), (tensors, [({}, view)]), tmp_path / "m")
    loaded = load_model(tmp_path / "m").example_inputs
    assert loaded is not None
    assert [x.dtype for x in loaded[0]] == dtypes
    assert torch.equal(loaded[1][0][1], view)
    assert isinstance(loaded[1][0], tuple)


def test_weights_of_every_dtype_layout_and_sharing_come_back(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for dtype in (
                torch.float16,
                torch.bfloat16,
                torch.float64,
                torch.int32,
                torch.bool,
                torch.complex64,
            ):
                self.register_buffer(f"of_{str(dtype)[6:]}", torch.ones(3).to(dtype))
            self.register_buffer("transposed", torch.arange(6.0).view(2, 3).t())
            self.register_buffer("part", torch.arange(10.0)[4:7])
            self.register_buffer("repeated", torch.tensor([7.0]).expand(3))
            self.register_buffer("nothing", torch.empty(0, 3))
            self.register_buffer("infinite", torch.tensor([float("inf"), float("nan")]))

        def forward(self, x: Tensor) -> Any:
            return [x[:1] + buffer for buffer in self.buffers() if buffer.numel() == 3], self.transposed

    holder = Holder()
    save_model(holder, torch.ones(2, 1), tmp_path / "m")
    state = load_model(tmp_path / "m").exported_program.state_dict
    for name, buffer in holder.named_buffers():
        assert state[name].dtype == buffer.dtype
        torch.testing.assert_close(state[name], buffer, rtol=0, atol=0, equal_nan=True)


def test_shared_parameters_stay_shared(saved: Path) -> None:
    state = load_model(saved).exported_program.state_dict
    assert state["first.weight"].data_ptr() == state["second.weight"].data_ptr()


def test_the_extension_says_nothing(saved: Path, tmp_path: Path) -> None:
    for name in ("m.onnx", "m.pt", "m"):
        (tmp_path / name).write_bytes(saved.read_bytes())
        assert load_model(str(tmp_path / name)).example_inputs is not None


def test_metadata_names_versions_and_source(saved: Path) -> None:
    loaded = load_model(saved)
    assert loaded.metadata["format"] == "sbp_compile model"
    assert loaded.metadata["torch_version"] == torch.__version__
    assert loaded.metadata["sha256"] == loaded.sha256
    assert len(loaded.sha256) == 64


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    net, x = Net(), torch.randn(2, 6)
    digests = set()
    for name in ("a.model", "b.pt2"):
        save_model(net, x, tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_the_file_holds_no_pickle_no_local_path_and_is_readable_by_torch(saved: Path) -> None:
    content = saved.read_bytes()
    assert str(Path(__file__).parent).encode() not in content
    with zipfile.ZipFile(saved) as archive:
        assert not [name for name in archive.namelist() if archive.read(name).startswith(b"\x80")]
    assert torch.export.load(io.BytesIO(content)).module()(torch.ones(3, 6))["logits"].shape == (3, 6)


def test_a_plain_pt2_without_inputs_is_loaded(tmp_path: Path) -> None:
    loaded = load_model(plain_pt2(tmp_path / "plain.pt2"))
    assert loaded.example_inputs is None
    assert loaded.kwargs == {}
    assert loaded.metadata == {}
    assert loaded.exported_program.module()(torch.ones(1, 3)).shape == (1, 2)


def test_torch_still_writes_the_layout_that_the_screen_knows(tmp_path: Path) -> None:
    """When this fails, torch changed its format: see file_archive.py, file_schema.py and screen.py."""
    with zipfile.ZipFile(plain_pt2(tmp_path / "plain.pt2")) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
        assert not archive.read("plain/" + file_archive.SAMPLE_INPUTS)
    assert names == {
        file_archive.FORMAT,
        file_archive.PROGRAM,
        file_archive.WEIGHTS_CONFIG,
        file_archive.CONSTANTS_CONFIG,
        file_archive.SAMPLE_INPUTS,
        *("data/weights/weight_0", "data/weights/weight_1"),
        *("archive_version", "byteorder", ".data/version", ".data/serialization_id"),
    }


def test_a_pinned_batch_is_warned_of_and_saved(tmp_path: Path) -> None:
    with pytest.warns(BatchPinnedWarning):
        save_model(Apply(lambda x: x.view(2, -1)), torch.ones(2, 6), tmp_path / "m")
    assert load_model(tmp_path / "m").exported_program.module()(torch.ones(2, 6)).shape == (2, 6)


def test_saving_leaves_the_module_alone(tmp_path: Path) -> None:
    net = Net().train()
    net.norm.eval()
    save_model(net, torch.ones(2, 6), tmp_path / "m")
    assert net.training
    assert not net.norm.training


@pytest.mark.parametrize(
    ("module", "inputs", "error", "message"),
    [
        (Net(), [torch.ones(2, 6)], InputError, r"example_inputs \(=list\) must be a tensor or a tuple"),
        (Net(), (object(),), InputError, "example input of type object cannot be saved"),
        (Net(), torch.ones(2, 6).to_sparse(), InputError, "give a dense tensor"),
        (Net(), torch.ones(2, 5), UnsupportedModelError, "Net cannot be captured by torch.export"),
        (Ghost(), torch.ones(2, 2), UnsupportedModelError, "tensor 'absent' was saved on device 'meta'"),
        (Net(), torch.ones(2, 6, device="meta"), InputError, "on device meta"),
    ],
)
def test_what_cannot_be_saved_is_said_and_nothing_is_left(
    tmp_path: Path, module: nn.Module, inputs: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        save_model(module, inputs, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; create it first"):
        save_model(Net(), torch.ones(2, 6), tmp_path / "nowhere" / "m")


def write_zip(path: Path, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


def torch_save(value: Any, **options: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path, **options)


def save_onnx(path: Path) -> None:
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph, producer_name="test"), path)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "there is no file"),
    "empty": (lambda path: path.touch(), "is empty"),
    "directory": (lambda path: path.mkdir(), "is a directory"),
    "text": (lambda path: path.write_text("a model, honestly"), "format that is not known"),
    "empty zip": (write_zip, "zip archive without a model"),
    "zip": (lambda path: write_zip(path, readme=b"hello"), "zip archive without a model"),
    "npz": (lambda path: write_zip(path, **{"x.npy": b"\x93NUMPY"}), "NumPy archive"),
    "npy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "NumPy array"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n"), "HDF5"),
    "empty ONNX": (save_onnx, "computes no output"),
    "old pt2": (lambda path: write_zip(path, **{"serialized_exported_program.json": b"{}"}), "old torch"),
    "module": (torch_save(nn.Linear(2, 2)), "holds pickled objects .torch.nn.modules.linear.Linear"),
    "old module": (
        torch_save(nn.Linear(2, 2), _use_new_zipfile_serialization=False),
        "holds pickled objects .torch.nn.modules.linear.Linear",
    ),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Path("x"))), "holds pickled objects .pathlib"),
    "cut zip": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(60)), "truncated or damaged archive"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_by_what_they_are(tmp_path: Path, kind: str) -> None:
    make, message = REFUSED[kind]
    make(tmp_path / "file.bin")
    with pytest.raises(ModelFileError, match=message) as caught:
        load_model(tmp_path / "file.bin")
    assert "file.bin" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_file_that_may_not_be_read_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelFileError, match=r"cannot read '.*net.model': Permission denied"):
        load_model(saved)


def test_a_newer_format_is_refused_by_its_version(saved: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    records["archive/" + file_archive.METADATA] = b'{"version": 2}'
    with pytest.raises(ModelFileError, match="format version 2 is not known here"):
        load_model(write_zip(tmp_path / "m", **records))


def loads_or_refuses(path: Path) -> bool:
    """Return whether a file loads; anything but a model or a ModelFileError is a failure of the test."""
    try:
        return load_model(path).example_inputs is not None
    except ModelFileError:
        return False


def test_a_truncated_file_is_refused_wherever_it_was_cut(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    for length in [*range(1, 60, 7), *range(60, len(content), len(content) // 40), len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        assert not loads_or_refuses(tmp_path / "cut")


def test_flipped_bits_give_a_refusal_or_the_same_model(saved: Path, tmp_path: Path) -> None:
    content, generator = saved.read_bytes(), random.Random(0)
    expected = load_model(saved).sha256
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        (tmp_path / "damaged").write_bytes(damaged)
        if loads_or_refuses(tmp_path / "damaged"):
            assert load_model(tmp_path / "damaged").sha256 == expected
        else:
            refused += 1
    assert refused > 100
