"""The benchmark on CUDA: what of it can be held without a GPU."""

import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import sbp_compile

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_cuda


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        network[0].weight[::2] = 0.0
    return sbp_compile.compile(network, torch.rand(2, 8))


def test_without_a_gpu_it_says_so_and_claims_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_cuda.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "bench_cuda: torch sees no CUDA device: nothing was checked, nothing was timed\n"


@pytest.mark.parametrize("kind", bench_cuda.KINDS, ids=lambda kind: kind.name)
def test_both_files_of_each_arithmetic_are_the_same_function(kind, compiled, tmp_path):
    files = bench_cuda.onnx_files(compiled, tmp_path, kind)
    from tests.networks import run_onnx

    x = torch.rand(5, 8)
    (dense,), (small,) = run_onnx(files["dense"], x), run_onnx(files["small"], x)
    bound = 1e-2 if kind.dtype == torch.float16 else 1e-5
    assert (dense - small).abs().max() <= bound * dense.abs().max()
    assert files["small"].stat().st_size < files["dense"].stat().st_size


def test_a_proof_without_cuda_is_no_proof_for_it(compiled, tmp_path):
    compiled.save(tmp_path / "small.onnx")
    with pytest.raises(bench_cuda.UsageError, match="could not start its CUDA provider"):
        bench_cuda.proven_on_cuda(compiled)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts_are_timed_in_turns(compiled):
    modules = bench_cuda.scripts(compiled, torch.float32, torch.device("cpu"))
    x = torch.rand(4, 8)
    torch.testing.assert_close(modules["dense"](x), modules["small"](x))

    def slow(value):
        time.sleep(1e-3)
        return value

    waits = []
    dense, small, (ratio, low, high) = bench_cuda.compare_modules(
        {"dense": slow, "small": lambda value: value}, x, 0.05, lambda: waits.append(None)
    )
    assert dense >= 1e-3 > small
    assert ratio >= low > 5
    assert high >= ratio
    assert waits


def test_tf32_is_put_back_whatever_happens():
    before = torch.backends.cudnn.allow_tf32
    inside = []

    def fail():
        with bench_cuda.tf32(allowed=not before):
            inside.append(torch.backends.cudnn.allow_tf32)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [not before]
    assert torch.backends.cudnn.allow_tf32 is before
