"""What a layer needs to live in other people's code: compile, export, copies, casts, devices, autocast."""

import copy
import io

import pytest
import torch
from torch import nn

from sbp_compile.nn import LogNormalNoise, kl_divergence, sampling
from tests.nn.test_noise import DEAD, LIVE, layer_with

torch_copies_its_own_deprecated_class = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
torch_instantiates_its_own_autograd_function = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)

UNITS = [LIVE, DEAD, (0.1, -5.0), (5.0, -1.0), (-20.0, -3.0), (-8.0, 1.0)]


def network():
    return nn.Sequential(nn.Conv2d(2, 6, 3), layer_with(UNITS), nn.ReLU())


def export(model, x):
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    return program.run_decompositions({})


def test_the_state_is_the_two_parameters():
    layer = layer_with(UNITS)
    assert list(layer.state_dict()) == ["mu", "log_sigma"]
    assert list(layer.buffers()) == []
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = LogNormalNoise(len(UNITS))
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 6)
    assert torch.equal(other.eval()(x), layer.eval()(x))


def test_a_copy_is_independent():
    layer = layer_with(UNITS)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.mu.fill_(-20.0)
    assert layer.mu[0] == LIVE[0]
    assert twin.dim == layer.dim
    assert twin.log_range == layer.log_range


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", [True, False])
def test_the_output_has_the_dtype_of_the_input(dtype, mode):
    layer = layer_with(UNITS).train(mode)
    assert layer(torch.ones(2, 6, dtype=dtype)).dtype == dtype
    assert layer.to(dtype)(torch.ones(2, 6, dtype=dtype)).dtype == dtype
    layer(torch.ones(2, 6, dtype=dtype)).sum().backward()
    assert layer.mu.grad.dtype == dtype


def test_casts_lose_the_parameters_digits_and_nothing_else():
    layer = layer_with(UNITS)
    exact = [layer.double().mean().clone(), layer.kl().clone()]
    half = layer.half()
    with torch.no_grad():
        rounded = copy.deepcopy(half).double()
    assert torch.equal(half.mean(), rounded.mean().half())
    assert torch.equal(half.mask(), rounded.mask())
    back = half.float()
    torch.testing.assert_close(back.mean().double(), exact[0], rtol=0.02, atol=1e-8)


def test_integers_become_the_dtype_of_the_parameters():
    layer = layer_with(UNITS).eval()
    assert torch.equal(layer(torch.ones(2, 6, dtype=torch.int64)), layer(torch.ones(2, 6)))


def test_the_factor_is_rounded_once_to_the_inputs_dtype():
    layer = layer_with(UNITS).eval()
    as_double = copy.deepcopy(layer).double()
    got = layer(torch.ones(1, 6, dtype=torch.float64))
    assert torch.equal(got[0], torch.where(as_double.mask(), as_double.mean(), 0.0))


@pytest.mark.parametrize("mode", [True, False])
def test_autocast_keeps_the_low_precision_of_its_input_and_the_accuracy_of_the_statistics(mode):
    model = network().train(mode)
    x = torch.randn(2, 2, 8, 8)
    plain = kl_divergence(model), model[1].mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        assert torch.equal(kl_divergence(model), plain[0])
        assert torch.equal(model[1].mean(), plain[1])
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert model[1].mu.grad.isfinite().all()
    assert model[1].mu.grad.dtype == torch.float32


def test_the_layer_can_be_made_in_any_dtype_and_on_the_meta_device():
    assert LogNormalNoise(3, dtype=torch.float64).mu.dtype == torch.float64
    layer = LogNormalNoise(3, device="meta")
    assert layer.mu.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.mask().all()


def test_the_statistics_work_without_gradients_and_on_frozen_parameters():
    layer = layer_with(UNITS)
    with torch.inference_mode():
        assert layer.kl().isfinite()
        assert layer(torch.ones(2, 6)).isfinite().all()
    layer.requires_grad_(requires_grad=False)
    assert not layer(torch.ones(2, 6)).requires_grad
    assert not layer.kl().requires_grad


def test_one_frozen_parameter_leaves_the_other_trainable():
    layer = layer_with(UNITS)
    layer.mu.requires_grad_(requires_grad=False)
    (layer(torch.ones(2, 6)).sum() + layer.kl()).backward()
    assert layer.mu.grad is None
    assert layer.log_sigma.grad.abs().sum() > 0


@torch_copies_its_own_deprecated_class
def test_eval_mode_exports_to_one_multiplication_of_the_input_by_a_foldable_constant():
    model = network().eval()
    x = torch.randn(2, 2, 8, 8)
    program = export(model, x)
    torch.testing.assert_close(program.module()(x[:1]), model(x[:1]), rtol=0, atol=0)

    placeholders = {node.name for node in program.graph.nodes if node.op == "placeholder"}
    constant = placeholders - set(program.graph_signature.user_inputs)
    touched_by_input, folded = [], 0
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if all(arg.name in constant for arg in node.all_input_nodes):
            constant.add(node.name)
            folded += 1
            assert torch.Tag.nondeterministic_seeded not in node.target.tags
        else:
            touched_by_input.append(str(node.target))
    assert folded > 20
    assert [name for name in touched_by_input if "assert" not in name and "sym_size" not in name] == [
        "aten.conv2d.default",
        "aten.mul.Tensor",
        "aten.relu.default",
    ]


@torch_copies_its_own_deprecated_class
def test_train_mode_exports_and_still_draws_samples():
    model = network()
    x = torch.randn(4, 2, 8, 8)
    exported = export(model, x).module()
    first, second = exported(x[:3]), exported(x[:3])
    assert first.shape == model(x[:3]).shape
    assert not torch.equal(first, second)


def test_eval_mode_compiles_without_graph_breaks():
    torch.compiler.reset()
    model = network().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 2, 8, 8)
    assert torch.equal(compiled(x), model(x))


@torch_instantiates_its_own_autograd_function
def test_a_training_step_compiles_without_graph_breaks():
    torch.compiler.reset()
    layer = layer_with(UNITS)

    def loss(x):
        return (layer(x) * x).sum() + kl_divergence(layer)

    x = torch.rand(5, 6)
    grads = []
    for step in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        torch.manual_seed(7)
        step(x).backward()
        grads.append((layer.mu.grad.clone(), layer.log_sigma.grad.clone()))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing the inductor backend gives some
def test_generated_code_agrees_with_eager():
    torch.compiler.reset()
    layer = layer_with(UNITS)
    x, p = torch.rand(5, 6), sampling.uniform(5, layer.mu)

    def loss(x):
        noisy = sampling.sample(layer.mu, layer.log_sigma, p, *layer.log_range) * x
        return noisy.square().sum() + kl_divergence(layer) + layer.mean().sum()

    results = []
    for step in (loss, torch.compile(loss, fullgraph=True)):
        layer.zero_grad()
        value = step(x)
        value.backward()
        results.append((value.detach(), layer.mu.grad.clone(), layer.log_sigma.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-4)
