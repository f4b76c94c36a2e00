"""`sbp_compile.compile`: what goes in is left alone, what comes out is the same function."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import sbp_compile
from passes import Pipeline, Program, Result, default_pipeline
from sbp_compile.errors import (
    BatchPinnedWarning,
    InputError,
    OutputError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from sbp_compile.nn import LogNormalNoise
from tests.networks import Images, Masked, PinnedBatch, assert_close, run_onnx
from tests.zoo.places import switch_off


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def outputs_agree(module: nn.Module, compiled: sbp_compile.Compiled, *inputs: Tensor) -> None:
    with torch.no_grad():
        assert_close(module.eval()(*inputs), compiled.module(*inputs))


def kept(compiled: sbp_compile.Compiled) -> list[int]:
    return [layer.kept for layer in compiled.report.layers]


def test_masked_neurons_go_and_the_function_stays() -> None:
    module, x = Masked(), torch.randn(4, 6)
    compiled = sbp_compile.compile(module, x)
    assert kept(compiled) == [4, 3]
    outputs_agree(module, compiled, torch.randn(9, 6))


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything of a module that compilation could disturb, as comparable data."""
    parts = list(module.modules())
    return {
        "bytes": {name: value.numpy().tobytes() for name, value in module.state_dict().items()},
        "training": [part.training for part in parts],
        "grad": [None if p.grad is None else p.grad.tolist() for p in module.parameters()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "addresses": [p.data_ptr() for p in module.parameters()],
        "hooks": [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in parts],
        "attributes": [sorted(vars(part)) for part in parts],
    }


def test_the_module_given_is_left_as_it_was() -> None:
    module = nn.Sequential(Masked(), nn.BatchNorm1d(3), LogNormalNoise(3), nn.Dropout(0.5))
    module.train()
    module[1].eval()
    module[0].first.weight.requires_grad_(False)
    module(torch.randn(5, 6)).sum().backward()
    module[0].register_forward_hook(lambda *_: None)
    before = state_of(module)
    sbp_compile.compile(module, torch.randn(4, 6))
    assert state_of(module) == before


def test_the_module_given_is_left_as_it_was_when_capture_fails() -> None:
    class Branching(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    module = Branching().train()
    before = state_of(module)
    with pytest.raises(UnsupportedModelError, match="Branching cannot be captured"):
        sbp_compile.compile(module, torch.randn(4, 6))
    assert state_of(module) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_on_changes_nothing_in_what_was_compiled(dtype: torch.dtype, tmp_path: Path) -> None:
    module = Masked().to(dtype)
    x = torch.randn(4, 6, dtype=dtype)
    compiled = sbp_compile.compile(module, x)
    wanted = compiled.module(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert torch.equal(compiled.module(x), wanted)
    compiled.save(tmp_path / "small.onnx")
    assert_close(wanted.detach(), run_onnx(tmp_path / "small.onnx", x)[0])


def test_changing_the_small_module_changes_neither_the_original_nor_the_file(tmp_path: Path) -> None:
    module = Masked().double()
    x = torch.randn(4, 6, dtype=torch.float64)
    compiled = sbp_compile.compile(module, x)
    wanted = module(x).detach()
    with torch.no_grad():
        for parameter in compiled.module.parameters():
            parameter.zero_()
    assert torch.equal(module(x), wanted)
    compiled.save(tmp_path / "small.onnx")
    assert_close(wanted, run_onnx(tmp_path / "small.onnx", x)[0])


def test_frozen_modules_compile() -> None:
    module = Masked().requires_grad_(False)
    compiled = sbp_compile.compile(module, torch.randn(4, 6))
    outputs_agree(module, compiled, torch.randn(3, 6))


def test_shared_parameters_compile() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.same = self.layer
            self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0, 1, 1]))

        def forward(self, x: Tensor) -> Tensor:
            return self.same(torch.relu(self.layer(x)) * self.mask)

    module = Twice()
    compiled = sbp_compile.compile(module, torch.randn(4, 6))
    assert kept(compiled) == [4, 6]
    outputs_agree(module, compiled, torch.randn(3, 6))


def test_a_module_pruned_by_torch_compiles_after_a_forward() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    prune.ln_structured(module[0], "weight", amount=0.5, n=2, dim=0)
    x = torch.randn(4, 6)
    module(x)
    names = sorted(name for name, _ in module[0].named_buffers())
    compiled = sbp_compile.compile(module, x)
    assert kept(compiled) == [4, 3]
    outputs_agree(module, compiled, x)
    assert sorted(name for name, _ in module[0].named_buffers()) == names
    assert prune.is_pruned(module)


class Many(nn.Module):
    """Several inputs and outputs, nested, with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Masked()

    def forward(self, x: Tensor, pair: list[Tensor], *, scale: Tensor, power: int = 1) -> dict[str, Any]:
        y = self.body(x + pair[0] * pair[1]) * scale**power
        return {"y": y, "both": (x, [y.sum(1), None, 3]), "nested": {"ones": torch.ones(2)}}


def many_arguments(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, first, second = (torch.randn(batch, 6) for _ in range(3))
    return (x, [first, second]), {"scale": torch.tensor(2.0), "power": 2}


@pytest.fixture(scope="module")
def many() -> tuple[Many, sbp_compile.Compiled]:
    torch.manual_seed(0)
    module = Many().eval()
    args, kwargs = many_arguments(4)
    return module, sbp_compile.compile(module, args, kwargs=kwargs)


def flat(results: dict[str, Any]) -> list[Tensor]:
    x, (total, nothing, three) = results["both"]
    assert nothing is None
    assert three == 3
    return [results["y"], x, total, results["nested"]["ones"]]


def test_nested_arguments_and_results_keep_their_structure(many: tuple[Many, sbp_compile.Compiled]) -> None:
    module, compiled = many
    args, kwargs = many_arguments(7)
    results = compiled.module(*args, **kwargs)
    assert list(results) == ["y", "both", "nested"]
    assert type(results["both"]) is tuple
    assert type(results["both"][1]) is list
    for wanted, got in zip(flat(module(*args, **kwargs)), flat(results), strict=True):
        assert_close(wanted.detach(), got.detach())


def test_onnx_names_are_the_arguments_and_the_keys(
    many: tuple[Many, sbp_compile.Compiled], tmp_path: Path
) -> None:
    module, compiled = many
    compiled.save(tmp_path / "small.onnx")
    args, kwargs = many_arguments(5)
    inputs = (args[0], *args[1], kwargs["scale"])
    results = run_onnx(tmp_path / "small.onnx", *inputs)
    assert [name for name in compiled.output_names if name] == ["y", "output_1", "output_2", "nested.ones"]
    for wanted, got in zip(flat(module(*args, **kwargs)), results, strict=True):
        assert_close(wanted.detach(), got)


def test_positional_arguments_may_be_given_by_name(many: tuple[Many, sbp_compile.Compiled]) -> None:
    module, compiled = many
    (x, pair), kwargs = many_arguments(3)
    assert_close(
        module(x, pair, **kwargs)["y"].detach(), compiled.module(x, pair=pair, **kwargs)["y"].detach()
    )


def test_a_call_of_another_structure_is_refused(many: tuple[Many, sbp_compile.Compiled]) -> None:
    _, compiled = many
    (x, pair), kwargs = many_arguments(3)
    with pytest.raises(InputError, match=r"\['power'\] were given, expected \['power', 'scale'\]"):
        compiled.module(x, pair, power=2)
    with pytest.raises(InputError, match="not nested as in the captured call"):
        compiled.module(x, pair[0], **kwargs)
    with pytest.raises(InputError, match=r"argument 4 \(=3\) was fixed to 2 at capture; compile again"):
        compiled.module(x, pair, **(kwargs | {"power": 3}))


def test_integer_inputs_index_embeddings(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Embedding(10, 6), Masked())
    tokens = torch.randint(0, 10, (4, 5))
    compiled = sbp_compile.compile(module, tokens)
    assert compiled.report.layers[0].kept == 4
    compiled.save(tmp_path / "small.onnx")
    more = torch.randint(0, 10, (2, 5))
    assert_close(module(more).detach(), run_onnx(tmp_path / "small.onnx", more)[0])


def test_a_wholly_masked_network_is_its_constant(tmp_path: Path) -> None:
    module = Masked()
    module.mask = torch.zeros(8)
    compiled = sbp_compile.compile(module, torch.randn(4, 6))
    assert kept(compiled) == [0, 0]
    assert compiled.report.after.macs == 0
    compiled.save(tmp_path / "small.onnx")
    x = torch.randn(5, 6)
    outputs_agree(module, compiled, x)
    assert_close(module(x).detach(), run_onnx(tmp_path / "small.onnx", x)[0])


def test_results_without_a_dtype_of_their_own_are_constants_like_the_others() -> None:
    class Creates(Masked):
        def forward(self, x: Tensor) -> Tensor:
            steps = torch.arange(6) / 6
            return super().forward(x * steps + torch.ones(6))

    module = Creates()
    compiled = sbp_compile.compile(module, torch.randn(4, 6))
    assert kept(compiled) == [4, 3]
    outputs_agree(module, compiled, torch.randn(3, 6))


@pytest.mark.parametrize("name", ["dtype_anchor", "a_b_", "_modules_"])
def test_parameters_may_have_any_name(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.randn(6)))
            self.register_buffer("a_b", torch.randn(6))
            self.a = nn.ParameterDict({"b": nn.Parameter(torch.randn(6))})

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(torch.sin(x + getattr(self, name)) + self.a_b) * torch.sin(x + self.a["b"])

    module = Named()
    compiled = sbp_compile.compile(module, torch.randn(4, 6))
    outputs_agree(module, compiled, torch.randn(3, 6))


# Batches and other dynamic sizes


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_file_takes_any_batch_whatever_the_example_had(batch: int, tmp_path: Path) -> None:
    module = Masked()
    compiled = sbp_compile.compile(module, torch.randn(batch, 6))
    compiled.save(tmp_path / "small.onnx")
    for size in (1, 2, 5):
        x = torch.randn(size, 6)
        assert_close(module(x).detach(), run_onnx(tmp_path / "small.onnx", x)[0])


def test_a_pinned_batch_is_warned_of_and_reported(tmp_path: Path) -> None:
    module = PinnedBatch()
    with pytest.warns(BatchPinnedWarning, match="captured for batch 2 only"):
        compiled = sbp_compile.compile(module, torch.randn(2, 6))
    [note] = compiled.report.notes
    assert (note.where, note.text) == ("batch", "fixed to 2: the small network takes no other batch size")
    compiled.save(tmp_path / "small.onnx")
    x = torch.randn(2, 6)
    assert_close(module(x).detach(), run_onnx(tmp_path / "small.onnx", x)[0])


def test_a_pinned_batch_is_an_error_where_a_dynamic_one_is_required() -> None:
    with pytest.raises(UnsupportedModelError, match="the batch cannot be made dynamic"):
        sbp_compile.compile(PinnedBatch(), torch.randn(2, 6), dynamic_batch="require")


def test_a_static_batch_is_kept_and_reported(tmp_path: Path) -> None:
    module = Masked()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = sbp_compile.compile(module, torch.randn(3, 6), dynamic_batch=False)
    assert compiled.report.notes[0].text.startswith("fixed to 3")
    compiled.save(tmp_path / "small.onnx")
    x = torch.randn(3, 6)
    assert_close(module(x).detach(), run_onnx(tmp_path / "small.onnx", x)[0])


def test_an_unknown_batch_option_is_refused() -> None:
    with pytest.raises(UsageError, match=r"dynamic_batch \(='yes'\) must be True, False or 'require'"):
        sbp_compile.compile(Masked(), torch.randn(2, 6), dynamic_batch="yes")  # type: ignore[arg-type]


def test_height_and_width_may_be_dynamic_too(tmp_path: Path) -> None:
    module = Images()
    dim = torch.export.Dim
    shapes = ({0: dim("batch"), 2: dim("height", min=4), 3: dim("width", min=4)},)
    compiled = sbp_compile.compile(module, torch.randn(2, 2, 9, 11), dynamic_shapes=shapes)
    compiled.save(tmp_path / "small.onnx")
    for sizes in ((1, 2, 7, 5), (3, 2, 16, 8)):
        x = torch.randn(sizes)
        assert_close(module(x).detach(), run_onnx(tmp_path / "small.onnx", x)[0])
        outputs_agree(module, compiled, x)


# What cannot be compiled exactly


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    module = Masked()
    with torch.no_grad():
        module.first.weight[2, :3] = value
    message = (
        rf"'first.weight' has 3 of 48 values that are NaN or infinite \(first.weight\[2, 0\] is {value}\)"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        sbp_compile.compile(module, torch.randn(4, 6))


def test_values_that_nothing_reads_may_be_anything() -> None:
    module = Masked()
    module.forgotten = nn.Parameter(torch.full((3,), float("nan")))
    compiled = sbp_compile.compile(module, torch.randn(4, 6))
    outputs_agree(module, compiled, torch.randn(3, 6))


def test_an_infinite_buffer_is_an_attention_mask() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("causal", torch.triu(torch.full((4, 4), float("-inf")), 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.mT + self.causal, -1) @ x

    module = Attention()
    compiled = sbp_compile.compile(module, torch.randn(2, 4, 5))
    outputs_agree(module, compiled, torch.randn(3, 4, 5))


def test_random_numbers_in_eval_mode_are_refused_by_name() -> None:
    class Random(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand_like(x))

    with pytest.raises(
        UnsupportedModelError, match=r"rand_like \(aten.rand_like.default\) draws random numbers"
    ):
        sbp_compile.compile(Random(), torch.randn(4, 6))


def test_dropout_in_eval_mode_draws_nothing() -> None:
    class Dropping(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    module = Dropping().train()
    compiled = sbp_compile.compile(module, torch.randn(4, 6))
    outputs_agree(module, compiled, torch.randn(3, 6))


def test_weights_beyond_the_range_of_half_precision_are_refused() -> None:
    class Scaled(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return self.second((self.first(x) * 3e4).tanh()) / 3e4

    module = Scaled()
    with torch.no_grad():
        module.first.weight.fill_(10.0)
    with pytest.raises(UnsupportedModelError, match=r"'first.weight' has 48 of 48 values beyond the range"):
        sbp_compile.compile(module.half(), torch.randn(4, 6).half(), verify=False)


# Proof


@dataclass(frozen=True)
class BreakLayer:
    """A pass with a bug: it changes a layer's weights."""

    layer: str
    name: str = "break_layer"

    def __call__(self, program: Program) -> Result:
        constants = {
            name: value + 1.0 if name.startswith(self.layer) else value
            for name, value in program.constants.items()
        }
        return Result(program.replace(constants=constants), True)


@pytest.mark.parametrize(
    ("layer", "value"),
    [("first", r"mul\w* \(aten.mul.Tensor\)"), ("second", r"linear_1 \(aten.linear.default in second\)")],
)
def test_a_broken_pass_is_found_and_the_first_wrong_value_is_named(layer: str, value: str) -> None:
    pipeline = Pipeline((default_pipeline(), BreakLayer(layer)))
    message = rf"output 0 differs by .* in float64 \(tolerance 1e-12\); the networks part at {value}"
    with pytest.raises(VerificationError, match=message):
        sbp_compile.compile(Masked(), torch.randn(4, 6), pipeline=pipeline)


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    compiled = sbp_compile.compile(Masked(), torch.randn(4, 6))
    compiled.program = BreakLayer("first")(compiled.program).program
    target = tmp_path / "small.onnx"
    target.write_bytes(b"old")
    with pytest.raises(VerificationError, match=r"output 'output_0' differs by .* in onnxruntime \(CPU"):
        compiled.save(target)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


def test_an_exported_program_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    compiled = sbp_compile.compile(Masked(), torch.randn(4, 6))
    with torch.no_grad():
        next(compiled.module.parameters()).add_(1.0)
    with pytest.raises(VerificationError, match=r"differs by .* in torch"):
        compiled.save(tmp_path / "small.pt2")
    assert not list(tmp_path.iterdir())


def test_further_inputs_are_verified_on() -> None:
    compiled = sbp_compile.compile(Masked(), torch.randn(4, 6), inputs=[(torch.randn(10, 6),)])
    assert compiled.report.verification is not None
    assert compiled.report.verification.examples == 4 + 10 + 1 + 3


def test_further_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"input 'x' has shape \[10, 7\], the model takes \['any', 6\]"):
        sbp_compile.compile(Masked(), torch.randn(4, 6), inputs=[(torch.randn(10, 7),)])
    with pytest.raises(InputError, match="2 input tensors were given, the network takes 1"):
        sbp_compile.compile(Masked(), torch.randn(4, 6), inputs=[(torch.randn(4, 6), torch.randn(4, 6))])


def test_without_verification_nothing_is_claimed(tmp_path: Path) -> None:
    compiled = sbp_compile.compile(Masked(), torch.randn(4, 6), verify=False)
    compiled.save(tmp_path / "small.onnx")
    assert compiled.report.verification is None


# Files


@pytest.mark.parametrize("name", ["small.pb", "small", "small.ONNX.txt"])
def test_an_unknown_suffix_is_refused(name: str, tmp_path: Path) -> None:
    compiled = sbp_compile.compile(Masked(), torch.randn(4, 6), verify=False)
    with pytest.raises(UsageError, match=r"must end in \.onnx, \.pt2, \.ts, \.pt or \.safetensors"):
        compiled.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_missing_folder_is_named(suffix: str, tmp_path: Path) -> None:
    compiled = sbp_compile.compile(Masked(), torch.randn(4, 6), verify=False)
    with pytest.raises(OutputError, match="does not exist; create it first"):
        compiled.save(tmp_path / "nowhere" / f"small{suffix}")


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_the_same_model_gives_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, x = Masked(), torch.randn(4, 6)
    for name in ("one", "two"):
        sbp_compile.compile(module, x).save(tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


@pytest.mark.slow
def test_two_processes_that_hash_otherwise_write_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sbp_compile.save_model(Masked(), torch.randn(4, 6), tmp_path / "model.pt")
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "sbp_compile", "model.pt", "-o", f"small{seed}.onnx", "--quiet"]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "small1.onnx").read_bytes() == (tmp_path / "small2.onnx").read_bytes()


class DependsOnData(nn.Module):
    """As many rows as there are positive entries, in between layers and masks."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.hidden, self.after = nn.Linear(6, 6), nn.Linear(2, 8), nn.Linear(8, 3)
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("mask", (torch.arange(16) % 2).float())

    def forward(self, x: Tensor) -> Tensor:
        rows = self.hidden(torch.nonzero(self.before(x) > 0).float()) * self.mask[:8]
        left, right = rows.contiguous().double().float().chunk(2, 1)
        total = self.after(torch.cat((right, left * 1.0), 1)).sum(0)
        return self.second((self.first(x) * self.mask).relu()) + total


@pytest.mark.parametrize("convolution", [F.conv2d, F.conv_transpose2d])
def test_a_kernel_for_each_example_compiles_to_a_file_for_one_batch(
    convolution: Callable[..., Tensor], tmp_path: Path
) -> None:
    class Kernels(nn.Module):
        """The batch among the groups, as in CondConv and StyleGAN2."""

        def __init__(self) -> None:
            super().__init__()
            self.kernels = nn.Parameter(torch.randn(3, 4 * 4 * 9))
            self.route, self.noise = nn.Linear(4, 3), LogNormalNoise(3)

        def forward(self, x: Tensor) -> Tensor:
            batch, channels, height, width = x.shape
            route = self.noise(self.route(x.mean((2, 3))))
            weight = (route @ self.kernels).view(batch * channels, channels, 3, 3)
            y = convolution(x.reshape(1, batch * channels, height, width), weight, padding=1, groups=batch)
            return y.view(batch, channels, height, width)

    network = Kernels().eval()
    switch_off(network.noise, torch.tensor([False, True, False]))
    x = torch.randn(3, 4, 6, 6)
    compiled = sbp_compile.compile(network, x, dynamic_batch="require")
    assert compiled.program.constants["route.weight"].shape == (2, 4)
    outputs_agree(network, compiled, x[:2])
    with pytest.raises(UnsupportedModelError, match="dynamic_batch=False"):
        compiled.save(tmp_path / "any.onnx")
    sbp_compile.compile(network, x, dynamic_batch=False).save(tmp_path / "three.onnx")


def test_where_sizes_depend_on_data_the_rest_still_shrinks(tmp_path: Path) -> None:
    module, x = DependsOnData(), torch.randn(4, 6)
    compiled = sbp_compile.compile(module, x)
    by_name = {layer.name: layer.kept for layer in compiled.report.layers}
    assert by_name["first"] == 8
    assert by_name["hidden"] == 8
    outputs_agree(module, compiled, torch.randn(4, 6))
    compiled.save(tmp_path / "small.onnx")
