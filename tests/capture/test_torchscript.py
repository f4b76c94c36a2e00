"""TorchScript archives: what they compute is what is captured, and nothing in them runs on loading."""

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sbp_compile.capture import load_model
from sbp_compile.capture.file_archive import MOST_UNPACKED
from sbp_compile.errors import InputError, ModelFileError, UnsupportedModelError
from tests.networks import Images, assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Everything(nn.Module):
    """Sizes, branches on them, loops, lists, dicts, in-place calls, a shared parameter, a plain tensor attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)])
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.offset = torch.arange(4.0)
        self.rounds = 2

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        for convolution in self.convolutions:
            x = torch.relu_(convolution(x))
        x = self.norm(x)
        if x.dim() == 4 and x.size(2) > 2:
            x = x * scale
        pooled = x.flatten(2).mean(2) + self.offset
        parts: list[Tensor] = []
        for index in range(self.rounds):
            pooled = self.second(self.first(pooled)) + index
            parts.append(pooled)
        rows = torch.cat(parts, 1).view(x.size(0), -1)
        grid = self.up(x).reshape(x.size(0), x.size(1) // 2, -1)
        return {"rows": rows / x.size(1), "grid": grid.to(torch.float64)}


def traced(module: nn.Module, *inputs: Tensor) -> Any:
    return torch.jit.trace(module.eval(), inputs, strict=False)  # type: ignore[no-untyped-call]


def scripted(module: nn.Module, *_: Tensor) -> Any:
    return torch.jit.script(module.eval())  # type: ignore[no-untyped-call]


def frozen(module: nn.Module, *_: Tensor) -> Any:
    return torch.jit.freeze(scripted(module))  # type: ignore[no-untyped-call]


def captured(script: Any, path: Path, **options: Any) -> ExportedProgram:
    torch.jit.save(script, path)  # type: ignore[no-untyped-call]
    return load_model(path, **options).exported_program


@pytest.mark.parametrize("make", [traced, scripted, frozen])
def test_the_graph_is_read_for_any_batch(make: Callable[..., Any], tmp_path: Path) -> None:
    """When this fails for a new torch, the methods of TorchScript's nodes changed: see torchscript_reader.py."""
    torch.manual_seed(0)
    net, x = Everything().eval(), torch.randn(2, 3, 8, 8)
    program = captured(make(net, x), tmp_path / "net.ts", example_inputs=x)
    for batch in (1, 5):
        y = torch.randn(batch, 3, 8, 8)
        got, wanted = program.module()(y), net(y)
        assert list(got) == list(wanted)
        for name in wanted:
            assert_close(wanted[name], got[name], 1e-6)
            assert got[name].dtype == wanted[name].dtype


def test_parameters_keep_their_names_and_stay_shared(tmp_path: Path) -> None:
    state = captured(
        scripted(Everything()), tmp_path / "net.ts", example_inputs=torch.randn(2, 3, 8, 8)
    ).state_dict
    assert {"convolutions.0.weight", "norm.running_var", "first.weight"} <= state.keys()
    assert state["first.weight"].data_ptr() == state["second.weight"].data_ptr()


def test_a_trace_brings_the_shapes_of_its_inputs(tmp_path: Path) -> None:
    torch.jit.save(traced(Images(), torch.randn(1, 2, 9, 7)), tmp_path / "net.ts")  # type: ignore[no-untyped-call]
    loaded = load_model(tmp_path / "net.ts")
    assert loaded.example_inputs is not None
    assert loaded.example_inputs[0].shape == (1, 2, 9, 7)
    assert loaded.own is not None


def test_integers_of_a_trace_are_asked_for(tmp_path: Path) -> None:
    script = traced(nn.Embedding(10, 3), torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(InputError, match=r"add --input input=2x5:int64:0..HIGHEST, or --inputs data.npz"):
        captured(script, tmp_path / "net.ts")


def test_inputs_of_a_script_are_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="brings no example inputs: add --input x=SHAPE:DTYPE"):
        captured(scripted(Images()), tmp_path / "net.ts")


def test_sizes_that_a_trace_made_tensors_of_are_results_as_tensors(tmp_path: Path) -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.size(0) * torch.ones(1), x.size(1), (x / x.size(0), x + x.shape[1] // 2)

    x = torch.randn(3, 5)
    script = traced(Sizes(), x)
    got, wanted = captured(script, tmp_path / "net.ts").module()(x), script(x)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(torch.as_tensor(got[1]), wanted[1])
    assert torch.equal(got[2][0], wanted[2][0])
    assert torch.equal(got[2][1], wanted[2][1])


def test_a_number_in_a_trace_decides_no_dtype(tmp_path: Path) -> None:
    """The trace writes it as a float64 tensor, and torch's interpreter reads that as a number again."""

    class Numbers(nn.Module):
        def forward(self, x: Tensor) -> Any:
            y = x.to(torch.int64)
            return (
                y * 2.5,
                y + 0.5,
                y - 0.5,
                0.5 - y,
                y / 2.5,
                x.sum() * 1.5,
                y.sum() * 2,
                torch.arange(3) ** 0.5,
            )

    script, x = traced(Numbers(), torch.ones(3)), torch.rand(3)
    got, wanted = captured(script, tmp_path / "net.ts").module()(x), script(x)
    assert (
        [value.dtype for value in got]
        == [value.dtype for value in wanted]
        == [torch.float32] * 6
        + [
            torch.int64,
            torch.float32,
        ]
    )
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


class Collecting(nn.Module):
    def forward(self, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor], Tensor | None]:
        found = [x]
        by_name = {"x": x}
        for index in range(3):
            found.append(found[index] * 2)
            by_name[str(index)] = found[-1]
        found[0] = x + 1
        return found, by_name, None


def test_containers_that_grow_are_returned_whole(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    got = captured(scripted(Collecting()), tmp_path / "net.ts", example_inputs=x).module()(x)
    wanted = Collecting()(x)
    assert len(got[0]) == 4
    assert list(got[1]) == ["x", "0", "1", "2"]
    assert got[2] is None
    assert all(torch.equal(a, b) for a, b in zip(got[0], wanted[0], strict=True))


def test_state_that_changes_in_training_alone_is_no_obstacle(tmp_path: Path) -> None:
    class Warming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = 0

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.steps += 1
            return x * 2

    x = torch.randn(2, 3)
    assert torch.equal(captured(scripted(Warming()), tmp_path / "w.ts", example_inputs=x).module()(x), x * 2)


class OnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return x + 1
        return x


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Saving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "stolen.pt")
        return x


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(1) != 3:
            raise ValueError("three channels, please")
        return x


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            OnData(),
            r"control flow \(aten::Bool\) depends on the values of a tensor \(.*test_torchscript.py, line \d+\)",
        ),
        (Counting(), r"'prim::SetAttr': the network changes its own state"),
        (Saving(), r"operation 'aten::save' is not one that a model file may call"),
        (Raising(), r"raises an exception on the example inputs: .*three channels, please"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(module: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        captured(scripted(module), tmp_path / "net.ts", example_inputs=torch.randn(2, 2))
    assert not list(Path.cwd().glob("stolen.pt"))


# Files made to harm


class Setting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.training = False

    @torch.jit.export  # type: ignore[untyped-decorator]
    def __getstate__(self) -> tuple[Tensor, bool]:
        return torch.ones(1), self.training

    @torch.jit.export  # type: ignore[untyped-decorator]
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.training = state[1]
        torch.save(state[0], "stolen.pt")

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_code_that_would_run_on_loading_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFileError, match="defines __getstate__, code that runs on loading"):
        captured(scripted(Setting()), tmp_path / "net.ts", example_inputs=torch.ones(1))
    assert [path.name for path in tmp_path.iterdir()] == ["net.ts"]


@pytest.fixture(scope="module")
def benign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("scripts") / "net.ts"
    torch.jit.save(traced(nn.Linear(4, 4), torch.ones(1, 4)), path)  # type: ignore[no-untyped-call]
    return path


def changed(source: Path, path: Path, **changes: bytes | Callable[[bytes], bytes]) -> Path:
    """Copy an archive with some records changed; their names have `_` for each `/` and `.`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            key = (
                LINEAR if name.endswith(".py") else name.partition("/")[2].replace("/", "_").replace(".", "_")
            )
            change = changes.pop(key, content)
            new.writestr(name, change(content) if callable(change) else change)
        for name, change in changes.items():
            assert isinstance(change, bytes)
            new.writestr(f"net/{name}", change)
    return path


LINEAR = "the code"  # its record's name depends on which classes torch has met before


class Payload:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize("record", ["data_pkl", "constants_pkl", "traced_inputs_pkl"])
def test_a_pickle_that_would_run_code_runs_none(
    record: str, benign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = changed(benign, tmp_path / "net.ts", **{record: pickle.dumps([Payload()], protocol=2)})
    if record == "traced_inputs_pkl":  # of which the shapes are read, and nothing is made
        with pytest.raises(InputError, match="brings no example inputs"):
            load_model(path)
    else:
        with pytest.raises(ModelFileError, match=r"refers to '.*', which no TorchScript archive needs"):
            load_model(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.ts"]


def claim(count: int) -> Callable[[bytes], bytes]:
    """A pickle in which the weight's storage and first axis have more entries than the file holds."""

    def change(content: bytes) -> bytes:
        size, rows = count.to_bytes(4, "little"), (count // 4).to_bytes(4, "little")
        found = content.replace(b"K\x10t", b"J" + size + b"t").replace(
            b"(K\x04K\x04t", b"(J" + rows + b"K\x04t", 1
        )
        assert found != content
        return found

    return change


def custom_class(content: bytes) -> bytes:
    return b"\x80\x02c__torch__.torch.classes.quantized\nLinearPackedParamsBase\n)\x81."


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "storage": ({"data_pkl": claim(2**28)}, r"storage '\d' needs 1073741824 bytes; its record has 64"),
    "tensor": (
        {"data_pkl": lambda old: old.replace(b"(K\x04K\x04t", b"(K\x08K\x04t", 1)},
        r"a tensor of shape \[8, 4\] .* does not fit its storage of 16",
    ),
    "custom class": (
        {"data_pkl": custom_class},
        "object of the C\\+\\+ class 'torch.classes.quantized.Linear",
    ),
    "deep": ({"data_pkl": b"\x80\x02N" + b"\x85" * 100_000 + b"."}, "nests more than 200 levels"),
    "circle": ({"data_pkl": b"\x80\x02]q\x00h\x00a."}, "nests more than 200 levels"),
    "memo": ({"data_pkl": b"\x80\x02Nr\xff\xff\xff\x7f."}, "remembers value 2147483647"),
    "no pickle": ({"data_pkl": b"hello"}, "its pickle is damaged"),
    "no code": ({LINEAR: b"class (:"}, "is not TorchScript code"),
    "deep code": (
        {LINEAR: b"x = " + b"(" * 5000 + b")" * 5000},
        "is not TorchScript code",
    ),
    "other code": (
        {LINEAR: b"import os\nos.system('true')"},
        "cannot load the TorchScript",
    ),
    "program": ({"run.sh": b"rm"}, "record 'run.sh' is none of a TorchScript archive"),
    "traversal": ({"../../data/7": b"1234"}, "is not a plain path"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_crafted_archives_are_refused(kind: str, benign: Path, tmp_path: Path) -> None:
    changes, message = HOSTILE[kind]
    with pytest.raises(ModelFileError, match=message):
        load_model(changed(benign, tmp_path / "net.ts", **changes))


def test_a_zip_bomb_is_refused_by_what_it_claims(benign: Path, tmp_path: Path) -> None:
    path = changed(benign, tmp_path / "net.ts")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/code/bomb.py", bytes(MOST_UNPACKED + 1))
    with pytest.raises(ModelFileError, match="compressed records claim"):
        load_model(path)


def test_cut_and_flipped_files_are_refused_or_the_same(benign: Path, tmp_path: Path) -> None:
    content, generator = benign.read_bytes(), random.Random(0)
    wanted, path = load_model(benign).sha256, tmp_path / "net.ts"
    for length in range(1, len(content), len(content) // 15):
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileError):
            load_model(path)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            assert load_model(path).sha256 == wanted
        except (ModelFileError, InputError):
            refused += 1
    assert refused > 20


def test_a_buffer_is_enough(benign: Path) -> None:
    from sbp_compile.capture.torchscript import load_torchscript

    assert load_torchscript(io.BytesIO(benign.read_bytes())).network.state_dict().keys() == {"weight", "bias"}
