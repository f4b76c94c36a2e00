"""Concatenation and stacking: DenseNet, U-Net and Inception shrink, and what is not read is not joined."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.support import check, shapes_of, targets_of

aten = torch.ops.aten


class Branch(nn.Module):
    """A convolution, a mask (1 at the kept channels), a relu."""

    def __init__(self, inputs, channels, kept, kernel=1, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, kernel, stride, kernel // 2)
        self.mask = torch.zeros(channels).index_fill(0, torch.tensor(kept, dtype=torch.int64), 1.0)[
            :, None, None
        ]

    def forward(self, x):
        return F.relu(self.conv(x) * self.mask)


class Net(nn.Module):
    """Two masked branches of 8 and 6 channels (5 and 3 kept), joined somehow, and a convolution."""

    def __init__(self, join, inputs):
        super().__init__()
        self.left, self.right = Branch(3, 8, [0, 1, 3, 4, 6]), Branch(3, 6, [0, 2, 5])
        self.join, self.out = join, nn.Conv2d(inputs, 2, 3, padding=1)

    def forward(self, x):
        return self.out(self.join(self.left(x), self.right(x)))


def compiled(join, inputs, dynamic=True):
    """(channels of the two branches, inputs of the last convolution, operators of the result) after compilation."""
    result = check(Net(join, inputs), torch.randn(2, 3, 6, 6), dynamic=dynamic)
    shapes = shapes_of(result)
    branches = [shapes.get(f"{name}.conv.weight", (0,))[0] for name in ("left", "right")]
    return branches, shapes["out.weight"][1], targets_of(result)


CAT_OF_TWO = [aten.conv2d.default, aten.relu.default] * 2 + [aten.cat.default, aten.conv2d.default]
ONE_BRANCH = [aten.conv2d.default, aten.relu.default, aten.conv2d.default]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    ("join", "inputs", "wanted"),
    [
        (lambda a, b: torch.cat([a, b], 1), 14, ([5, 3], 8, CAT_OF_TWO)),
        (lambda a, b: torch.cat([b, a, b], -3), 20, ([5, 3], 11, CAT_OF_TWO)),
        (lambda a, b: torch.cat([a, b], 1)[:, :8], 8, ([5, 0], 5, ONE_BRANCH)),
        (lambda a, b: torch.cat([a, b], 1).split([8, 6], 1)[1], 6, ([0, 3], 3, ONE_BRANCH)),
        (lambda a, b: torch.cat([a, b * 0.0], 1), 14, ([5, 0], 5, ONE_BRANCH)),
        (lambda a, b: torch.cat([a, b[:, :0]], 1), 8, ([5, 0], 5, ONE_BRANCH)),
        (lambda a, b: torch.cat([a, b[:, :0], b], 1), 14, ([5, 3], 8, CAT_OF_TWO)),
    ],
)
def test_a_concatenation_joins_what_is_kept_of_the_operands_that_are_read(join, inputs, wanted, dynamic):
    assert compiled(join, inputs, dynamic) == wanted


def test_operands_joined_along_height_keep_the_same_channels():
    branches, read, _ = compiled(lambda a, b: torch.cat([a[:, 1:7], b], 2), 6)
    assert branches == [read, read]
    assert read == 4


def test_constants_in_a_concatenation_are_absorbed():
    class Coordinates(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.out = Branch(3, 8, [1, 2]), nn.Conv2d(10, 2, 3)
            self.register_buffer("grid", torch.randn(1, 2, 1, 1))

        def forward(self, x):
            return self.out(torch.cat([self.grid.expand(x.shape[0], 2, 6, 6), self.branch(x)], 1))

    result = check(Coordinates(), torch.randn(2, 3, 6, 6))
    assert shapes_of(result)["out.weight"] == (2, 2, 3, 3)
    assert aten.cat.default not in targets_of(result)


def test_a_dense_block_shrinks_in_every_layer():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = Branch(3, 8, [0, 2, 3])
            self.layers = nn.ModuleList(Branch(8 + 4 * i, 4, [i, 3]) for i in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(4))
            self.out = nn.Conv2d(20, 2, 1)
            for norm in self.norms:
                norm.running_mean.normal_()

        def forward(self, x):
            x = self.stem(x)
            for layer, norm in zip(self.layers, self.norms, strict=False):
                x = torch.cat([x, layer(F.relu(norm(x)))], 1)
            return self.out(F.relu(self.norms[3](x)))

    shapes = shapes_of(check(Dense(), torch.randn(2, 3, 6, 6)))
    assert shapes["stem.conv.weight"][0] == 3
    assert [shapes[f"layers.{i}.conv.weight"][0] for i in range(3)] == [2, 2, 2]
    assert shapes["out.weight"] == (2, 9, 1, 1)


def test_a_skip_over_a_pooled_path_shrinks_on_both_sides():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.deep, self.out = (
                Branch(3, 8, [0, 2, 3]),
                Branch(8, 10, [1, 9], 3),
                nn.Conv2d(18, 2, 3),
            )

        def forward(self, x):
            skip = self.down(x)
            up = F.interpolate(self.deep(F.max_pool2d(skip, 2)), scale_factor=2)
            return self.out(torch.cat([up, skip], 1))

    shapes = shapes_of(check(UNet(), torch.randn(2, 3, 8, 8)))
    assert shapes["down.conv.weight"][0] == 3
    assert shapes["deep.conv.weight"] == (2, 3, 3, 3)
    assert shapes["out.weight"] == (2, 5, 3, 3)


def test_an_inception_block_loses_a_masked_branch_and_shrinks_the_others():
    class Inception(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(
                [Branch(3, 4, [0, 2]), Branch(3, 4, []), Branch(3, 6, [1, 2, 3], 3), Branch(3, 2, [1], 5)]
            )
            self.out = nn.Conv2d(16, 2, 1)

        def forward(self, x):
            return self.out(torch.cat([branch(x) for branch in self.branches], 1))

    shapes = shapes_of(check(Inception(), torch.randn(2, 3, 8, 8)))
    assert shapes["out.weight"] == (2, 6, 1, 1)
    assert "branches.1.conv.weight" not in shapes


@pytest.mark.parametrize("dynamic", [True, False])
def test_of_a_stack_only_what_is_read_is_stacked(dynamic):
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.dead = Branch(3, 6, [0, 1, 5]), Branch(3, 6, [1, 2]), Branch(3, 6, [])
            self.out = nn.Linear(6, 2)

        def forward(self, x):
            stacked = torch.stack([self.left(x), self.dead(x), self.right(x)], 2)
            return self.out(stacked.movedim(1, -1))[:, [0, 2]]

    result = check(Stacked(), torch.randn(2, 3, 4, 4), dynamic=dynamic)
    stack = next(node for node in result.calls() if node.target is aten.stack.default)
    assert len(stack.args[0]) == 2
    assert shapes_of(result)["out.weight"] == (2, 4)
    assert "dead.conv.weight" not in shapes_of(result)


def test_a_stack_of_one_read_operand_is_an_unsqueeze():
    branches, read, targets = compiled(lambda a, b: torch.stack([a, a * torch.zeros(8, 1, 1)], 1).sum(1), 8)
    assert aten.stack.default not in targets
    assert (branches, read) == ([5, 0], 5)


def test_operands_joined_along_the_batch_keep_the_same_channels():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.out = Branch(3, 8, [1, 6]), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            branch = self.branch(x)
            return self.out(torch.cat([branch, F.relu(branch - 0.5)], 0))

    result = check(Twice(), torch.randn(2, 3, 4, 4))
    assert shapes_of(result)["branch.conv.weight"][0] == 2
    assert shapes_of(result)["out.weight"][1] == 2


def test_mixed_dtypes_are_promoted_as_before():
    class Mixed(nn.Module):
        def forward(self, x):
            return torch.cat([x, (x > 0).to(torch.int64)], 1)

    assert aten.cat.default in targets_of(check(Mixed(), torch.randn(2, 3)))
