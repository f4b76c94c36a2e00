import json
from pathlib import Path

import numpy as np
import pytest

from sbp_compile.training import load

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import paper_page
    import paper_runs
    import paper_stand_in

    return {"page": paper_page, "runs": paper_runs, "stand_in": paper_stand_in}


def outcome(error, fewest):
    measured = {
        "error": error,
        "differ": 0,
        "kept": [3, 2],
        "fewest_macs": fewest,
        "macs": fewest,
        "dense_macs": 1000,
    }
    return measured | {"speed": {"1": [2.0, 1.9, 2.1], "64": [3.0, 2.9, 3.1]}}


def write_outcome(folder, name, error, fewest):
    log = {"dense_error": 1.0, "train_error": 0.5, "epochs": [{"phase": "sbp", "seconds": 2.0}]}
    (folder / f"{name}.json").write_text(json.dumps(log))
    (folder / f"{name}.measured.json").write_text(json.dumps(outcome(error, fewest)))


def test_every_run_has_a_name_of_its_own_and_pretraining_of_its_seed(tools):
    runs = tools["runs"].RUNS
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    for run in runs:
        given = run.arguments(Path("x"))
        if "--pretrained" in given:
            dense = Path(given[given.index("--pretrained") + 1]).stem
            assert names.index(dense) < names.index(run.name)


def test_the_page_shows_what_is_there_beside_the_paper(tools, tmp_path, monkeypatch):
    page = tools["page"]
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    for seed, fewest in ((0, 100), (1, 50)):
        write_outcome(tmp_path, f"lenet5-digits-sbp-{seed}", 2.0 + seed, fewest)
    write_outcome(tmp_path, "lenet500300-digits-random-sbp-0", 90.0, 0)
    page.write_page(tmp_path)
    text = (tmp_path / "results" / "paper.md").read_text()
    assert (
        "| LeNet-5 | SBP | 2 | 2.50 | 3-2 | 15.00x | 2.00x | 3.00x | 0.86; 3-18-284-283; 5.41; 10.49 |"
        in text
    )
    assert "none left" in text
    assert (tmp_path / "results" / "paper-digits.png").exists()
    assert not (tmp_path / "results" / "paper-fashion-mnist.png").exists()


def test_the_page_can_be_added_to_when_the_runs_are_gone(tools, tmp_path, monkeypatch):
    page = tools["page"]
    first, second, results = (tmp_path / name for name in ("first", "second", "results"))
    for folder in (first, second, results):
        folder.mkdir()
    monkeypatch.setattr(page, "RESULTS", results)
    write_outcome(first, "lenet5-digits-sbp-0", 2.0, 100)
    write_outcome(second, "lenet5-digits-sbp-1", 3.0, 50)
    page.write_page(first)
    page.write_page(second)
    assert "| LeNet-5 | SBP | 2 | 2.50 |" in (results / "paper.md").read_text()


def test_the_stand_in_is_read_as_cifar10(tools, tmp_path):
    images = np.arange(6 * 28 * 28, dtype=np.uint8).reshape(6, 28, 28)
    for name in (*tools["stand_in"].TRAIN, tools["stand_in"].TEST):
        (tmp_path / name).write_bytes(tools["stand_in"].records(images, np.arange(6)))
    data = load("cifar10", tmp_path)
    assert data.test_labels.tolist() == [*range(6)]
    assert (data.test_images[:, :, 2:-2, 2:-2] == images[:, None]).all()
    assert data.test_images.sum() == 3 * images.sum()
