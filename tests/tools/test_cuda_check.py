import importlib.util
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_and_claims_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["cuda_check.py", str(ROOT / "models" / "lenet5-sbp-digits.pt")])
    assert load_tool("cuda_check").main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "cuda_check: torch sees no CUDA device: nothing was checked, nothing was timed\n"
