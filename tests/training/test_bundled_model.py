import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sbp_compile.capture import load_model
from sbp_compile.training import LeNet5, evaluate, kept_units, mac_ratio, to_tensor

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def saved():
    return load_model(MODELS / "lenet5-sbp-digits.pt")


@pytest.fixture(scope="module")
def log():
    return json.loads((MODELS / "lenet5-sbp-digits.json").read_text())


@pytest.fixture(scope="module")
def digits():
    with np.load(MODELS / "digits-test.npz") as file:
        return to_tensor(file["images"]), torch.from_numpy(file["labels"].astype(np.int64))


def test_the_bundled_model_has_the_error_that_its_log_states(saved, log, digits):
    error = evaluate(saved.exported_program.module(), *digits)
    assert error == pytest.approx(log["masked_error"], abs=0.2)
    assert error <= log["dense_error"] + 1.0


def test_the_bundled_model_has_the_structure_that_its_log_states(saved, log):
    model = LeNet5()
    model.load_state_dict(saved.exported_program.state_dict)
    assert list(kept_units(model)) == log["kept"]
    assert mac_ratio(model) == pytest.approx(log["mac_ratio"])
    assert mac_ratio(model) >= 8


def test_the_bundled_example_inputs_are_test_digits(saved, digits):
    assert torch.equal(saved.example_inputs[0], digits[0][:2])


def test_the_bundled_digits_are_a_hundred_of_each_class(digits):
    images, labels = digits
    assert images.shape == (1000, 1, 28, 28)
    assert labels.bincount().tolist() == [100] * 10


def test_the_bundled_files_stay_small():
    assert sum(path.stat().st_size for path in MODELS.iterdir()) < 3_000_000
