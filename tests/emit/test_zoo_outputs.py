"""Every network of the zoo through the outputs that are spelled anew: TorchScript, and source with weights."""

from pathlib import Path

import pytest
import torch

import sbp_compile
from sbp_compile.nn import noise_layers
from tests.zoo import ZOO, masked_network


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZOO)
def test_it_is_written_as_torchscript_and_as_source(name: str, tmp_path: Path) -> None:
    architecture = ZOO[name]
    network = next(
        made
        for placement in ("before norm", "hidden")
        if noise_layers(made := masked_network(architecture, placement, 0.5))
    )
    compiled = sbp_compile.compile(network, architecture.example(), dynamic_batch=architecture.dynamic_batch)
    for suffix in (".ts", ".safetensors"):
        compiled.save(tmp_path / f"small{suffix}")
    assert torch.jit.load(tmp_path / "small.ts") is not None
    assert (tmp_path / "small.py").read_text().count("torch.ops.") <= 4
