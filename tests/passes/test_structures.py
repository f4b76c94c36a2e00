"""Masks without a noise layer in sight, and modules put together in uncommon ways: exact, and small."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from passes import Program
from tests.passes.support import check, shapes_of

aten = torch.ops.aten
LIVE = [0, 3, 4, 7]
DEAD = [1, 2, 5, 6]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Pair(nn.Module):
    """Convolution of 8 channels, batch norm, relu, convolution, mean over positions, linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 3)
        for value in (self.norm.running_mean, self.norm.bias, self.norm.weight):
            nn.init.normal_(value)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(hidden)).mean((2, 3)))


IMAGES = torch.randn(2, 2, 7, 7)


def filters(result: Program) -> list[int]:
    """How many filters each convolution has, in order."""
    calls = [node for node in result.calls() if node.target is aten.conv2d.default]
    return [result.infos[node.args[1]].sizes[0] for node in calls]


def widths(network: nn.Module) -> list[int]:
    return filters(check(network, IMAGES))


def zero(parameter: Tensor, index: object) -> None:
    with torch.no_grad():
        parameter[index] = 0.0


def test_gammas_of_zero_are_a_mask_even_if_betas_are_not():
    network = Pair()
    zero(network.norm.weight, DEAD)
    zero(network.norm.bias, DEAD)
    assert widths(network) == [4, 6]
    shifted = Pair()
    zero(shifted.norm.weight, DEAD)
    with torch.no_grad():
        shifted.norm.bias[DEAD] = torch.tensor([0.3, -0.2, 0.5, 1.0])
    assert widths(shifted) == [5, 6]  # the second convolution is padded: one constant stands for three


def test_filters_of_zero_are_a_mask_even_if_their_biases_are_not():
    network = Pair()
    zero(network.first.weight, DEAD)
    network.second.padding = (0, 0)
    assert widths(network) == [4, 6]


def test_columns_of_zero_are_a_mask():
    network = Pair()
    zero(network.second.weight, (slice(None), DEAD))
    zero(network.head.weight, (slice(None), [0, 5]))
    assert widths(network) == [4, 4]


def pruned(network: nn.Module, how: str) -> nn.Module:
    """Half of the filters (or of all weights) pruned away."""
    if how == "ln_structured":
        prune.ln_structured(network.first, "weight", 0.5, n=2, dim=0)
        prune.ln_structured(network.second, "weight", 0.5, n=1, dim=0)
    elif how == "random_structured":
        prune.random_structured(network.first, "weight", 4, dim=0)
        prune.random_structured(network.second, "weight", 3, dim=0)
    elif how == "input channels":
        prune.ln_structured(network.second, "weight", 0.5, n=2, dim=1)
        prune.ln_structured(network.head, "weight", 3, n=2, dim=1)
    elif how == "custom":
        mask = torch.zeros_like(network.first.weight)
        mask[LIVE] = 1.0
        prune.custom_from_mask(network.first, "weight", mask)
        prune.ln_structured(network.head, "weight", 3, n=2, dim=1)
    return network


@pytest.mark.parametrize("when", ["before remove", "after a forward", "after remove"])
@pytest.mark.parametrize("how", ["ln_structured", "random_structured", "input channels", "custom"])
def test_structured_pruning_is_a_mask(how, when):
    network = pruned(Pair(), how)
    network.second.padding = (0, 0)
    if when == "after a forward":
        network(IMAGES)
    elif when == "after remove":
        for module in (network.first, network.second, network.head):
            if prune.is_pruned(module):
                prune.remove(module, "weight")
    assert filters(check(network, IMAGES)) == [4, 3]


def test_unstructured_pruning_stays_exact_and_empty_filters_go():
    network = Pair()
    for module in (network.first, network.second):
        prune.l1_unstructured(module, "weight", 0.4)
    check(network, IMAGES)
    parameters = [(network.first, "weight"), (network.second, "weight"), (network.head, "weight")]
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=0.5)
    check(network, IMAGES)


def test_pruning_twice_is_one_mask():
    network = Pair()
    prune.ln_structured(network.first, "weight", 2, n=2, dim=0)
    prune.ln_structured(network.first, "weight", 2, n=2, dim=0)
    network.second.padding = (0, 0)
    assert filters(check(network, IMAGES)) == [4, 6]


class Mask(nn.Module):
    """A parametrization that zeroes rows."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_fill(0, torch.tensor(DEAD), 0.0)


@pytest.mark.parametrize("how", ["weight norm", "spectral norm", "orthogonal", "none"])
def test_parametrized_weights_are_constants(how):
    network = Pair()
    network.second.padding = (0, 0)
    if how == "weight norm":
        parametrizations.weight_norm(network.first, "weight")
    elif how == "spectral norm":
        parametrizations.spectral_norm(network.first, "weight")
    elif how == "orthogonal":
        parametrizations.orthogonal(network.first, "weight")
    parametrize.register_parametrization(network.first, "weight", Mask())
    shapes = shapes_of(check(network.eval(), IMAGES))
    assert shapes["second.weight"] == (6, 4, 3, 3)


def test_frozen_parameters_are_like_others():
    network = Pair().requires_grad_(False)
    zero(network.norm.weight, DEAD)
    zero(network.norm.bias, DEAD)
    assert widths(network) == [4, 6]


class Towers(nn.Module):
    """One tower called for two inputs, with a mask, and one head called for both."""

    def __init__(self, same_mask: bool) -> None:
        super().__init__()
        self.tower, self.head = nn.Linear(5, 8), nn.Linear(8, 4)
        left = torch.zeros(8).index_fill(0, torch.tensor(LIVE), 1.0)
        self.register_buffer("left", left)
        self.register_buffer("right", left if same_mask else left.roll(1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        first = self.head(torch.relu(self.tower(a)) * self.left)
        second = self.head(torch.relu(self.tower(b)) * self.right)
        return F.cosine_similarity(first, second, dim=-1)


def test_towers_with_one_mask_share_their_small_weights():
    shapes = shapes_of(check(Towers(True), torch.randn(3, 5), torch.randn(3, 5)))
    assert {name: shape for name, shape in shapes.items() if "." in name} == {
        "tower.weight": (4, 5), "tower.bias": (4,), "head.weight": (4, 4), "head.bias": (4,),
    }  # fmt: skip


def test_towers_with_two_masks_get_weights_of_their_own():
    shapes = shapes_of(check(Towers(False), torch.randn(3, 5), torch.randn(3, 5)))
    assert [shape for name, shape in shapes.items() if name.startswith("tower.weight")] == [(4, 5), (4, 5)]
    assert [shape for name, shape in shapes.items() if name.startswith("head.weight")] == [(4, 4), (4, 4)]


class On(nn.Module):
    """A function of two masked linear layers and whatever inputs there are."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.register_buffer("mask", torch.zeros(8).index_fill(0, torch.tensor(LIVE), 1.0))
        self.register_buffer("other", torch.arange(6.0))
        self.function = function

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) * self.mask

    def forward(self, *inputs: Tensor):
        return self.function(self, *inputs)


X = torch.randn(3, 6)


def compiled(function, *inputs: Tensor):
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    return check(On(function), *inputs, dynamic=(shapes,))


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda self, x: self.second(self.second(self.hidden(x)) @ self.second.weight), (X,)),
        (lambda self, x: F.linear(F.linear(self.hidden(x), self.second.weight), self.first.weight), (X,)),
        (lambda self, x, y: (self.second(self.hidden(x) + self.hidden(y)), self.second(self.hidden(y))), (X, X + 1)),
        (lambda self, x, y: {"a": self.second(self.hidden(x)), "b": (y, self.hidden(y))}, (X, X)),
        (lambda self, x: (self.other, self.second(self.hidden(x)), 3, None, "text"), (X,)),
        (lambda self, x: (x, self.second(self.hidden(x))), (X,)),
        (lambda self, x, y: self.second(self.hidden(x)), (X, X)),
        (lambda self, x: (self.hidden(x) * 0.0, self.second(self.hidden(x))), (X,)),
        (lambda self, x: self.hidden(x) * (1 - self.mask), (X,)),
        (lambda self, i: self.second(self.hidden(i.float() * 0.5)), (torch.randint(0, 5, (3, 6)),)),
        (lambda self, x, i: self.second(self.hidden(x))[:, :1] * i, (X, torch.randint(0, 5, (3, 6)))),
        (lambda self, x: self.first(self.second(self.hidden(self.second(self.hidden(x))))), (X,)),
    ],
    ids=[
        "functional product", "two weights used again", "called at three places", "nested dict", "constant outputs",
        "an input returned", "an unused input", "a wholly masked output", "masked twice", "integer input",
        "two dtypes", "called again and again",
    ],
)  # fmt: skip
def test_uncommon_structures_are_exact(function, inputs):
    compiled(function, *inputs)


def test_a_layer_called_at_two_places_shrinks_at_both():
    shapes = shapes_of(compiled(lambda self, x, y: self.second(self.hidden(x) + self.hidden(y)), X, X))
    assert shapes["first.weight"] == (4, 6)
    assert shapes["second.weight"] == (6, 4)


def test_an_output_that_is_masked_is_whole():
    result = compiled(lambda self, x: (self.hidden(x), self.second(self.hidden(x))), X)
    assert [result.infos[node].sizes[1] for node in result.outputs] == [8, 6]


class Branching(nn.Module):
    """Control flow between two masked layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.yes, self.no = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("mask", torch.zeros(8).index_fill(0, torch.tensor(LIVE), 1.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x)) * self.mask
        chosen = torch.cond(x.sum() > 0, lambda h: self.yes(h), lambda h: self.no(h), (hidden,))
        return self.last(torch.relu(chosen) * self.mask)


def test_a_branch_on_data_compiles():
    with torch.no_grad():
        small = check(Branching(), X)
    assert torch.ops.higher_order.cond in {getattr(node.target, "operator", None) for node in small.calls()}
