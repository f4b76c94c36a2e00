"""The TorchScript file: any batch, the original's call, and torch alone to run it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sbp_compile
from sbp_compile.emit import torchscript
from sbp_compile.errors import UnsupportedModelError, VerificationError
from tests.networks import Images, Masked, PinnedBatch, assert_close

# torch's note that TorchScript is old
pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit:DeprecationWarning")


def saved(module: nn.Module, path: Path, *args: Any, **kwargs: Any) -> torch.jit.ScriptModule:
    """What plain torch loads of the compiled module."""
    sbp_compile.compile(module, args, kwargs=kwargs).save(path)
    return torch.jit.load(path)


@pytest.mark.parametrize("suffix", [".ts", ".pt"])
def test_it_computes_the_same_for_any_batch(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Images().eval()
    script = saved(module, tmp_path / f"small{suffix}", torch.randn(2, 2, 9, 11))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 2, 9, 11)
        assert_close(module(x).detach(), script(x))


def test_it_is_frozen_and_holds_the_small_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    script = saved(Masked().eval(), tmp_path / "small.ts", torch.randn(4, 6))
    assert not list(script.parameters())
    weights = [
        node.t("value").shape
        for node in script.graph.findAllNodes("prim::Constant")
        if node.kindOf("value") == "t"
    ]
    assert (4, 6) in weights
    assert (8, 6) not in weights


def test_torch_alone_runs_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Masked().eval(), torch.randn(5, 6)
    saved(module, tmp_path / "small.ts", torch.randn(4, 6))
    torch.save(x, tmp_path / "x.pt")
    code = """
import sys
sys.modules["sbp_compile"] = sys.modules["passes"] = None
import torch
torch.save(torch.jit.load("small.ts")(torch.load("x.pt")), "y.pt")
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert not found.returncode, found.stderr
    assert_close(module(x).detach(), torch.load(tmp_path / "y.pt"))


class Nested(nn.Module):
    """A dictionary of results; positional and keyword arguments, and one that is no tensor in between."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Masked()

    def forward(self, x: Tensor, flag: bool, pair: list[Tensor], *, scale: Tensor) -> dict[str, Tensor]:
        assert flag
        return {"y": self.body(x) * scale, "z": pair[0] + pair[1]}


def test_arguments_and_results_are_nested_as_the_originals(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Nested().eval()
    pair = [torch.randn(4, 3), torch.randn(4, 3)]
    script = saved(module, tmp_path / "small.ts", torch.randn(4, 6), True, pair, scale=torch.tensor(2.0))
    x, scale, pair = torch.randn(3, 6), torch.tensor(0.5), [torch.randn(3, 3), torch.randn(3, 3)]
    results = script(x, pair, scale)
    assert set(results) == {"y", "z"}
    for name, wanted in module(x, True, pair, scale=scale).items():
        assert_close(wanted.detach(), results[name])
    assert [value.debugName().split(".")[0] for value in script.graph.inputs()][1:] == ["x", "pair", "scale"]


class Token(nn.Module):
    """A learned token in front of a sequence: the batch is a size that the graph reads."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.body = Masked()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.body(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))
        return rows + torch.arange(x.shape[1] + 1).reshape(-1, 1)


def test_sizes_that_the_graph_reads_stay_dynamic(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, path = Token().eval(), tmp_path / "small.ts"
    dim = torch.export.Dim
    shapes = ({0: dim("batch"), 1: dim("length")},)
    sbp_compile.compile(module, torch.randn(2, 5, 6), dynamic_shapes=shapes).save(path)
    script = torch.jit.load(path)
    for batch, length in ((1, 5), (3, 2)):
        x = torch.randn(batch, length, 6)
        assert_close(module(x).detach(), script(x))


@pytest.mark.parametrize("verify", [True, False])
def test_a_size_that_tracing_froze_is_refused(
    verify: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Freezing(fx.Interpreter):
        pass

    monkeypatch.setattr(torchscript, "TrackingSizes", Freezing)
    compiled = sbp_compile.compile(Token().eval(), torch.randn(2, 5, 6), verify=verify)
    with pytest.raises(UnsupportedModelError, match=r"tracing froze a size: .* shapes \[\[1, 5, 6\]\]"):
        compiled.save(tmp_path / "small.ts")
    assert not list(tmp_path.iterdir())


def test_a_network_with_a_pinned_batch_keeps_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.warns(sbp_compile.errors.BatchPinnedWarning):
        script = saved(PinnedBatch().eval(), tmp_path / "small.ts", torch.randn(2, 6))
    assert script(torch.randn(2, 6)).shape == (2, 3)


class Mixed(Masked):
    def forward(self, x: Tensor) -> tuple[Tensor, None, int]:
        return super().forward(x), None, 3


def test_results_that_torchscript_does_not_know_are_refused_in_one_line(tmp_path: Path) -> None:
    compiled = sbp_compile.compile(Mixed().eval(), torch.randn(4, 6))
    with pytest.raises(UnsupportedModelError, match=r"TorchScript cannot express .*write \.pt2 or") as found:
        compiled.save(tmp_path / "small.ts")
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = sbp_compile.compile(Masked().eval(), torch.randn(4, 6))
    with torch.no_grad():
        compiled.module.network.get_parameter("second_bias").add_(1.0)
    with pytest.raises(VerificationError, match=r"output 'output_0' differs by .* in torch"):
        compiled.save(tmp_path / "small.ts")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fp16_io", [False, True])
def test_it_can_be_halved(fp16_io: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Images().eval()
    compiled = sbp_compile.compile(module, torch.randn(2, 2, 9, 11))
    compiled.save(tmp_path / "small.ts", fp16=True, fp16_io=fp16_io)
    x = torch.randn(3, 2, 9, 11)
    result = torch.jit.load(tmp_path / "small.ts")(x.half() if fp16_io else x)
    assert result.dtype == (torch.float16 if fp16_io else torch.float32)
    assert_close(module(x).detach(), result, 1e-2)
