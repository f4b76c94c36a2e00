import importlib.util
import json
from pathlib import Path

import pytest
import torch

from sbp_compile.capture import load_model
from sbp_compile.training import LeNet500300, load, predict, to_tensor

TOOL = Path(__file__).parents[2] / "tools" / "train.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(folder, output):
    return [
        "lenet500300",
        "--dataset",
        f"folder:{folder}",
        "--dense-epochs",
        "1",
        "--epochs",
        "1",
        "-o",
        str(output),
    ]


def test_one_command_writes_a_model_a_log_and_a_checkpoint(tool, idx_folder, tmp_path, capsys):
    output = tmp_path / "model.pt"
    assert tool.main(options(idx_folder, output)) == 0
    assert "times fewer multiply-adds" in capsys.readouterr().out
    log = json.loads((tmp_path / "model.json").read_text())
    assert [epoch["phase"] for epoch in log["epochs"]] == ["dense", "sbp"]
    assert log["epochs"][-1]["kept"] == log["kept"]
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert checkpoint["about"]["masked_error"] == log["masked_error"]
    model = LeNet500300().eval()
    model.load_state_dict(checkpoint["model"])
    images = to_tensor(load(f"folder:{idx_folder}").test_images)
    saved = load_model(output)
    torch.testing.assert_close(saved.exported_program.module()(images), predict(model, images))
    torch.testing.assert_close(saved.example_inputs[0], images[:2])


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--epochs", "0"], 2, "--epochs (=0) must be at least 1"),
        (["--dataset", "folder:nowhere"], 4, "nowhere/train-images-idx3-ubyte.gz is missing"),
        (["-o", "no/such/folder/model.pt"], 2, "does not exist"),
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
