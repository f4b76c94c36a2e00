"""Weights and a readable module: the same function, ordinary layers, nothing overwritten that is not ours."""

import ast
import copy
import importlib.util
import keyword
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sbp_compile
from sbp_compile.emit import source_file
from sbp_compile.emit.source_file import is_unchanged, with_checksum
from sbp_compile.emit.source_text import identifier
from sbp_compile.errors import OutputError, UnsupportedModelError, VerificationError
from tests.networks import Images, Masked, assert_close


def loaded(path: Path) -> nn.Module:
    """The module of a generated file with its weights, as a user gets it."""
    spec = importlib.util.spec_from_file_location("generated", path.with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.Network()
    network.load_state_dict(load_file(path))
    return network


def saved(module: nn.Module, path: Path, *args: Any, **kwargs: Any) -> nn.Module:
    sbp_compile.compile(module, args, kwargs=kwargs).save(path)
    return loaded(path)


def test_it_computes_the_same_for_any_batch_in_train_and_eval_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Images().eval()
    network = saved(module, tmp_path / "small.safetensors", torch.randn(2, 2, 9, 11))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.py", "small.safetensors"]
    for training in (True, False):
        network.train(training)
        for batch in (1, 5):
            x = torch.randn(batch, 2, 9, 11)
            assert_close(module(x).detach(), network(x).detach())


class Network(nn.Module):
    """What a small network is made of: convolutions, a residual sum, a norm, a view, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.branch(x)
        return self.head(x.mean((2, 3)))


def test_it_reads_as_a_person_would_have_written_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved(Network().eval(), tmp_path / "small.safetensors", torch.randn(2, 3, 8, 8))
    text = (tmp_path / "small.py").read_text()
    assert (
        text[text.index("import torch") :]
        == '''import torch.nn.functional as F
from torch import nn


class Network(nn.Module):
    """The network; `forward` takes and gives what the original does."""

    def __init__(self):
        super().__init__()
        self.stem_0 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.branch_0 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        # stem
        x = F.relu(self.stem_0(x))
        # branch
        x = x + F.relu(self.branch_0(x))
        x = x.mean(dim=(2, 3))
        return self.head(x)
'''
    )


def test_gradients_reach_every_parameter_and_a_step_changes_the_result(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = saved(Network().eval(), tmp_path / "small.safetensors", torch.randn(2, 3, 8, 8)).train()
    before = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    x = torch.randn(4, 3, 8, 8)
    network(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    optimizer.step()
    assert not torch.equal(network(x), before(x))


def test_it_needs_torch_alone(tmp_path: Path) -> None:
    saved(Network().eval(), tmp_path / "small.safetensors", torch.randn(2, 3, 8, 8))
    tree = ast.parse((tmp_path / "small.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in imported
    } == {"torch"}
    code = "import sys; sys.modules['sbp_compile'] = None; import small; small.Network()"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert not found.returncode, found.stderr


class Nested(nn.Module):
    """Results in a dictionary, a list and a tuple; an argument that is no tensor; inputs in a list and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Masked()

    def forward(self, x: Tensor, pair: list[Tensor], flag: bool = True, *, scale: Tensor) -> dict[str, Any]:
        return {"y": self.body(x) * scale, "z": [pair[0] + pair[1], (pair[1],)], "n": None, "k": 3}


def test_arguments_and_results_are_nested_as_the_originals(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Nested().eval()
    pair = [torch.randn(4, 3), torch.randn(4, 3)]
    network = saved(
        module, tmp_path / "small.safetensors", torch.randn(4, 6), pair, True, scale=torch.tensor(2.0)
    )
    x, scale = torch.randn(4, 6), torch.tensor(0.5)
    wanted, got = module(x, pair, scale=scale), network(x, pair, scale=scale)
    assert_close(wanted["y"].detach(), got["y"].detach())
    assert torch.equal(wanted["z"][0], got["z"][0])
    assert torch.equal(got["z"][1][0], pair[1])
    assert (got["n"], got["k"]) == (None, 3)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 5, batch_first=True)
        self.norm = nn.LayerNorm(5)

    def forward(self, words: Tensor) -> Tensor:
        rows, (state, _) = self.lstm(self.embed(words))
        return self.norm(self.gru(rows)[0]) + state.sum()


def test_recurrent_layers_are_layers_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Recurrent().eval()
    network = saved(module, tmp_path / "small.safetensors", torch.randint(0, 20, (2, 7)))
    words = torch.randint(0, 20, (3, 7))
    assert_close(module(words).detach(), network(words).detach())
    kinds = {type(child).__name__ for child in network.children()}
    assert kinds == {"Embedding", "LSTM", "GRU", "LayerNorm"}


class Tied(nn.Module):
    """A layer that is used twice, and a weight that two different layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.table = nn.Embedding(9, 6)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x)))) + self.table(words)
        return nn.functional.linear(x, self.table.weight)


def test_what_was_shared_stays_shared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Tied().eval()
    x, words = torch.randn(4, 6), torch.randint(0, 9, (4,))
    network = saved(module, tmp_path / "small.safetensors", x, words)
    assert_close(module(x, words).detach(), network(x, words).detach())
    assert sorted(network.state_dict()) == ["table_weight", "twice.bias", "twice.weight"]


class Unlike(nn.Module):
    """Scalars that text must keep, an operator without a spelling, a constant with infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.softmax(x * 0.1 - (1 - x) ** -2.0 + self.mask, -1)
        return torch.roll(y, 1, 1) - torch.add(y, y, alpha=3) * (-y)


def test_numbers_and_operators_without_a_spelling_are_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Unlike().eval(), torch.randn(2, 4, 4) * 0.1
    network = saved(module, tmp_path / "small.safetensors", x)
    assert_close(module(x), network(x))
    assert not list(network.parameters())
    assert "torch.ops.aten.roll.default(" in (tmp_path / "small.py").read_text()


HOSTILE = 'x"""\\\nraise SystemExit #'


class Keyed(Masked):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {HOSTILE: super().forward(x)}


def test_keys_and_names_of_modules_and_files_cannot_smuggle_code_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Keyed().eval()
    compiled = sbp_compile.compile(module, torch.randn(4, 6))
    for node in compiled.program.graph.nodes:
        node.meta["module"] = f"{HOSTILE}.{HOSTILE}.{HOSTILE}"
    path = tmp_path / f"{HOSTILE}.safetensors"
    compiled.save(path)
    x = torch.randn(3, 6)
    assert_close(module(x)[HOSTILE].detach(), loaded(path)(x)[HOSTILE].detach())


@pytest.mark.parametrize("name", [HOSTILE, "class", "0.weight", "", "ünïcode", "None", "__class__", "a b"])
def test_any_name_becomes_one_that_python_takes(name: str) -> None:
    found = identifier(name, {"a_b"})
    assert found.isidentifier()
    assert found.isascii()
    assert not keyword.iskeyword(found)
    assert not found.startswith("_")
    assert found != "a_b"


def test_a_file_of_ours_is_replaced(tmp_path: Path) -> None:
    compiled = sbp_compile.compile(Masked().eval(), torch.randn(4, 6))
    for _ in range(2):
        compiled.save(tmp_path / "small.safetensors")
        assert is_unchanged((tmp_path / "small.py").read_text())


@pytest.mark.parametrize("content", ["import torch\n", "", with_checksum("x = 1\n") + "y = 2\n"])
def test_source_that_is_not_ours_or_was_changed_is_not_overwritten(content: str, tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(content)
    compiled = sbp_compile.compile(Masked().eval(), torch.randn(4, 6))
    with pytest.raises(
        OutputError, match="did not write, or that was changed since; give the output another"
    ):
        compiled.save(tmp_path / "small.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["small.py"]
    assert (tmp_path / "small.py").read_text() == content


def test_half_precision_goes_into_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Images().eval()
    sbp_compile.compile(module, torch.randn(2, 2, 9, 11)).save(tmp_path / "small.safetensors", fp16=True)
    network = loaded(tmp_path / "small.safetensors")
    assert {value.dtype for value in network.parameters()} == {torch.float16}
    x = torch.randn(3, 2, 9, 11)
    assert_close(module(x).detach(), network(x).detach(), 1e-2)


def test_a_file_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = sbp_compile.compile(Masked().eval(), torch.randn(4, 6))
    monkeypatch.setattr(source_file, "with_checksum", lambda text: text.replace("F.relu", "F.gelu"))
    with pytest.raises(VerificationError, match="output 'output_0' differs by"):
        compiled.save(tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())


def test_results_in_a_container_of_the_users_are_refused_in_one_line(tmp_path: Path) -> None:
    from collections import OrderedDict

    class Ordered(Masked):
        def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
            return OrderedDict(y=super().forward(x))

    compiled = sbp_compile.compile(Ordered().eval(), torch.randn(4, 6))
    with pytest.raises(UnsupportedModelError, match="a result of type OrderedDict has no text; write"):
        compiled.save(tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())
