import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import Canonicalize
from tests.passes.support import assert_same, capture, check, targets_of

aten = torch.ops.aten


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def canonical(function, *shape):
    original = capture(Call(function), torch.randn(shape))
    result = Canonicalize()(original).program
    assert_same(original, result)
    return [target for target in targets_of(result) if target is not aten.sym_size.int]


SPELLINGS = [
    (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], (2, 3, 6, 6), aten.max_pool2d.default),
    (lambda x: F.max_pool3d(x, 2, return_indices=True)[0], (2, 3, 4, 4, 4), aten.max_pool3d.default),
    (lambda x: F.adaptive_max_pool1d(x, 1), (2, 3, 7), aten.amax.default),
    (lambda x: F.adaptive_max_pool2d(x, 1), (2, 3, 7, 5), aten.amax.default),
    (lambda x: F.adaptive_max_pool2d(x, (3, 2)), (2, 3, 6, 6), aten.max_pool2d.default),
    (lambda x: x.max(1).values, (2, 3, 6), aten.amax.default),
    (lambda x: x.min(-1, keepdim=True)[0], (2, 3, 6), aten.amin.default),
    (lambda x: x.max(), (2, 3, 6), aten.amax.default),
    (lambda x: x.min(), (2, 3, 6), aten.amin.default),
    (lambda x: F.pad(x, (1, 2), value=3.0), (2, 3, 6), aten.constant_pad_nd.default),
    (lambda x: F.pad(x, (1, 2), mode="reflect"), (2, 3, 6), aten.reflection_pad1d.default),
    (lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), (2, 3, 6, 6), aten.replication_pad2d.default),
]


@pytest.mark.parametrize(("function", "shape", "target"), SPELLINGS)
def test_each_has_one_spelling(function, shape, target):
    assert canonical(function, *shape) == [target]


@pytest.mark.parametrize("size", [4, 5, (3, 4), (7, 2), (9, 1)])
def test_an_adaptive_maximum_that_does_not_divide_reads_positions_repeatedly(size):
    targets = canonical(lambda x: F.adaptive_max_pool2d(x, size), 2, 3, 6, 7)
    assert targets[-1] is aten.max_pool2d.default
    assert set(targets[:-1]) == {aten.index_select.default}


def test_an_adaptive_maximum_over_dynamic_sizes_stays():
    program = capture(
        Call(lambda x: F.adaptive_max_pool1d(x, 4)),
        torch.randn(2, 3, 9),
        dynamic=({2: torch.export.Dim("n", min=5)},),
    )
    assert aten.adaptive_max_pool1d.default in targets_of(Canonicalize()(program).program)


def test_a_pool_whose_indices_are_read_stays():
    def both(x):
        values, indices = F.max_pool2d(x, 2, return_indices=True)
        return values + indices

    assert aten.max_pool2d_with_indices.default in canonical(both, 2, 3, 6, 6)


@pytest.mark.parametrize("pads", [(0, 0), (0, 0, 0, 0)])
def test_a_pad_that_adds_nothing_goes(pads):
    assert canonical(lambda x: F.relu(F.pad(x, pads)), 2, 3, 6, 6) == [aten.relu.default]


@pytest.mark.parametrize("padding", [0, 1])
def test_an_average_with_its_own_divisor_is_a_plain_one_times_a_number(padding):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 2, padding, divisor_override=5))
    targets = targets_of(check(network, torch.randn(2, 3, 9, 8)))
    assert torch.ops.aten.avg_pool2d.default in targets
    assert torch.ops.aten.mul.Tensor not in targets


@pytest.mark.parametrize(
    ("pool", "sizes", "stays"),
    [
        (nn.MaxPool2d(1, 2, ceil_mode=True), (6, 2), False),
        (nn.MaxPool2d(3, 2, ceil_mode=True), (7, 9), False),
        (nn.MaxPool2d(3, 2, ceil_mode=True), (8, 9), True),
        (nn.MaxPool2d(2, 2, dilation=2, ceil_mode=True), (6, 6), True),
        (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True), (7, 7), False),
        (nn.AvgPool2d(2, ceil_mode=True, divisor_override=3), (6, 8), False),
        (nn.AvgPool2d(2, ceil_mode=True), (5, 8), True),
    ],
)
def test_a_pool_in_ceil_mode_stays_one_only_where_it_has_windows_more(pool, sizes, stays):
    result = check(nn.Sequential(nn.Conv2d(3, 4, 1), pool), torch.randn(2, 3, *sizes))
    (call,) = [node for node in result.calls() if "pool" in str(node.target)]
    assert result.op(call).args["ceil_mode"] == stays


@pytest.mark.parametrize(
    ("function", "target"),
    [
        (lambda a, b: a & b, aten.bitwise_and.Tensor),
        (lambda a, b: a | b, aten.bitwise_or.Tensor),
        (lambda a, b: a ^ b, aten.bitwise_xor.Tensor),
    ],
)
def test_operators_between_masks_are_spelled_as_functions(function, target):
    assert target in canonical(lambda x: torch.where(function(x > 0, x < 1), x, 0.5), 2, 3)


def normed(x, groups, shape, weight=None, bias=None):
    flat = F.instance_norm(x.reshape(x.shape[0], groups, -1), weight=weight, bias=bias)
    return flat.reshape(shape(x))


@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (2, 8, 6), (2, 8)])
@pytest.mark.parametrize("groups", [1, 4])
def test_an_instance_norm_between_views_is_a_group_norm(shape, groups):
    weight, bias = torch.randn(groups), torch.randn(groups)
    found = canonical(lambda x: normed(x, groups, lambda x: x.shape, weight, bias), *shape)
    assert found == [aten.group_norm.default]


@pytest.mark.parametrize(
    ("groups", "shape"),
    [(4, lambda x: (x.shape[0], 4, -1, 3)), (16, lambda x: x.shape), (4, lambda x: (-1, 5, 3))],
)
def test_an_instance_norm_whose_groups_are_no_whole_channels_stays(groups, shape):
    found = canonical(lambda x: normed(x, groups, shape), 2, 8, 5, 3 * (groups // 4))
    assert aten.instance_norm.default in found


def heads(x, start, end, axes):
    parts = x.reshape(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    return parts[start:end].squeeze(axes)


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 2), (-1, None), (-3, -2), (-9, 1)])
def test_a_slice_of_one_entry_that_is_squeezed_is_a_piece_of_the_flat_axis(start, end):
    found = canonical(lambda x: heads(x, start, end, 0), 2, 5, 24)
    assert (aten.squeeze.dim in found) == (start == -9)
    assert found.index(aten.slice.Tensor) == (0 if start > -9 else 2)


def test_parts_of_a_conjugate_that_became_a_constant():
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.ihfft(x * torch.zeros(8, 1)).real + x.mean()

    check(Spectrum(), torch.randn(2, 8, 4))
