"""Networks built on moving entries: each layer keeps exactly the channels that its masks leave."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.support import check, shapes_of, targets_of

aten = torch.ops.aten
DENSITIES = (0.7, 0.5, 0.1)
EVERYTHING_DYNAMIC = (
    {
        0: torch.export.Dim("batch"),
        2: 2 * torch.export.Dim("height", min=2, max=64),
        3: 2 * torch.export.Dim("width", min=2, max=64),
    },
)


def mask(channels, density, seed, multiple=1):
    """A random mask with at least one channel, in runs of `multiple`."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(channels // multiple, generator=generator) < density
    chosen[int(torch.randint(channels // multiple, (1,), generator=generator))] = True
    return chosen.float().repeat_interleave(multiple)


class Masked(nn.Module):
    """A convolution, a mask, a nonlinearity that keeps zeros."""

    def __init__(self, ins, outs, kernel, density, seed, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, kernel, padding=kernel // 2, groups=groups)
        self.mask = mask(outs, density, seed)[:, None, None]

    @property
    def count(self):
        return int(self.mask.sum())

    def forward(self, x):
        return F.hardswish(self.conv(x)) * self.mask


def shuffled(x, groups):
    batch, channels, height, width = x.shape
    split = x.view(batch, groups, channels // groups, height, width)
    return split.transpose(1, 2).contiguous().view(batch, channels, height, width)


def compiled(net, dynamic=EVERYTHING_DYNAMIC):
    result = check(net, torch.randn(2, 3, 8, 8), dynamic=dynamic)
    return shapes_of(result), targets_of(result)


class ShuffleNet(nn.Module):
    """Units of version 2: split, transform one half, concatenate, shuffle."""

    def __init__(self, density, channels=16):
        super().__init__()
        half = channels // 2
        self.stem, self.head = Masked(3, channels, 3, density, 0), nn.Conv2d(channels, 4, 1)
        self.first = nn.ModuleList(Masked(half, half, 1, density, 1 + unit) for unit in range(2))
        self.second = nn.ModuleList(Masked(half, half, 1, density, 5 + unit) for unit in range(2))

    def forward(self, x):
        x = self.stem(x)
        for first, second in zip(self.first, self.second, strict=True):
            left, right = x.chunk(2, 1)
            x = shuffled(torch.cat([left, second(first(right))], 1), 2)
        return self.head(x)


@pytest.mark.parametrize("density", [0.7, 0.5])
def test_units_with_a_channel_shuffle_keep_what_their_masks_leave(density):
    net = ShuffleNet(density)
    shapes, targets = compiled(net)
    live = torch.cat([net.stem.mask[:8], net.second[0].mask], 0).flatten()[
        torch.arange(16).view(2, 8).T.flatten()
    ]
    live = torch.cat([live[:8], net.second[1].mask.flatten()])
    assert shapes["head.weight"][1] == int(live.sum())
    for unit in range(2):
        assert shapes[f"second.{unit}.conv.weight"][0] == net.second[unit].count
    assert aten.permute.default not in targets
    assert aten.transpose.int not in targets


class Shuffles(nn.Module):
    """Shuffles between plain and depthwise layers, as a call and with views."""

    def __init__(self, density):
        super().__init__()
        self.first = Masked(3, 12, 3, density, 0)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.second, self.out = Masked(12, 12, 1, density, 1), nn.Conv2d(12, 4, 3)

    def forward(self, x):
        x = self.depthwise(F.channel_shuffle(self.first(x), 3))
        return self.out(shuffled(self.second(x), 4))


@pytest.mark.parametrize("density", DENSITIES)
def test_shuffles_between_layers_leave_nothing_behind(density):
    net = Shuffles(density)
    shapes, targets = compiled(net)
    assert shapes["depthwise.weight"][0] == net.first.count
    assert shapes["out.weight"][1] == net.second.count
    assert set(targets) <= {aten.conv2d.default, aten.hardswish.default, aten.mul.Tensor}


def rearranged(x, factor):
    batch, channels, height, width = x.shape
    split = x.view(batch, channels // factor**2, factor, factor, height, width)
    return split.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * factor, width * factor)


class SuperResolution(nn.Module):
    """Two steps of sub-pixel convolution, with a mask behind the first."""

    def __init__(self, density, shuffle):
        super().__init__()
        self.first, self.up = Masked(3, 12, 3, density, 0), nn.Conv2d(12, 48, 3, padding=1)
        self.out, self.shuffle = nn.Conv2d(12, 12, 3, padding=1), shuffle
        self.mask = mask(12, density, 2)[:, None, None]

    def forward(self, x):
        return self.shuffle(self.out(F.hardswish(self.shuffle(self.up(self.first(x)), 2)) * self.mask), 2)


@pytest.mark.parametrize("shuffle", [F.pixel_shuffle, rearranged])
@pytest.mark.parametrize("density", DENSITIES)
def test_sub_pixel_convolutions_make_the_channels_that_are_read(density, shuffle):
    net = SuperResolution(density, shuffle)
    shapes, _ = compiled(net)
    kept = int(net.mask.sum())
    assert shapes["up.weight"][:2] == (4 * kept, net.first.count)
    assert shapes["out.weight"][:2] == (12, kept)


def space_to_depth(x):
    batch, channels, height, width = x.shape
    split = x.view(batch, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * 4, height // 2, width // 2)


@pytest.mark.parametrize(
    "down",
    [
        lambda x: F.pixel_unshuffle(x, 2),
        space_to_depth,
        lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1),
        lambda x: F.unfold(x, 2, stride=2).view(x.shape[0], -1, x.shape[2] // 2, x.shape[3] // 2),
    ],
)
@pytest.mark.parametrize("density", DENSITIES)
def test_space_to_depth_passes_pruned_channels_on(density, down):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = Masked(3, 12, 3, density, 0), nn.Conv2d(48, 4, 1)

        def forward(self, x):
            return self.out(down(self.first(x)))

    net = Net()
    assert compiled(net)[0]["out.weight"][1] == 4 * net.first.count


class Windows(nn.Module):
    """Shifted windows of tokens, an MLP on each, and back."""

    def __init__(self, density, window=2):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 12), nn.Linear(12, 4)
        self.first, self.second, self.window = nn.Linear(12, 24), nn.Linear(24, 12), window
        self.masks = [mask(size, density, seed) for seed, size in enumerate((12, 24, 12))]

    def forward(self, x):
        before, hidden, after = self.masks
        x = torch.roll(self.embed(x.permute(0, 2, 3, 1)) * before, (-1, -1), (1, 2))
        batch, height, width, channels = x.shape
        split = (batch, height // self.window, self.window, width // self.window, self.window, channels)
        x = x.view(split).permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, channels)
        x = self.second(F.gelu(self.first(x)) * hidden) * after
        x = x.view(split[0], split[1], split[3], self.window, self.window, channels)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
        return self.head(torch.roll(x, (1, 1), (1, 2)))


@pytest.mark.parametrize("dynamic", [EVERYTHING_DYNAMIC, True])
@pytest.mark.parametrize("density", DENSITIES)
def test_channels_shrink_through_shifted_windows(density, dynamic):
    net = Windows(density)
    shapes, _ = compiled(net, dynamic)
    before, hidden, after = (int(each.sum()) for each in net.masks)
    assert [shapes[f"{name}.weight"] for name in ("first", "second", "head")] == [
        (hidden, before), (after, hidden), (4, after)
    ]  # fmt: skip


@pytest.mark.parametrize("density", DENSITIES)
def test_parts_that_are_split_concatenated_and_split_again_are_independent(density):
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner = Masked(3, 16, 3, density, 0), Masked(8, 8, 3, density, 1)
            self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            first, second = self.stem(x).chunk(2, 1)
            joined = torch.cat([first, self.inner(second), second], 1)
            left, right = joined.split([8, 16], 1)
            return self.left(left) + self.right(right)

    net = Partial()
    first, second = (int(half.sum()) for half in net.stem.mask.split(8))
    shapes, _ = compiled(net)
    if first:
        assert shapes["left.weight"][1] == first
    assert shapes["right.weight"][1] == net.inner.count * bool(second or net.inner.conv.bias.any()) + second
