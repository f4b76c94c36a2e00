"""The .pt2 file: an exported program with the original's call structure."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sbp_compile
from sbp_compile.compiler import compile_file
from tests.networks import Images, Masked, assert_close


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Masked()

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        return {"y": self.body(x) * scale}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module, path = Keyed().eval(), tmp_path_factory.mktemp("pt2") / "small.pt2"
    compiled = sbp_compile.compile(module, torch.randn(1, 6), kwargs={"scale": torch.tensor(2.0)})
    compiled.save(path)
    assert compiled.report.verification is not None
    assert compiled.report.verification.runtimes == ("torch",)
    return module, path


def test_torch_loads_it_and_it_takes_any_batch(saved: tuple[nn.Module, Path]) -> None:
    module, path = saved
    loaded = torch.export.load(path).module()
    for batch in (1, 2, 5):
        x, scale = torch.randn(batch, 6), torch.tensor(3.0)
        assert_close(module(x, scale=scale)["y"].detach(), loaded(x, scale=scale)["y"].detach())


def test_it_is_a_model_file_that_compiles_again(saved: tuple[nn.Module, Path]) -> None:
    loaded = sbp_compile.load_model(saved[1])
    assert loaded.example_inputs is not None
    assert loaded.example_inputs[0].shape == (1, 6)
    assert list(loaded.kwargs) == ["scale"]
    again = compile_file(loaded)
    assert [entry.name for entry in again.program.inputs] == ["x", "scale"]
    assert [layer.kept for layer in again.report.layers] == [4, 3]


def test_dynamic_height_and_width_stay_dynamic(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, dim = Images(), torch.export.Dim
    shapes = ({0: dim("batch"), 2: dim("height", min=4), 3: dim("width", min=4)},)
    sbp_compile.compile(module, torch.randn(2, 2, 9, 11), dynamic_shapes=shapes).save(tmp_path / "small.pt2")
    x = torch.randn(3, 2, 7, 5)
    assert_close(module(x).detach(), torch.export.load(tmp_path / "small.pt2").module()(x).detach())
