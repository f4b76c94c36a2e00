"""Recipes: the masks of one checkpoint on another, exactly; and what does not fit is named."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sbp_compile
from sbp_compile.errors import UsageError
from sbp_compile.nn import LogNormalNoise
from sbp_compile.recipe import Recipe, load_recipe
from sbp_compile.recipe_file import numbers, ranges
from tests.networks import Masked, assert_close


class Convolutions(nn.Module):
    """Noise before a bias, the scale of a norm, rows of a weight, and a mask of flattened features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.noise = LogNormalNoise(8, dim=1)
        self.bias = nn.Parameter(torch.randn(8, 1, 1))
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.third = nn.Conv2d(6, 5, 3)
        self.flat = LogNormalNoise(5 * 16, dim=1)
        self.head = nn.Linear(5 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.noise(self.first(x)) + self.bias)
        x = torch.relu(self.norm(self.second(x)))
        x = torch.relu(self.third(x))
        return self.head(self.flat(x.flatten(1)))


def checkpoint(seed: int) -> Convolutions:
    """A trained network without anything switched off."""
    torch.manual_seed(seed)
    network = Convolutions().eval()
    with torch.no_grad():
        for value in (network.norm.running_mean, network.norm.weight, network.norm.bias):
            value.normal_()
        for noise in (network.noise, network.flat):
            noise.mu.normal_(-0.3, 0.2)
    return network


def switch_off(noise: LogNormalNoise, off: list[int]) -> None:
    with torch.no_grad():
        noise.log_sigma[off] = 3.0


def masked(network: Convolutions) -> Convolutions:
    """A network with units switched off in each way."""
    network = copy.deepcopy(network)
    switch_off(network.noise, [1, 2, 6])
    switch_off(network.flat, list(range(0, 80, 3)))
    with torch.no_grad():
        network.norm.weight[[0, 5]] = 0.0
        network.third.weight[2] = 0.0
    return network


def widths(compiled: sbp_compile.Compiled) -> dict[str, int]:
    return {layer.name: layer.kept for layer in compiled.report.layers}


EXAMPLE = (torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "out.json"
    sbp_compile.compile(masked(checkpoint(0)), EXAMPLE).recipe().save(path)
    return load_recipe(path)


def test_the_masks_of_one_checkpoint_on_another_are_its_own_zeros(recipe: Recipe) -> None:
    other = checkpoint(1)
    compiled = sbp_compile.compile(other, EXAMPLE, recipe=recipe)
    by_hand = masked(other)
    for batch in (1, 3):
        x = torch.randn(batch, 2, 6, 6)
        assert_close(by_hand(x).detach(), compiled.module(x).detach())
        assert (other(x) - compiled.module(x)).abs().max() > 0.01
    assert widths(compiled) == widths(sbp_compile.compile(by_hand, EXAMPLE))


def test_the_checkpoint_itself_is_not_changed(recipe: Recipe) -> None:
    other = checkpoint(1)
    before = copy.deepcopy(other.state_dict())
    sbp_compile.compile(other, EXAMPLE, recipe=recipe)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_applied_to_its_own_checkpoint_it_changes_nothing(recipe: Recipe) -> None:
    own = masked(checkpoint(0))
    plain, again = sbp_compile.compile(own, EXAMPLE), sbp_compile.compile(own, EXAMPLE, recipe=recipe)
    assert widths(plain) == widths(again)
    assert again.recipe() == recipe


def test_channels_that_the_other_checkpoint_switches_off_go_too(recipe: Recipe) -> None:
    other = checkpoint(1)
    switch_off(other.noise, [0, 1])
    compiled = sbp_compile.compile(other, EXAMPLE, recipe=recipe)
    assert_close(masked(other)(EXAMPLE[0]).detach(), compiled.module(*EXAMPLE).detach())
    assert widths(compiled)["first"] < next(
        layer.kept_number for layer in recipe.layers if layer.name == "first"
    )
    assert any(
        note.where == "first" and "channels are kept here, " in note.text for note in compiled.report.notes
    )


def test_it_says_which_channels_stay_and_why_the_others_went(recipe: Recipe) -> None:
    first, second, third, head = recipe.layers
    assert (first.name, first.channels) == ("first", 8)
    assert set(first.constant) | set(first.dead) | set(first.kept or ()) == set(range(8))
    assert {1, 2, 6} & set(first.kept or ()) == {channel for _, those in first.kept_for for channel in those}
    assert {0, 5} - set(second.kept or ()) <= set(second.constant) | set(second.dead)
    assert 2 not in (third.kept or ())
    assert head.kept == (0, 1, 2)
    for layer in recipe.layers:
        assert layer.kept is not None
        assert len(layer.kept) == layer.kept_number


def test_pruned_weights_are_masks_whatever_computes_them() -> None:
    torch.manual_seed(0)
    first, second = Masked().eval(), Masked().eval()
    prune.ln_structured(first.first, "weight", 2, n=2, dim=0)
    recipe = sbp_compile.compile(first, torch.randn(4, 6)).recipe()
    prune.identity(second.first, "weight")
    compiled = sbp_compile.compile(second, torch.randn(4, 6), recipe=recipe)
    with torch.no_grad():
        second.first.weight_mask.copy_(first.first.weight_mask)
        x = torch.randn(5, 6)
        assert_close(second(x), compiled.module(x))


class Other(Masked):
    def __init__(self, hidden: int, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.first = nn.Linear(6, hidden)
        self.second = nn.Linear(hidden, 3)
        self.register_buffer("mask", (torch.arange(hidden) % 2).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.leaky_relu(self.first(x), self.slope) * self.mask)


@pytest.mark.parametrize(
    ("hidden", "slope", "message"),
    [
        (10, 0.1, r"it has .*first\.weight\[8, 6\].* where the model has .*first\.weight\[10, 6\]"),
        (8, 0.2, r"it has .*leaky_relu.*0\.1.* where the model has .*leaky_relu.*0\.2"),
    ],
)
def test_another_architecture_is_refused_with_the_first_mismatch(
    hidden: int, slope: float, message: str
) -> None:
    recipe = sbp_compile.compile(Other(8, 0.1).eval(), torch.randn(4, 6)).recipe()
    with pytest.raises(UsageError, match=message):
        sbp_compile.compile(Other(hidden, slope).eval(), torch.randn(4, 6), recipe=recipe)


def test_a_recipe_of_a_deeper_network_is_refused() -> None:
    deep = sbp_compile.compile(nn.Sequential(Masked(), nn.ReLU()).eval(), torch.randn(4, 6)).recipe()
    with pytest.raises(UsageError, match="the recipe is of another architecture"):
        sbp_compile.compile(nn.Sequential(Masked()).eval(), torch.randn(4, 6), recipe=deep)


def test_a_mask_that_fits_no_operand_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    recipe.save(tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    content["masks"][0]["shape"] = [4, 4]
    content["masks"][0]["axis"] = 0
    content["masks"][0]["zeros"] = "0-1"
    (tmp_path / "out.json").write_text(json.dumps(content))
    with pytest.raises(
        UsageError, match=r"the recipe masks operand .* with shape \[4, 4\], the model's is \["
    ):
        sbp_compile.compile(checkpoint(1), EXAMPLE, recipe=load_recipe(tmp_path / "out.json"))


BAD = {
    "text": "hello",
    "list": "[]",
    "other": '{"format": "x", "version": 1}',
    "later": '{"format": "sbp_compile recipe", "version": 2}',
    "empty": '{"format": "sbp_compile recipe", "version": 1}',
    "deep": "[" * 100_000,
    "huge run": '{"format": "sbp_compile recipe", "version": 1, "layers": [], "structure": [], "masks": '
    '[{"value": "a", "argument": ["b", null], "shape": [3], "axis": 0, "zeros": "0-999999999999"}]}',
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_recipe_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text(BAD[kind])
    with pytest.raises(UsageError, match="is no recipe of sbp_compile") as found:
        load_recipe(tmp_path / "out.json")
    assert "\n" not in str(found.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read recipe '.*out\.json': no such file"):
        load_recipe(tmp_path / "out.json")


@pytest.mark.parametrize("values", [(), (0,), (0, 1, 2), (5, 3, 4, 9), (7, 6, 5)])
def test_numbers_come_back_from_their_text_in_order(values: tuple[int, ...]) -> None:
    assert numbers(ranges(values), 10) == values


@pytest.mark.parametrize("text", ["10", "3-2", "a", "-1", "1,,2", "1,1", "0-3,2"])
def test_text_that_is_no_run_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no run of numbers below 10|is listed twice"):
        numbers(text, 10)
