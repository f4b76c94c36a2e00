"""Weights without a network: found in whatever they are wrapped in, loaded strictly, unpickled without running code."""

import argparse
import pickle
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sbp_compile.capture import load_model
from sbp_compile.errors import (
    CompileError,
    InputError,
    ModelFileError,
    NarrowedWeightsWarning,
    PickleTrustWarning,
    UsageError,
)

X = torch.linspace(-1, 1, 12).reshape(2, 6)


class Net(nn.Module):
    def __init__(self, width: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, width, bias=bias)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {
        "state_dict": state,
        "epoch": 3,
        "optimizer": {"state": {}, "param_groups": []},
    },
    "model": lambda state: {"model": state, "best": 0.93, "names": ["cat", "dog"]},
    "DDP": lambda state: prefixed(state, "module."),
    "a moving average": lambda state: {"n_averaged": torch.tensor(3), **prefixed(state, "module.")},
    "torch.compile": lambda state: {"model": prefixed(state, "_orig_mod.")},
    "both": lambda state: prefixed(state, "_orig_mod.module."),
    "both, the other way": lambda state: prefixed(state, "module._orig_mod."),
    "a wrapper of one's own": lambda state: {"state_dict": prefixed(state, "model.")},
    "a part compiled": lambda state: {
        key.replace("norm.", "norm._orig_mod."): value for key, value in state.items()
    },
    "before torch 0.4.1": lambda state: {
        key: value for key, value in state.items() if "num_batches" not in key
    },
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_found_in_whatever_they_are_wrapped_in(
    kind: str, old: bool, net: Net, tmp_path: Path
) -> None:
    torch.save(WRAPPED[kind](net.state_dict()), tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    loaded = load_model(tmp_path / "w.pt", arch=Net, example_inputs=X)
    assert torch.equal(loaded.exported_program.module()(X), net(X))


def test_safetensors_are_loaded_by_content(net: Net, tmp_path: Path) -> None:
    safetensors.torch.save_file(prefixed(net.state_dict(), "module."), tmp_path / "w.pt")
    loaded = load_model(tmp_path / "w.pt", arch=Net, example_inputs={"x": X})
    assert torch.equal(loaded.exported_program.module()(X), net(X))
    assert loaded.own is not None
    assert torch.equal(loaded.own(X), net(X))


def test_a_modules_own_name_module_is_no_prefix(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    wrapper = Wrapper()
    torch.save(wrapper.state_dict(), tmp_path / "w.pt")
    got = load_model(tmp_path / "w.pt", arch=Wrapper, example_inputs=X).exported_program.module()(X)
    assert torch.equal(got, wrapper(X))


def state(net: Net, **changes: Any) -> dict[str, Any]:
    return {**net.state_dict(), **changes}


WRONG: dict[str, tuple[Callable[[Net], Any], dict[str, Any], type[CompileError], str]] = {
    "no factory": (
        state,
        {},
        UsageError,
        r"weights without a network \(9 tensors: first.weight, .*add --arch",
    ),
    "missing": (
        lambda net: {key: value for key, value in net.state_dict().items() if not key.startswith("first")},
        {"arch": Net},
        InputError,
        r"do not fit .*Net: 'first.weight', 'first.bias' missing from the file",
    ),
    "left over": (
        lambda net: state(net, **{f"head.{number}": torch.ones(1) for number in range(5)}),
        {"arch": Net},
        InputError,
        r"'head.0', 'head.1', 'head.2' and 2 more not in the network \(the file has 14 tensors, the network 9\)",
    ),
    "shapes": (
        state,
        {"arch": Net, "arch_args": {"width": 16}},
        InputError,
        r"first.weight \[8, 6\] instead of \[16, 6\], .* and 4 more: give the sizes of the training with --arch-args",
    ),
    "kinds": (
        lambda net: state(net, **{"first.bias": torch.ones(8, dtype=torch.complex64)}),
        {"arch": Net},
        InputError,
        "first.bias is torch.complex64 in the file and torch.float32 in the network",
    ),
    "arguments of nothing": (
        state,
        {"arch_args": {"width": 16}},
        UsageError,
        "--arch-args are arguments of a factory: name it with --arch",
    ),
    "a file of source": (
        state,
        {"arch": "nets/net.py:Net"},
        UsageError,
        "'nets/net.py' is no name of a module, as in an import: package.module for package/module.py",
    ),
    "several": (
        lambda net: {"model": net.state_dict(), "ema": net.state_dict()},
        {"arch": Net},
        UsageError,
        "holds several state dicts: 'model', 'ema'; say which with --checkpoint-key",
    ),
    "no such key": (
        lambda net: {"model": net.state_dict()},
        {"arch": Net, "checkpoint_key": "ema"},
        UsageError,
        "--checkpoint-key 'ema': the file has 'model'",
    ),
    "no weights": (
        lambda net: {"epoch": 3},
        {"arch": Net},
        ModelFileError,
        "a dictionary of 'epoch', and no state",
    ),
    "a tensor": (
        lambda net: torch.ones(3),
        {"arch": Net},
        ModelFileError,
        "it holds a Tensor; expected a state dict",
    ),
    "no inputs": (
        state,
        {"arch": Net, "example_inputs": None},
        InputError,
        "brings no example inputs: add --input x=",
    ),
    "wrong input": (
        state,
        {"arch": Net, "example_inputs": {"x": X, "mask": X}},
        InputError,
        "has no input 'mask'; its inputs are x",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_or_missing_is_said_with_its_remedy(kind: str, net: Net, tmp_path: Path) -> None:
    make, options, error, message = WRONG[kind]
    torch.save(make(net), tmp_path / "w.pt")
    with pytest.raises(error, match=message):
        load_model(tmp_path / "w.pt", **{"example_inputs": X, **options})


def test_one_of_several_state_dicts_can_be_named(net: Net, tmp_path: Path) -> None:
    torch.save({"model": Net().state_dict(), "ema": net.state_dict()}, tmp_path / "w.pt")
    loaded = load_model(tmp_path / "w.pt", arch=Net, example_inputs=X, checkpoint_key="ema")
    assert torch.equal(loaded.exported_program.module()(X), net(X))


def test_weights_that_are_rounded_are_warned_of(net: Net, tmp_path: Path) -> None:
    torch.save(Net().double().state_dict(), tmp_path / "w.pt")
    message = r"'first.weight'.*: torch.float64 in the file, rounded to the torch.float32 of"
    with pytest.warns(NarrowedWeightsWarning, match=message):
        load_model(tmp_path / "w.pt", arch=Net, example_inputs=X)


# The factory


FACTORIES = {
    "form": ("tests.capture.test_checkpoint.Net", "must be package.module:factory"),
    "module": ("tests.nowhere:Net", "there is no module 'tests.nowhere'; run from the folder"),
    "name": ("tests.networks:Nat", "'tests.networks' has no 'Nat'; it has Masked, Images, PinnedBatch"),
    "kind": ("tests.networks:MASK", "is a Tensor, not a class or function"),
    "result": (
        "tests.networks:assert_close",
        r"missing a required argument: 'wanted'; give arguments as --arch-args",
    ),
    "no module": ("builtins:dict", "returned a dict; expected a torch.nn.Module"),
}


@pytest.mark.parametrize("kind", FACTORIES)
def test_a_factory_that_cannot_be_used_is_said_with_its_remedy(kind: str, net: Net, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")
    name, message = FACTORIES[kind]
    with pytest.raises(UsageError, match=message):
        load_model(tmp_path / "w.pt", arch=name, example_inputs=X)


def test_a_factory_of_the_current_folder_is_found(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_networks_of_today.py").write_text(
        "from tests.capture.test_checkpoint import Net\ndef make(width, *, bias): return Net(width, bias)\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.save(net.state_dict(), "w.pt")
    options = {"arch": "my_networks_of_today:make", "example_inputs": X}
    loaded = load_model("w.pt", arch_args={"width": 8, "bias": True}, **options)
    assert torch.equal(loaded.exported_program.module()(X), net(X))
    with pytest.raises(UsageError, match=r"make\(width, \*, bias\): missing a required argument: 'bias'"):
        load_model("w.pt", arch_args=[8], **options)


# Whole modules


def test_a_pickled_module_needs_trust_and_a_warning(net: Net, tmp_path: Path) -> None:
    torch.save({"model": net, "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ModelFileError, match=r"can run any code; if you trust .* add --trust-pickle"):
        load_model(tmp_path / "w.pt", example_inputs=X)
    with pytest.warns(PickleTrustWarning, match="runs whatever code its author put there, with your rights"):
        loaded = load_model(tmp_path / "w.pt", example_inputs=X, trust_pickle=True)
    assert torch.equal(loaded.exported_program.module()(X), net(X))


def test_a_checkpoint_with_other_objects_needs_trust(net: Net, tmp_path: Path) -> None:
    torch.save({"model": net.state_dict(), "options": argparse.Namespace(lr=0.1)}, tmp_path / "w.pt")
    with pytest.raises(ModelFileError, match=r"holds pickled objects \(argparse.Namespace\)"):
        load_model(tmp_path / "w.pt", arch=Net, example_inputs=X)
    with pytest.warns(PickleTrustWarning, match="argparse.Namespace"):
        load_model(tmp_path / "w.pt", arch=Net, example_inputs=X, trust_pickle=True)


def test_a_class_that_is_not_there_is_named(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(net, tmp_path / "w.pt")
    monkeypatch.delattr(sys.modules[Net.__module__], "Net")
    with (
        pytest.warns(PickleTrustWarning),
        pytest.raises(
            ModelFileError, match=r"Can't get attribute 'Net'.*run from the folder with the model's code"
        ),
    ):
        load_model(tmp_path / "w.pt", example_inputs=X, trust_pickle=True)


# Files made to harm


class Payload:
    """Touches a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched"),)


POSITIONS: dict[str, Callable[[Net], Any]] = {
    "module": lambda net: Payload(),
    "state dict": lambda net: state(net, extra=Payload()),
    "key": lambda net: {"state_dict": net.state_dict(), Payload(): 1},
    "checkpoint": lambda net: {"state_dict": net.state_dict(), "epoch": Payload()},
    "list": lambda net: {"model": net.state_dict(), "history": [[Payload()]]},
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_pickle_that_would_run_code_runs_none(
    position: str, old: bool, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(POSITIONS[position](net), "w.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ModelFileError, match="holds pickled objects"):
        load_model("w.pt", arch=Net, example_inputs=X)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_names_that_look_harmless_to_the_screen_are_still_not_unpickled(tmp_path: Path) -> None:
    """The screen's list is for messages; weights_only=True is what keeps code out."""
    call = b"\x80\x02ctorch._utils\n_import_dotted_name\nX\x02\x00\x00\x00os\x85R."
    (tmp_path / "bare.pt").write_bytes(call)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("w/data.pkl", call)
        archive.writestr("w/version", "3\n")
        archive.writestr("w/byteorder", "little")
    for name in ("bare.pt", "zip.pt"):
        with pytest.raises(ModelFileError, match="damaged or unsafe"):
            load_model(tmp_path / name, arch=Net, example_inputs=X)


def rewritten(path: Path, change: Callable[[str, bytes], tuple[str, bytes]], **options: Any) -> None:
    with zipfile.ZipFile(path) as old:
        records = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w", **options) as new:
        for name, content in records:
            new.writestr(*change(name, content))


def claims_more(name: str, content: bytes) -> tuple[str, bytes]:
    return name, content.replace(b"K\x30t", b"J\x00\x00\x00\x70t") if name.endswith("data.pkl") else content


def climbs(name: str, content: bytes) -> tuple[str, bytes]:
    return (f"{name.partition('/')[0]}/../../../{name}" if name.endswith("/version") else name), content


def test_crafted_archives_are_refused(net: Net, tmp_path: Path) -> None:
    cases = {
        r"storage '0' needs 7516192768 bytes; its record has 192": (claims_more, {}),
        r"is not a plain path": (climbs, {}),
        r"is compressed or encrypted": (lambda *record: record, {"compression": zipfile.ZIP_DEFLATED}),
    }
    for message, (change, options) in cases.items():
        torch.save(net.state_dict(), tmp_path / "w.pt")
        rewritten(tmp_path / "w.pt", change, **options)
        with pytest.raises(ModelFileError, match=message):
            load_model(tmp_path / "w.pt", arch=Net, example_inputs=X)


@pytest.mark.parametrize("kind", ["zip", "old format", "safetensors"])
def test_cut_and_flipped_files_give_an_error_of_ours(kind: str, net: Net, tmp_path: Path) -> None:
    path, generator = tmp_path / "w.pt", random.Random(0)
    if kind == "safetensors":
        safetensors.torch.save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    for length in range(0, len(content), len(content) // 15):
        path.write_bytes(content[:length])
        with pytest.raises(CompileError):
            load_model(path, arch=Net, example_inputs=X)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CompileError):  # without a factory, so that what loads stops there
            load_model(path)


def test_one_flipped_bit_of_a_weight_is_found_by_the_checksum(net: Net, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")
    weight = net.first.weight.detach().numpy().tobytes()
    damaged = weight[:5] + bytes([weight[5] ^ 1]) + weight[6:]
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes().replace(weight, damaged))
    with pytest.raises(ModelFileError, match="Bad CRC-32 for file 'w/data/0'"):
        load_model(tmp_path / "w.pt", arch=Net, example_inputs=X)


def test_a_claim_of_a_hundred_gigabytes_is_not_allocated(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[25000000000],"data_offsets":[0,100000000000]}}'
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ModelFileError, match="safetensors header is damaged"):
        load_model(tmp_path / "w.safetensors", arch=Net)


def test_the_payload_would_run_if_it_were_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above cannot pass for want of a payload."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Payload()))
    assert Path("touched").exists()


def test_weights_in_float8_are_widened(tmp_path: Path) -> None:
    net = Net()
    narrow = {
        key: value.to(torch.float8_e5m2) if value.is_floating_point() else value
        for key, value in net.state_dict().items()
    }
    safetensors.torch.save_file(narrow, tmp_path / "w.safetensors")
    loaded = load_model(tmp_path / "w.safetensors", arch=Net, example_inputs=torch.randn(2, 6))
    assert torch.equal(loaded.exported_program.state_dict["first.weight"], narrow["first.weight"].float())


@pytest.mark.parametrize("code", ["import sys\nsys.exit()", "import sys\ndef make(): sys.exit(0)"])
def test_a_script_that_ends_itself_is_no_success(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ends_itself", raising=False)
    (tmp_path / "ends_itself.py").write_text(code)
    torch.save(Net().state_dict(), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="SystemExit"):
        load_model(tmp_path / "w.pt", arch="ends_itself:make", example_inputs=torch.randn(2, 6))
