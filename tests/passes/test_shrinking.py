"""What must go, goes; what has to stay for exactness, stays. Every network is compared with the original too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import Pipeline, default_pipeline
from tests.passes.support import capture, check, shapes_of, targets_of

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Mask(nn.Module):
    """x times a per-channel vector with `live` entries that are not zero."""

    def __init__(self, features, live, rank=4):
        super().__init__()
        values = torch.rand(features) + 0.5
        values[torch.randperm(features)[live:]] = 0.0
        self.register_buffer("values", values.reshape(1, -1, *([1] * (rank - 2))))

    def forward(self, x):
        return x * self.values


def norm(features):
    layer = nn.BatchNorm2d(features)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2.0)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    return layer


def widths(program):
    """(output, input) channels of every contraction, in order."""
    found = []
    for node in program.calls():
        weight = program.constant(node.args[1]) if len(node.args) > 1 else None
        if (
            weight is not None
            and weight.ndim >= 2
            and "conv" in str(node.target) + "conv" * ("linear" in str(node.target))
        ):
            found.append(tuple(weight.shape[:2]))
    return found


IMAGE = torch.randn(2, 3, 8, 8)


def test_a_masked_channel_without_padding_leaves_only_its_constant():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), Mask(8, 5), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()
    )
    assert widths(check(network, IMAGE)) == [(5, 3), (4, 5)]


def test_zero_padding_keeps_one_representative_of_the_constants():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        Mask(8, 5),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1),
        nn.ReLU(),
    )
    assert widths(check(network, IMAGE)) == [(6, 3), (4, 6)]


def test_zero_constants_need_no_representative():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), Mask(8, 5), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()
    )
    assert widths(check(network, IMAGE)) == [(5, 3), (4, 5)]


def test_the_representative_serves_behind_a_padded_max_pool():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), Mask(8, 5), norm(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 4, 3, padding=1),
    )  # fmt: skip
    assert widths(check(network, IMAGE)) == [(6, 3), (4, 6)]


def test_two_padded_consumers_share_one_representative():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), Mask(8, 5), norm(8), nn.ReLU())
            self.left, self.right = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 6, 5, padding=2)

        def forward(self, x):
            x = self.first(x)
            return self.left(x), self.right(x)

    assert widths(check(Two(), IMAGE)) == [(6, 3), (4, 6), (6, 6)]


def test_a_masked_unit_between_linear_layers_goes():
    network = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), Mask(10, 3, rank=2), nn.Linear(10, 4))
    assert widths(check(network, torch.randn(2, 6))) == [(3, 6), (4, 3)]


def test_scales_leave_no_multiplication_behind_where_they_fold():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), Mask(8, 8), norm(8), nn.ReLU(), Mask(8, 8), nn.MaxPool2d(2), nn.Flatten(),
        Mask(72, 72, rank=2), nn.Linear(72, 4),
    )  # fmt: skip
    targets = targets_of(check(network, IMAGE))
    assert aten.mul.Tensor not in targets
    assert aten.add.Tensor not in targets


def test_a_scale_that_cannot_fold_stays_as_one_multiplication_by_the_kept_entries():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.scale, self.mask = Mask(8, 8), Mask(8, 5)

        def forward(self, x):
            left = torch.tanh(self.mask(self.scale(torch.tanh(self.left(x)))))
            return left + torch.tanh(self.mask(self.right(x)))

    result = check(Residual(), IMAGE)
    vectors = [value.shape for value in result.constants.values() if value.ndim == 4 and value.shape[0] == 1]
    assert targets_of(result).count(aten.mul.Tensor) <= 1
    assert all(shape[1] in (5, 8) for shape in vectors)


def test_a_wholly_masked_residual_branch_disappears():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.branch = nn.Sequential(
                nn.Conv2d(8, 16, 3, padding=1),
                norm(16),
                nn.ReLU(),
                nn.Conv2d(16, 8, 3, padding=1),
                Mask(8, 0),
            )

        def forward(self, x):
            x = F.relu(self.stem(x))
            return x + self.branch(x)

    result = check(Block(), IMAGE)
    assert widths(result) == [(8, 3)]
    assert aten.add.Tensor not in targets_of(result)


def test_a_wholly_masked_layer_leaves_a_constant_function():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        Mask(8, 0),
        norm(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    result = check(network, IMAGE)
    assert widths(result) == []


def test_different_masks_on_both_sides_of_an_add_keep_their_union():
    class Sides(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.first, self.second = Mask(8, 8), Mask(8, 8)
            self.first.values[:, :4] = 0.0
            self.second.values[:, 2:6] = 0.0
            self.last = nn.Conv2d(8, 5, 1)

        def forward(self, x):
            return self.last(F.relu(self.first(self.left(x)) + self.second(self.right(F.relu(x)))))

    assert widths(check(Sides(), IMAGE)) == [(6, 3), (6, 3), (5, 6)]


def test_noise_on_the_input_becomes_a_gather_where_that_pays():
    network = nn.Sequential(Mask(784, 100, rank=2), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))
    result = check(network, torch.randn(2, 784))
    assert widths(result) == [(200, 100), (10, 200)]
    assert targets_of(result).count(aten.index_select.default) == 1


def test_noise_on_a_small_input_becomes_zero_columns():
    network = nn.Sequential(Mask(16, 8, rank=2), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 10))
    result = check(network, torch.randn(2, 16))
    assert widths(result) == [(20, 16), (10, 20)]
    assert aten.index_select.default not in targets_of(result)


def test_a_masked_output_keeps_its_place_and_its_constant():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), Mask(5, 2, rank=2))
    result = check(network, torch.randn(2, 6))
    assert result.infos[result.outputs[0]].sizes[1] == 5


def test_flattened_masks_remove_the_channels_that_they_cover():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(72, 10)
            mask = (torch.rand(8, 9) > 0.5).float()
            mask[:3] = 0.0
            self.register_buffer("mask", mask.flatten())

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv(x)), 2)
            return self.linear(x.flatten(1) * self.mask)

    assert widths(check(Flat(), IMAGE))[0] == (5, 3)


def test_constants_that_pass_a_padded_depthwise_convolution_shrink():
    network = nn.Sequential(
        nn.Conv2d(3, 40, 1, bias=False), Mask(40, 10), norm(40), nn.ReLU6(),
        nn.Conv2d(40, 40, 3, padding=1, groups=40), norm(40), nn.ReLU6(), nn.Conv2d(40, 8, 1),
    )  # fmt: skip
    first, depthwise, last = widths(check(network, IMAGE))
    assert first[0] <= 10 + 9
    assert depthwise == (first[0], 1)
    assert last == (8, first[0])


def test_masked_channels_go_through_concatenation_and_split():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Mask(8, 3))
            self.second = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), Mask(6, 2))
            self.last = nn.Conv2d(14, 4, 1)

        def forward(self, x):
            x = self.first(x)
            x = torch.cat([x, self.second(x)], 1)
            left, right = x.split([7, 7], 1)
            return self.last(torch.cat([right, left], 1))

    assert widths(check(Dense(), IMAGE)) == [(3, 3), (2, 3), (4, 5)]


def test_an_opaque_operator_keeps_its_operand_whole():
    network = nn.Sequential(nn.Linear(6, 8), Mask(8, 3, rank=2), nn.Softmax(1), nn.Linear(8, 4))
    assert widths(check(network, torch.randn(2, 6)))[0] == (8, 6)


@pytest.mark.parametrize("dynamic", [True, False])
def test_squeeze_and_excitation_shrinks_with_its_stream(dynamic):
    class Excite(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
            self.down, self.up, self.mask = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), Mask(8, 5)

        def forward(self, x):
            x = F.relu(self.mask(self.conv(x)))
            gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
            return self.last(x * gate)

    assert widths(check(Excite(), IMAGE, dynamic=dynamic)) == [(5, 3), (4, 5), (5, 4), (4, 5)]


def test_dynamic_height_and_width_keep_the_border_exact():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), Mask(8, 5), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    )
    sizes = (
        {
            0: torch.export.Dim("batch"),
            2: torch.export.Dim("height", min=4),
            3: torch.export.Dim("width", min=4),
        },
    )
    assert widths(check(network, torch.randn(2, 3, 20, 24), dynamic=sizes)) == [(6, 3), (4, 6)]


def test_compiling_the_result_again_changes_nothing():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), Mask(8, 5), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), Mask(8, 4),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10),
    )  # fmt: skip
    once = default_pipeline()(capture(network, IMAGE)).program
    twice = default_pipeline()(once).program
    assert targets_of(twice) == targets_of(once)
    assert shapes_of(twice) == shapes_of(once)


def test_the_passes_leave_the_program_they_are_given_alone():
    original = capture(nn.Sequential(nn.Conv2d(3, 8, 3), Mask(8, 5), nn.ReLU(), nn.Conv2d(8, 4, 3)), IMAGE)
    text, constants = str(original.graph), {name: value.clone() for name, value in original.constants.items()}
    default_pipeline()(original)
    assert str(original.graph) == text
    assert all(torch.equal(value, constants[name]) for name, value in original.constants.items())


def test_every_step_of_the_pipeline_keeps_the_function():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), Mask(8, 5), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(),
        nn.Flatten(), Mask(144, 60, rank=2), nn.Linear(144, 5),
    )  # fmt: skip
    from tests.passes.support import assert_same

    original = capture(network, IMAGE)
    seen = []

    def compare(step):
        assert_same(original, step.after)
        seen.append(step.name)

    pipeline = default_pipeline().with_callback(compare)
    assert isinstance(pipeline, Pipeline)
    pipeline(original)
    wanted = {
        "canonicalize",
        "fold_scales",
        "analyze_channels",
        "absorb_constants",
        "shrink_channels",
        "remove_dead",
    }
    assert wanted <= set(seen)


def test_a_branch_times_the_number_zero_disappears():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.stem(x) + 0.0 * self.branch(x)

    assert widths(check(Block(), IMAGE)) == [(8, 3)]


def test_a_scale_folds_through_resampling():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Upsample(scale_factor=2, mode="bilinear"), Mask(8, 8), nn.Tanh()
    )
    assert aten.mul.Tensor not in targets_of(check(network, IMAGE))


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_scale_folds_through_a_mean_over_positions(keepdim, place):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            self.before, self.after = Mask(8, 8), Mask(8, 8, rank=4 if keepdim else 2)

        def forward(self, x):
            x = torch.tanh(self.conv(x)) if place == "before" else self.conv(x)
            x = self.before(x) if place == "before" else x
            x = x.mean((2, 3), keepdim=keepdim)
            x = torch.tanh(self.after(x)) if place == "after" else x
            return self.linear(x.flatten(1))

    assert aten.mul.Tensor not in targets_of(check(Mean(), IMAGE))
