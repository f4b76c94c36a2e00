import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sbp_compile.capture import load_model
from sbp_compile.compiler import compile_file
from sbp_compile.training import LeNet500300, load, predict, to_tensor

TOOL = Path(__file__).parents[2] / "tools" / "train.py"
OWN = """
from torch import nn
def network():
    return nn.Sequential(nn.Conv2d(1, 6, 5, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                         nn.Linear(96, 16), nn.ReLU(), nn.Linear(16, 10))
"""


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOL.parent))
    spec = importlib.util.spec_from_file_location("train_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(TOOL.parent))


def options(folder, output, *more, network=("lenet500300",)):
    short = ["--dense-epochs", "1", "--epochs", "1", "--no-figures"]
    return [*network, "--dataset", f"folder:{folder}", *short, "-o", str(output), *more]


def test_one_command_writes_a_model_a_log_and_a_checkpoint(tool, idx_folder, tmp_path, capsys):
    output = tmp_path / "model.pt"
    assert tool.main(options(idx_folder, output)) == 0
    assert "times fewer multiply-adds" in capsys.readouterr().out
    log = json.loads((tmp_path / "model.json").read_text())
    assert [epoch["phase"] for epoch in log["epochs"]] == ["dense", "sbp"]
    assert log["epochs"][-1]["kept"] == log["kept"]
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert checkpoint["finished"]
    model = LeNet500300().eval()
    model.load_state_dict(checkpoint["module"])
    images = to_tensor(load(f"folder:{idx_folder}").test_images)
    saved = load_model(output)
    torch.testing.assert_close(saved.exported_program.module()(images), predict(model, images))
    torch.testing.assert_close(saved.example_inputs[0], images[:2])


@pytest.mark.parametrize(
    "method", ["sbp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ssl", "sparse-vd"))]
)
def test_a_network_of_ones_own_trains_draws_and_compiles(tool, idx_folder, tmp_path, monkeypatch, method):
    (tmp_path / "own_network.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    more = ["--method", method, "--pressure", "30"]
    own = options(idx_folder, "own.pt", *more, network=("--model", "own_network:network"))
    own.remove("--no-figures")
    assert tool.main(own) == 0
    names = {path.name for path in tmp_path.glob("own.*")}
    assert names == {"own.pt", "own.json", "own.ckpt", "own.curves.png", "own.units.png"}
    compiled = compile_file(load_model("own.pt"))
    assert compiled.report.verification is not None


def test_pretraining_is_shared_between_methods(tool, idx_folder, tmp_path):
    dense = tmp_path / "dense.pt"
    assert tool.main(options(idx_folder, dense, "--method", "dense")) == 0
    more = ["--method", "ssl", "--pretrained", str(dense.with_suffix(".ckpt"))]
    assert tool.main(options(idx_folder, tmp_path / "ssl.pt", *more)) == 0
    logs = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("dense", "ssl")]
    assert logs[0]["masked_error"] == logs[1]["dense_error"]
    assert logs[0]["epochs"] == logs[1]["epochs"][:1]


def test_the_dense_method_has_the_phase_that_is_asked_for(tool, idx_folder, tmp_path):
    more = ["--method", "dense", "--epochs", "2", "--batch", "10"]
    assert tool.main(options(idx_folder, tmp_path / "dense.pt", *more)) == 0
    log = json.loads((tmp_path / "dense.json").read_text())
    assert [epoch["phase"] for epoch in log["epochs"]] == ["dense", "dense"]
    assert log["recipe"]["dense"]["batch"] == 10


def test_a_network_without_anything_left_has_no_number_for_its_ratio(tool, idx_folder, tmp_path):
    more = ["--pressure", "1000", "--learning-rate", "0.1", "--random-labels", "--batch", "2"]
    assert tool.main(options(idx_folder, tmp_path / "none.pt", *more)) == 0
    log = json.loads((tmp_path / "none.json").read_text())
    assert log["kept"] == [0, 0, 0]
    assert log["mac_ratio"] is None
    assert not any(isinstance(v, float) and math.isinf(v) for v in log.values())
    assert compile_file(load_model(tmp_path / "none.pt")).report.after.macs == 0


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--epochs", "0"], 2, "--epochs (=0) must be at least 1"),
        (["--learning-rate", "nan"], 2, "--learning-rate (=nan) must be a positive number"),
        (["--dataset", "folder:nowhere"], 4, "nowhere/train-images-idx3-ubyte.gz is missing"),
        (["--dataset", "cifar10"], 4, "cifar-10-binary.tar.gz is missing"),
        (["-o", "no/such/folder/model.pt"], 2, "does not exist"),
        (["--model", "a:b"], 2, "one of them"),
        (["--pretrained", "nothing.ckpt"], 3, "nothing.ckpt cannot be read"),
    ],
)
def test_bad_input_is_one_line_an_exit_code_and_nothing_written(
    tool, idx_folder, tmp_path, capsys, change, code, message
):
    output = tmp_path / "out" / "model.pt"
    output.parent.mkdir()
    assert tool.main(options(idx_folder, output) + change) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(output.parent.iterdir()) == []


def test_missing_matplotlib_is_said_before_training(tool, idx_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    own = options(idx_folder, tmp_path / "m.pt")
    own.remove("--no-figures")
    assert tool.main(own) == 2
    assert "pip install matplotlib, or pass --no-figures" in capsys.readouterr().err
    assert list(tmp_path.glob("m.*")) == []


def test_images_that_do_not_fit_the_network_are_refused(tool, idx_folder, tmp_path, capsys):
    assert tool.main(options(idx_folder, tmp_path / "m.pt", network=("vgg-like",))) == 2
    assert (
        "vgg-like takes images of shape (3, 32, 32), the data set has (1, 28, 28)" in capsys.readouterr().err
    )


def test_ctrl_c_is_a_line_and_an_exit_code(tool, idx_folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(tool, "train", interrupt)
    assert tool.main(options(idx_folder, tmp_path / "m.pt")) == 130
    assert capsys.readouterr().err == "train.py: interrupted; --resume goes on from the last checkpoint\n"


def start(arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, TOOL, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_bits(tool, idx_folder, tmp_path, capsys):
    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    steps = ["--dense-epochs", "4", "--epochs", "8", "--batch", "4", "--checkpoint-every", "0"]
    assert tool.main(options(idx_folder, whole, *steps)) == 0
    process = start(options(idx_folder, killed, *steps))
    wait_for(killed.with_suffix(".ckpt"))
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not killed.exists()
    assert tool.main(options(idx_folder, killed, *steps)) == 2
    assert "go on with --resume, or remove it" in capsys.readouterr().err
    assert tool.main(options(idx_folder, killed, *steps, "--resume", "--seed", "1")) == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err
    assert tool.main(options(idx_folder, killed, *steps, "--resume")) == 0
    states = [torch.load(path.with_suffix(".ckpt"), weights_only=True)["module"] for path in (whole, killed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])
    logs = [json.loads(path.with_suffix(".json").read_text()) for path in (whole, killed)]
    for log in logs:
        for epoch in log["epochs"]:
            del epoch["seconds"]
    assert logs[0] == logs[1]
    assert tool.main(options(idx_folder, killed, *steps, "--resume")) == 0  # finished already: written again
