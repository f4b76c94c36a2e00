"""Numbers close to 0 and 1 stay in the file, where torch's exporter alone would leave them out."""

import onnxruntime
import pytest
import torch
from torch import nn

import sbp_compile

FACTOR = 1 + 2.0**-20
AT_ZERO = {
    "a sum": lambda x, _: torch.log(x + 1e-10),
    "a sum with the number first": lambda x, _: torch.log(1e-9 + x),
    "a difference": lambda x, _: torch.log(x - -1e-8),
    "a quotient of zeros": lambda x, _: x / (x + 1e-12),
    "a buffer without axes": lambda x, number: torch.log(x + number),
    "a number for the whole batch": lambda x, _: torch.log(x.sum() + 1e-15),
}
CLOSE_TO_ONE = {"a product": lambda x, _: x * FACTOR, "a quotient": lambda x, _: x / FACTOR}


class Applied(nn.Module):
    """Functions of the largest entry of each row, and of a buffer."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.register_buffer("number", torch.tensor(1e-9))

    def forward(self, x):
        largest = x.abs().amax(1, keepdim=True)
        return {name: function(largest, self.number) for name, function in self.functions.items()}


def both(functions, x, path):
    """The outputs in onnxruntime and in torch, by name."""
    network = Applied(functions)
    sbp_compile.compile(network, torch.randn(2, 4, dtype=x.dtype)).save(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    names = [value.name for value in session.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}, network(x)


@pytest.fixture(scope="module")
def at_zero(tmp_path_factory):
    return both(AT_ZERO, torch.zeros(2, 4), tmp_path_factory.mktemp("zero") / "small.onnx")


@pytest.mark.parametrize("name", AT_ZERO)
def test_a_number_that_only_matters_at_zero_is_in_the_file(name, at_zero):
    found, wanted = (outputs[name] for outputs in at_zero)
    torch.testing.assert_close(found, wanted)


def test_factors_close_to_one_are_in_the_file(tmp_path):
    found, wanted = both(CLOSE_TO_ONE, torch.rand(2, 4) + 0.5, tmp_path / "small.onnx")
    for name in CLOSE_TO_ONE:
        assert torch.equal(found[name], wanted[name])


def test_the_bounds_of_a_clamp_may_be_an_int_and_a_float(tmp_path):
    clamps = {"high": lambda x, _: x.clamp(1, 5e4), "low": lambda x, _: x.clamp(min=0.5, max=1)}
    found, wanted = both(clamps, torch.rand(2, 4) * 2, tmp_path / "small.onnx")
    for name in clamps:
        assert torch.equal(found[name], wanted[name])


def test_a_number_has_the_dtype_of_what_it_is_added_to(tmp_path):
    quotient = {"quotient": lambda x, _: x / (x + 6e-8)}
    found, wanted = both(quotient, torch.zeros(2, 4, dtype=torch.float16), tmp_path / "small.onnx")
    assert torch.equal(found["quotient"], wanted["quotient"])
