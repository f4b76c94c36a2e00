import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from sbp_compile.nn import noise_layers
from sbp_compile.training import LeNet500300, Phase, Recipe, Task, load, train
from sbp_compile.training.checkpoint import read_state, write_state
from sbp_compile.training.loop import Conditions
from sbp_compile.training.recipes import Noise
from tests.training.conftest import idx_folder

__all__ = ["idx_folder"]
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    spec = importlib.util.spec_from_file_location("sweep", TOOLS / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(TOOLS))
    del sys.modules["sweep"]


class Silence:
    def step(self, *_):
        pass

    def epoch(self, record):
        pass


@pytest.fixture
def checkpoint(idx_folder, tmp_path):
    """A checkpoint of a network whose units' ratios go from 0.33 up to some tens, whatever training made of them."""
    path, data = tmp_path / "model.ckpt", f"folder:{idx_folder}"
    recipe = Recipe("lenet500300", Phase(1, batch=20), {"sbp": Noise(Phase(1, batch=20))})
    train(Task(load(data)), recipe, "sbp", Silence(), Conditions(checkpoint=path))
    state = read_state(path)
    state.about = {"network": "lenet500300", "method": "sbp", "dataset": data}
    model = LeNet500300()
    model.load_state_dict(state.module)
    for layer in noise_layers(model):
        with torch.no_grad():
            layer.log_sigma.copy_(torch.linspace(-4, 4, layer.num_features))
            layer.mu.fill_(-1.0)
    state.module = model.state_dict()
    write_state(state, path)
    return path


def test_every_criterion_gives_points_and_the_best_of_them_are_marked(
    tool, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tool, "SNR", (0.5, 20.0))
    output = tmp_path / "sweep.json"
    assert tool.main([str(checkpoint), "--budget", "0", "--criteria", "snr", "-o", str(output)]) == 0
    rows = json.loads(output.read_text())["points"]
    snr = [row["macs"] for row in rows if row["criterion"] == "snr"]
    assert len(snr) == len(tool.SNR)
    assert snr == sorted(snr, reverse=True)
    assert snr[0] > snr[-1]
    best = [(row["macs"], row["error"]) for row in rows if row["best"]]
    assert best
    for row in rows:
        assert any(macs <= row["macs"] and error <= row["error"] for macs, error in best)
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "best:" in capsys.readouterr().out


@pytest.mark.slow
def test_budgets_are_kept_and_files_are_timed(tool, checkpoint):
    task = tool.Task(str(checkpoint), None, 1, 1, 0.05)
    row = tool.measure(task, tool.Point("macs", 0.25))
    assert row["macs"] <= 0.25 * row["dense_macs"]
    assert row["seconds"] > 0
    assert row["speed_low"] <= row["speed"] <= row["speed_high"]


def test_a_point_is_best_where_no_other_is_better(tool):
    rows = [
        {"error": e, "macs": m} for e, m in ((1.0, 10), (2.0, 5), (2.0, 6), (3.0, 5), (0.5, 20), (1.0, 10))
    ]
    tool.mark_best(rows)
    assert [row["best"] for row in rows] == [True, True, False, False, True, True]


def test_bad_input_is_one_line_and_an_exit_code(tool, checkpoint, tmp_path, capsys):
    (tmp_path / "not.ckpt").write_bytes(b"nothing")
    assert tool.main([str(tmp_path / "not.ckpt"), "-o", str(tmp_path / "x.json")]) == 3
    state = read_state(checkpoint)
    state.about["method"] = "ssl"
    write_state(state, checkpoint)
    assert tool.main([str(checkpoint), "-o", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert "has no noise layers yet: give the checkpoint of a run with --method sbp or sbpa" in error
    assert error.count("\n") == 2
    assert not (tmp_path / "x.json").exists()


def test_without_ray_a_cluster_is_refused_with_what_to_install(
    tool, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert tool.main([str(checkpoint), "--ray", "auto", "-o", str(tmp_path / "x.json")]) == 2
    assert "pip install 'sbp-compile[ray]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_local_ray_gives_the_points_of_one_process(tool, checkpoint, tmp_path):
    pytest.importorskip("ray")
    common = [str(checkpoint), "--budget", "0", "--criteria", "bmrs"]
    files = [tmp_path / "alone.json", tmp_path / "ray.json"]
    assert tool.main([*common, "-o", str(files[0])]) == 0
    assert tool.main([*common, "--ray", "local", "-o", str(files[1])]) == 0
    alone, over_ray = (json.loads(path.read_text())["points"] for path in files)
    assert alone == over_ray
