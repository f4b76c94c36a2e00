import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sbp_compile
from sbp_compile.errors import InputError
from sbp_compile.nn import (
    CONVOLUTIONS,
    NORMS,
    LogNormalNoise,
    NoiseArgumentError,
    hidden_linears,
    insert_noise,
    noise_layers,
    remove_noise,
)
from tests.nn.test_noise_dropin import (
    torch_copies_its_own_deprecated_class,
    torch_instantiates_its_own_autograd_function,
)
from tests.zoo import ZOO
from tests.zoo.places import Places, switch_off

NOWHERE = "nowhere"


class Block(nn.Module):
    """A torchvision-style residual block: one relu for two widths, a downsampling Sequential."""

    def __init__(self, inputs, width, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


class ChannelsFirstNorm(nn.LayerNorm):
    """A timm-style norm over the channels of an image."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Conv1D(nn.Module):
    """GPT-2's linear layer in the transformers package: weight (in, out)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.1)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class FeedForward(nn.Module):
    """A transformers-style block: called by keyword, gives a tuple, activation written out."""

    def __init__(self, linear):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.c_fc, self.c_proj = linear(6, 16), linear(16, 6)

    def forward(self, hidden_states=None):
        x = self.c_fc(self.norm(hidden_states))
        x = 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3.0))))
        return (hidden_states + self.c_proj(x),)


def residual(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Block(3, 5, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def image(batch=2):
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def kill(layers, share=3):
    for layer in layers:
        switch_off(layer, torch.arange(layer.num_features) % share == 0)


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [
        tensor for item in (result.values() if isinstance(result, dict) else result) for tensor in flat(item)
    ]


def assert_same(first, second):
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(second), strict=True))


def test_noise_goes_behind_every_convolution_and_the_models_own_names_stay():
    model = residual()
    before = set(model.state_dict())
    done = insert_noise(model, CONVOLUTIONS)
    assert [(entry.name, entry.layer.num_features) for entry in done.inserted] == [
        ("0.conv1", 5),
        ("0.conv2", 8),
        ("0.downsample.0", 8),
    ]
    assert {entry.layer.dim for entry in done.inserted} == {-3}
    assert not done.skipped
    assert noise_layers(model) == [entry.layer for entry in done.inserted]
    names = [f"{entry.name}.noise_after.{part}" for entry in done.inserted for part in ("mu", "log_sigma")]
    assert set(model.state_dict()) == before | set(names)
    assert str(done).splitlines()[0] == "after 0.conv1: 5 features along -3"


def test_the_output_of_the_module_is_multiplied():
    model, x = residual(), image()
    layer = insert_noise(model, "0.conv1").inserted[0].layer
    kill([layer])
    assert torch.equal(model[0].conv1(x), layer(F.conv2d(x, model[0].conv1.weight, padding=1)))
    assert torch.equal(model[0].conv1(x)[:, 0], torch.zeros(2, 6, 6))


def test_in_front_of_a_norm_its_input_is_multiplied_and_nothing_else():
    model, x = residual(), torch.randn(2, 5, 6, 6)
    norm = model[0].bn1
    plain = norm(x * torch.tensor([0.0, 1, 1, 1, 1]).view(5, 1, 1))
    layer = insert_noise(model, nn.BatchNorm2d, before=True).inserted[0].layer
    layer.switch_off(torch.tensor([True, False, False, False, False]))
    assert torch.equal(norm(x)[:, 0], plain[:, 0])
    torch.testing.assert_close(norm(x / layer.mean().view(5, 1, 1)), plain)
    assert [name for name in model.state_dict() if "noise" in name][:1] == ["0.bn1.noise_before.mu"]


def test_modules_are_chosen_by_class_name_pattern_and_function():
    def chosen(where, **options):
        return [entry.name for entry in insert_noise(residual(), where, **options).inserted]

    assert chosen("*.conv?") == ["0.conv1", "0.conv2"]
    assert chosen(["0.conv2", nn.Linear]) == ["0.conv2", "3"]
    assert chosen(lambda name, part: getattr(part, "out_channels", 0) == 8) == ["0.conv2", "0.downsample.0"]
    assert chosen(NORMS, before=True) == ["0.bn1", "0.bn2", "0.downsample.1"]


def test_a_sequential_takes_its_noise_at_its_end():
    model, x = residual(), image()
    layer = insert_noise(model, "0.downsample").inserted[0].layer
    assert model[0].downsample[1].noise_after is layer
    wanted = model[0].downsample[1]
    kill([layer])
    assert torch.equal(model[0].downsample(x), wanted(model[0].downsample[0](x)))
    assert len(model[0].downsample) == 2


def test_a_root_that_is_a_sequential_or_a_layer_takes_noise():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    insert_noise(model, nn.Linear)
    assert model(torch.ones(2, 3)).shape == (2, 4)
    layer = nn.Linear(3, 4)
    assert insert_noise(layer, nn.Linear).inserted[0].name == ""
    layer.noise_after.switch_off(torch.ones(4, dtype=torch.bool))
    assert torch.equal(layer(torch.ones(2, 3)), torch.zeros(2, 4))


def test_a_second_call_changes_nothing_and_the_other_side_is_free():
    model = residual()
    insert_noise(model, nn.Conv2d)
    again = insert_noise(model, nn.Conv2d)
    assert not again.inserted
    assert set(again.skipped.values()) == {"it has noise there already"}
    assert len(insert_noise(model, nn.Conv2d, before=True).inserted) == 3


def test_removal_gives_the_model_back():
    model, x = residual(), image()
    names, wanted, hooks = list(model.state_dict()), model(x), vars(model[0].conv1).keys()
    insert_noise(model, CONVOLUTIONS)
    insert_noise(model, NORMS, before=True)
    kill(noise_layers(model))
    assert not torch.equal(model(x), wanted)
    assert remove_noise(model) == (
        "0.conv1", "0.bn1", "0.conv2", "0.bn2", "0.downsample.0", "0.downsample.1",
    )  # fmt: skip
    assert torch.equal(model(x), wanted)
    assert list(model.state_dict()) == names
    assert vars(model[0].conv1).keys() == hooks
    assert remove_noise(model) == ()


def test_noise_of_the_models_own_code_is_neither_chosen_nor_removed():
    model = nn.Sequential(nn.Linear(2, 3), LogNormalNoise(3))
    insert_noise(model, lambda name, part: bool(name))
    assert len(noise_layers(model)) == 2
    remove_noise(model)
    assert noise_layers(model) == [model[1]]


FAMILIES = [
    "resnet18",
    "mobilenet_v2",
    "convnext",
    "densenet",
    "vit",
    "swin",
    "bert",
    "gpt",
    "llama",
    "torch_encoder",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_every_style_take_noise_and_give_it_back(name):
    torch.manual_seed(0)
    model, example = ZOO[name].build(Places(NOWHERE)).eval(), ZOO[name].example()
    wanted = model(*example)
    done = insert_noise(model, (*CONVOLUTIONS, nn.Linear), example_inputs=example)
    kill(noise_layers(model))
    assert any(not torch.equal(a, b) for a, b in zip(flat(model(*example)), flat(wanted), strict=True))
    model.train()
    sum(value.float().square().mean() for value in flat(model(*example))).backward()
    assert all(entry.layer.mu.grad is not None for entry in done.inserted)
    model.eval()
    remove_noise(model)
    if not any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
        assert_same(model(*example), wanted)


@torch_copies_its_own_deprecated_class
def test_the_compiler_removes_channels_of_a_residual_block():
    model = residual_with_noise()
    kill(noise_layers(model), share=2)
    compiled = sbp_compile.compile(model, image())
    assert compiled.report.after.macs < 0.7 * compiled.report.before.macs


@torch_copies_its_own_deprecated_class
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("torch_encoder", "resnet18", "bert", "convnext")
    ],
)
def test_the_compiler_removes_what_inserted_noise_switches_off(name):
    torch.manual_seed(0)
    model, example = ZOO[name].build(Places(NOWHERE)).eval(), ZOO[name].example()
    where = CONVOLUTIONS if name == "resnet18" else hidden_linears(model, example)
    kill([entry.layer for entry in insert_noise(model, where, example_inputs=example).inserted], share=2)
    compiled = sbp_compile.compile(model, example)
    assert compiled.report.after.macs < 0.9 * compiled.report.before.macs


def test_state_dicts_carry_the_noise_and_the_units_that_are_off():
    first, second = residual(), residual(1)
    for model in (first, second):
        insert_noise(model, nn.Conv2d)
    layer = noise_layers(first)[0]
    nn.init.normal_(layer.mu)
    layer.switch_off(torch.tensor([False, True, False, False, False]))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(second(image()), first(image()))
    first.load_state_dict(residual_with_noise().state_dict())
    assert layer.off is None


def residual_with_noise():
    model = residual()
    insert_noise(model, nn.Conv2d)
    return model


def test_a_copy_is_independent():
    model, x = residual_with_noise(), image()
    twin = copy.deepcopy(model)
    for layer in noise_layers(twin):
        layer.switch_off(torch.ones(layer.num_features, dtype=torch.bool))
    assert model(x).abs().sum() != twin(x).abs().sum()
    remove_noise(twin)
    assert torch.equal(twin(x), residual()(x))
    assert len(noise_layers(model)) == 3
    remove_noise(model)
    assert torch.equal(model(x), twin(x))


def test_a_whole_model_can_be_pickled():
    model, file = residual_with_noise(), io.BytesIO()
    kill(noise_layers(model))
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(image()), model(image()))
    remove_noise(loaded)
    assert torch.equal(loaded(image()), residual()(image()))


@torch_copies_its_own_deprecated_class
def test_export_sees_the_noise():
    model, x = residual_with_noise(), image(3)
    kill(noise_layers(model))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(x[:2]), model(x[:2]))


@torch_instantiates_its_own_autograd_function
def test_a_training_step_compiles_without_graph_breaks():
    torch.compiler.reset()
    model, x = residual_with_noise().train(), image()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for step in (model, compiled):
        torch.manual_seed(3)
        model.zero_grad()
        step(x).square().mean().backward()
        results.append([layer.mu.grad.clone() for layer in noise_layers(model)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-4, atol=1e-6)


def test_a_model_that_was_compiled_and_run_before_gets_its_noise():
    torch.compiler.reset()
    model, x = nn.Sequential(nn.Linear(3, 4)).eval(), torch.ones(2, 3)
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    insert_noise(model, "0")
    model[0].noise_after.switch_off(torch.ones(4, dtype=torch.bool))
    assert torch.equal(compiled(x), torch.zeros(2, 4))
    remove_noise(model)
    assert torch.equal(compiled(x), before)


def train_on(rank, folder):
    """One of two processes: two steps on half of the data each."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        model = residual_with_noise().train()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        torch.manual_seed(rank)
        for _ in range(2):
            optimizer.zero_grad()
            parallel(image(4)[rank::2]).square().mean().backward()
            optimizer.step()
        torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_keep_the_same_noise_parameters(tmp_path: Path):
    torch.multiprocessing.spawn(train_on, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    noise = [name for name in first if "noise" in name]
    assert len(noise) == 6
    assert all(torch.equal(first[name], second[name]) for name in noise)
    assert any(bool((first[name] != residual_with_noise().state_dict()[name]).any()) for name in noise)


@pytest.mark.parametrize("linear", [nn.Linear, lambda inputs, outputs: Conv1D(outputs, inputs)])
def test_feed_forward_blocks_in_the_style_of_transformers(linear):
    model = FeedForward(linear)
    x = {"hidden_states": torch.randn(2, 3, 6)}
    assert hidden_linears(model, (), kwargs=x, kinds=(nn.Linear, Conv1D)) == ("c_fc",)
    done = insert_noise(model, "c_fc", example_inputs=(), kwargs=x, dim=-1)
    assert done.inserted[0].layer.num_features == 16
    noisy = insert_noise(model, "norm", kwargs=x, before=True).inserted[0].layer
    noisy.switch_off(torch.ones(6, dtype=torch.bool))
    assert model.eval()(**x)[0].shape == (2, 3, 6)


def test_noise_multiplies_an_input_that_is_given_by_name():
    model = FeedForward(nn.Linear).eval()
    layer = (
        insert_noise(model, "", before=True, dim=-1, kwargs={"hidden_states": torch.ones(1, 2, 6)})
        .inserted[0]
        .layer
    )
    layer.switch_off(torch.ones(6, dtype=torch.bool))
    assert torch.equal(
        model(hidden_states=torch.ones(1, 2, 6))[0], model(hidden_states=torch.zeros(1, 2, 6))[0]
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lenet_500_300", ("1.0.linear", "1.1.linear")),
        ("vit", ("blocks.0.body.1.first.linear", "blocks.1.body.1.first.linear")),
        ("resnet18", ()),
    ],
)
def test_hidden_linears_are_those_read_by_linears_alone(name, wanted):
    model = ZOO[name].build(Places(NOWHERE))
    found = hidden_linears(model, ZOO[name].example())
    assert len(found) == len(wanted)
    assert all(hidden.endswith("linear") for hidden in found)


def test_both_halves_of_a_gated_block_are_hidden_and_what_is_added_or_returned_is_not():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
            self.extra, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = x + self.down(F.silu(self.gate(x)) * self.up(x))
            hidden = self.extra(x)
            return self.head(hidden), hidden

    model = Gated().train()
    assert hidden_linears(model, torch.randn(3, 4)) == ("gate", "up")
    assert model.training
    assert not model.gate._forward_hooks


def test_a_norm_with_a_forward_of_its_own_is_measured():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), ChannelsFirstNorm(4))
    with pytest.raises(
        NoiseArgumentError, match="a ChannelsFirstNorm gives is not known: give example_inputs"
    ):
        insert_noise(model, "1")
    with pytest.raises(NoiseArgumentError, match=r"anywhere in shape \(2, 4, 6, 6\): give dim"):
        insert_noise(model, "1", example_inputs=image())
    assert insert_noise(model, "1", example_inputs=image(), dim=1).inserted[0].layer.num_features == 4


def test_modules_that_cannot_take_noise_are_left_out_with_the_reason():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.entry, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.act = nn.ReLU()
            self.exit = nn.Linear(4, 6)

        def forward(self, x):
            x = self.act(self.entry(x))
            return self.act(self.exit(self.attention(x, x, x)[0]))

    model, x = Model(), torch.randn(2, 3, 4)
    done = insert_noise(model, (nn.Linear, nn.ReLU, nn.MultiheadAttention), dim=-1, example_inputs=x)
    assert [entry.name for entry in done.inserted] == ["entry", "exit"]
    assert done.skipped == {
        "unused": "the model does not call it",
        "attention": "it gives tuple, not one tensor of floats",
        "attention.out_proj": "torch's attention reads its weights without calling it",
        "act": "it is called several times and gives other numbers of features each time",
    }
    assert "not at unused: the model does not call it" in str(done)


def test_options_and_starts_reach_the_layers():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    done = insert_noise(model, "0", per_example=False, threshold=0.5, init_mu=-0.5, init_log_sigma=-2.0)
    layer = done.inserted[0].layer
    assert (layer.per_example, layer.threshold, layer.mu.dtype) == (False, 0.5, torch.float64)
    assert torch.equal(layer.mu, torch.full((4,), -0.5, dtype=torch.float64))
    assert torch.equal(layer.log_sigma, torch.full((4,), -2.0, dtype=torch.float64))
    assert not insert_noise(model.eval(), "1").inserted[0].layer.training


@pytest.mark.parametrize(
    ("where", "options", "error", "message"),
    [
        ("conv9", {}, NoiseArgumentError, r"`where` \('conv9'\) matches no module; there are 0, 0.conv1"),
        (nn.LSTM, {}, NoiseArgumentError, r"`where` \(LSTM\) matches no module"),
        ((), {}, NoiseArgumentError, "`where` is empty"),
        (nn.Linear(2, 2), {}, NoiseArgumentError, r"`where` is a module itself \(Linear\): give its name"),
        (3, {}, NoiseArgumentError, r"`where` \(=3\) must be a module class, a name or a function"),
        (
            "1",
            {},
            NoiseArgumentError,
            r"`where` \('1'\) cannot take noise: how many features a AdaptiveAvgPool2d",
        ),
        (nn.Flatten, {}, NoiseArgumentError, "no module that `where` chooses can take noise; '2': how many"),
        ("0.conv1", {"dim": 7, "example_inputs": image()}, NoiseArgumentError, r"dim \(=7\) is no dimension"),
        ("0.conv1", {"threshold": -1.0}, NoiseArgumentError, r"`threshold` \(=-1.0\)"),
        ("0.conv1", {"example_inputs": torch.ones(2, 4, 6, 6)}, InputError, "does not take example_inputs"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_changed(where, options, error, message):
    model = residual()
    names = list(model.state_dict())
    with pytest.raises(error, match=message):
        insert_noise(model, where, **options)
    assert list(model.state_dict()) == names
    assert not model[0].conv1._forward_hooks
