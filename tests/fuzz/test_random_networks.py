"""Random networks of all families with random masks: compiled and masked network compute the same."""

import collections
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import checks, networks
from tests.fuzz.networks import Spec, Step

FLOAT64_NETWORKS = 30
MASKS_EACH = 4
DRAWN_NETWORKS = 30
ONNX_NETWORKS = 18
FLOAT64_CHUNK, ONNX_CHUNK = 10, 6
LEAST_TESTED = 0.8  # torch refuses some networks with dynamic sizes, all their masks at once

steps = st.builds(
    Step, kind=st.sampled_from(networks.ALL_KINDS), back=st.integers(0, 5), seed=st.integers(0, 1 << 16)
)
specs = st.builds(
    Spec,
    inputs=st.lists(st.integers(0, len(networks.INPUT_SHAPES) - 1), min_size=1, max_size=2).map(tuple),
    steps=st.lists(steps, min_size=2, max_size=9).map(tuple),
    dynamic=st.sampled_from(("batch", "static 2", "static 1")),
    form=st.sampled_from(networks.FORMS),
    seed=st.integers(0, 1 << 12),
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        yield
    torch.set_num_threads(threads)


def fail(spec, failure, check):
    smaller, failure = checks.minimised(spec, failure, check)
    pytest.fail(f"{failure}\n{checks.description(smaller)}")


@pytest.mark.parametrize("first", range(0, FLOAT64_NETWORKS, FLOAT64_CHUNK))
def test_the_small_network_equals_the_masked_one_in_float64(first):
    tested = 0
    for seed in range(first, first + FLOAT64_CHUNK):
        for spec, found in checks.check_variants(networks.spec_of(seed), MASKS_EACH):
            if isinstance(found, checks.FuzzError):
                fail(spec, found, checks.check_passes)
            tested += not found.rejected
    assert tested >= LEAST_TESTED * FLOAT64_CHUNK * MASKS_EACH


@settings(
    max_examples=DRAWN_NETWORKS,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
@given(specs)
def test_any_network_that_can_be_drawn_compiles_to_itself(spec):
    checks.check_passes(spec)


@pytest.mark.parametrize("first", range(10_000, 10_000 + ONNX_NETWORKS, ONNX_CHUNK))
def test_the_onnx_file_equals_the_masked_network_in_onnxruntime(first, tmp_path):
    tested = 0
    for seed in range(first, first + ONNX_CHUNK):
        spec = replace(networks.spec_of(seed), masks=seed % MASKS_EACH)
        try:
            tested += not checks.check_compile(spec, tmp_path).rejected
        except checks.FuzzError as failure:
            fail(spec, failure, lambda smaller: checks.check_compile(smaller, tmp_path))
    assert tested >= LEAST_TESTED * ONNX_CHUNK


def test_networks_with_places_that_the_input_decides_in_float64():
    for seed in range(3):
        spec = networks.spec_of(seed, networks.WITH_ROUTES)
        for variant, found in checks.check_variants(spec, 2):
            if isinstance(found, checks.FuzzError):
                fail(variant, found, checks.check_passes)


def test_a_spec_always_builds_the_same_network():
    spec = networks.spec_of(5)
    first, second = (networks.build(spec)[0] for _ in range(2))
    assert first.describe() == second.describe()
    states = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_other_masks_on_a_captured_program_equal_a_new_capture():
    spec = networks.spec_of(2)
    other = Spec(**{**vars(spec), "masks": 3})
    swapped = checks.with_masks(checks.capture(spec), other)
    captured = checks.capture(other)
    assert str(swapped.graph) == str(captured.graph)
    assert any(
        not torch.equal(swapped.constants[name], value)
        for name, value in checks.capture(spec).constants.items()
    )
    assert all(torch.equal(swapped.constants[name], value) for name, value in captured.constants.items())


def test_every_kind_of_layer_occurs_among_the_networks_and_most_of_them_shrink():
    kinds = collections.Counter(step.kind for seed in range(200) for step in networks.spec_of(seed).steps)
    assert set(kinds) == set(networks.ALL_KINDS)


def test_a_failure_shrinks_to_the_steps_that_cause_it():
    spec = networks.spec_of(5)

    def check(candidate):
        if any(step.kind == spec.steps[1].kind for step in candidate.steps):
            raise checks.FuzzError("kind", "present")

    smaller, _ = checks.minimised(spec, checks.failure_of(spec, check), check)
    assert len(smaller.steps) == 1
