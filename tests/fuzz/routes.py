"""The catalogue's routes: steps that move entries to where the input says, assign constants, or change the basis."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.draw import Draw, Shape
from tests.fuzz.layers import Apply, Kind

Form = tuple[str, Callable[[Tensor], Tensor]]


def places(x: Tensor, size: int) -> Tensor:
    """Numbers below `size` that the entries decide, far from where rounding does."""
    return (x * 3.7 + 0.123).floor().long() % size


def vector(x: Tensor, axis: int, size: int) -> Tensor:
    """A number below `size` for each index of an axis."""
    return places(5.0 * x.mean([each for each in range(x.ndim) if each != axis]), size)


def _inner_axis(draw: Draw, x: Shape) -> int | None:
    axis = draw.randrange(1, x.rank) if x.rank > 1 else 0
    return axis if axis and x.is_static(axis) else None


def _other_axis(draw: Draw, x: Shape, axis: int) -> int | None:
    found = [each for each in range(1, x.rank) if each != axis and x.is_static(each)]
    return draw.one(found) if found else None


def computed_read(draw: Draw, x: Shape) -> nn.Module | None:
    """gather, index and index_select at places that the input decides, along one axis or two."""
    axis = _inner_axis(draw, x)
    if axis is None:
        return None
    size, other, sign = x.sizes[axis], _other_axis(draw, x, axis), draw.one((0, x.rank))
    every = (slice(None),) * axis
    part = draw.randint(1, x.sizes[1]) if x.is_static(1) else None
    fixed = torch.tensor([draw.randrange(-size, size) for _ in range(3)])
    forms: list[Form] = [
        (f"gather {axis}", lambda x: x.gather(axis - sign, places(x, size))),
        (f"gather alike {axis}", lambda x: x.gather(axis, places(x.mean(1, True), size).expand_as(x))),
        (f"gather one {axis}", lambda x: x.gather(axis, fixed[:1].abs().view([1] * x.ndim).expand_as(x))),
        (f"index {axis}", lambda x: x[(*every, vector(x, axis, size))]),
        (f"index_select {axis}", lambda x: x.index_select(axis - sign, vector(x, axis, size))),
        (f"index one {axis}", lambda x: x[(*every, places(x.mean(), size))].unsqueeze(axis)),
        (f"index matrix {axis}", lambda x: x[(*every, places(x.flatten()[:4].view(2, 2), size) - size)]),
        (f"index batch {axis}", lambda x: x[places(x.mean([*range(1, x.ndim)]), 1)]),
    ]
    if part is not None:
        forms.append((f"gather part {axis}", lambda x: x.gather(axis, places(x[:, :part], size))))
    if other is not None:
        forms += _two_axes(axis, other, x, fixed)
    return Apply(*draw.one(forms))


def _two_axes(axis: int, other: int, x: Shape, fixed: Tensor) -> list[Form]:
    first, second = sorted((axis, other))
    sizes = x.sizes[first], x.sizes[second]

    def at(one: object, two: object) -> tuple[object, ...]:
        between = (slice(None),) * (second - first - 1)
        return (*(slice(None),) * first, one, *between, two)

    constant = fixed.clamp(-sizes[0], sizes[0] - 1)
    return [
        (
            f"index {first} {second}",
            lambda x: x[at(vector(x, first, sizes[0]), vector(x, first, sizes[1]))].movedim(0, -1),
        ),
        (
            f"index {first} {second} crossed",
            lambda x: x[at(vector(x, first, sizes[0])[:, None], vector(x, second, sizes[1]))],
        ),
        (
            f"index {first} at {constant.tolist()} {second}",
            lambda x: x[at(constant, places(x.flatten()[:3], sizes[1]))].movedim(0, -1),
        ),
    ]


def computed_write(draw: Draw, x: Shape) -> nn.Module | None:
    """Sums, extrema and copies into zeros, constants or the value itself, at places that the input decides."""
    axis = _inner_axis(draw, x)
    if axis is None:
        return None
    size, sign = x.sizes[axis], draw.one((0, x.rank))
    held = draw.normal(x.sizes[1]).view(-1, *[1] * (x.rank - 2)) if x.is_static(1) else torch.tensor(0.4)
    base = draw.one(
        (torch.zeros_like, lambda x: x, lambda x: held.to(x).expand_as(x), lambda x: x.flip(axis))
    )
    source = draw.one((lambda x: x, lambda x: x.flip(axis), lambda x: 0.5 * x))
    alike = draw.chance(0.5)
    part = slice(None, draw.randint(1, size))

    def index(x: Tensor) -> Tensor:
        return places(x.mean(1, True), size).expand_as(x) if alike else places(x, size)

    def narrow(x: Tensor) -> Tensor:
        return index(x)[(*(slice(None),) * axis, part)]

    def reduced(x: Tensor) -> Tensor:
        return base(x).scatter_reduce(axis - sign, index(x), source(x), way, include_self=included)

    way, included = draw.one(("sum", "prod", "mean", "amax", "amin")), draw.chance(0.5)
    at = f"{axis - sign} {alike}"
    return Apply(
        *draw.one(
            (
                (f"scatter_add {at}", lambda x: base(x).scatter_add(axis - sign, index(x), source(x))),
                (f"scatter_add {at} {part}", lambda x: base(x).scatter_add(axis, narrow(x), source(x))),
                (f"scatter {at}", lambda x: base(x).scatter(axis - sign, index(x), source(x))),
                (f"scatter number {at}", lambda x: base(x).scatter(axis - sign, index(x), 0.6)),
                (f"scatter_reduce {at} {way} {included}", reduced),
                (f"scatter_reduce {at} {way} {included}", reduced),
                (
                    f"index_add {at}",
                    lambda x: base(x).index_add(axis - sign, vector(x, axis, size), source(x), alpha=0.7),
                ),
                (f"index_copy {at}", lambda x: base(x).index_copy(axis, vector(x, axis, size), source(x))),
                (f"index_fill {at}", lambda x: base(x).index_fill(axis, vector(x, axis, size)[:2], 0.3)),
            )
        )
    )


def assign(draw: Draw, x: Shape) -> nn.Module | None:
    """Constants at constant places, or where a condition holds."""
    axis = _inner_axis(draw, x)
    if axis is None:
        return None
    size, other = x.sizes[axis], _other_axis(draw, x, axis)
    chosen = [each - size * draw.chance(0.3) for each in draw.sample(range(size), draw.randint(0, size))]
    index, number = torch.tensor(chosen, dtype=torch.int64), draw.one((0.0, 0.0, 0.5, -1.25))
    chosen_mask = torch.zeros(size, dtype=torch.bool).index_fill(0, index % size, True)
    every, rest = (slice(None),) * axis, [1] * (x.rank - axis - 1)
    values = draw.normal(len(chosen)).view(-1, *rest)
    whole = draw.normal(*x.sizes[axis + 1 :]) if all(map(x.is_static, range(axis, x.rank))) else values[:1]

    def put(at: tuple[object, ...], what: object) -> Callable[[Tensor], Tensor]:
        def put(x: Tensor) -> Tensor:
            copy = x.clone()
            copy[at] = what.to(x) if isinstance(what, Tensor) else what
            return copy

        return put

    def where(x: Tensor) -> Tensor:
        copy = x.clone()
        copy[x > 0.3] = number
        return copy

    def where_channels(x: Tensor) -> Tensor:
        copy = x.clone()
        copy[x.flatten(2).mean(2) > 0.1] = number
        return copy

    def added(x: Tensor) -> Tensor:
        doubled = torch.cat([index, index])
        return (
            x.transpose(0, axis)
            .index_put((doubled,), torch.tensor(number).to(x), accumulate=True)
            .transpose(0, axis)
        )

    forms: list[Form] = [
        (f"index {axis} {chosen} = {number}", put((*every, index), number)),
        (f"index {axis} {chosen} = each", put((*every, index), values)),
        (f"index {axis} {chosen} = map", put((*every, index), whole)),
        (f"index {axis} {chosen} = mask", put((*every, chosen_mask), values)),
        (
            f"index {axis} {chosen} = x",
            lambda x: put((*every, index), x[(*every, index)].flip(axis) * 2.0)(x),
        ),
        (f"index_fill {axis} {chosen} {number}", lambda x: x.index_fill(axis, index % size, number)),
        (
            f"index_copy {axis} {chosen}",
            lambda x: x.index_copy(axis, index % size, x.flip(axis)[(*every, index)]),
        ),
        (f"index_put {axis} {chosen} += {number}", added),
        (f"condition = {number}", where),
    ]
    if chosen:
        shape = [1] * x.rank
        shape[axis] = len(chosen)
        line = (index % size).view(shape)

        def scattered(x: Tensor) -> Tensor:
            sizes = list(x.shape)
            sizes[axis] = len(chosen)
            return x.scatter(axis, line.expand(sizes), number)

        forms += [
            (f"scatter {axis} {chosen} {number}", scattered),
            (f"index {axis} {chosen[0]}", put((*every, index[0]), number)),
        ]
    if x.rank > 2:
        forms.append((f"channels = {number}", where_channels))
    if other is not None and chosen:
        first, second = sorted((axis, other))
        table = torch.tensor([[draw.randrange(x.sizes[each]) for _ in range(3)] for each in (first, second)])
        at = (*(slice(None),) * first, table[0], *(slice(None),) * (second - first - 1), table[1])
        forms.append((f"index {first} {second} {table.tolist()} = {number}", put(at, number)))
        if second == first + 1:
            square = torch.rand(x.sizes[first], x.sizes[second], generator=draw.generator) > 0.5
            forms.append(
                (f"mask {first} {second} = {number}", put((*(slice(None),) * first, square), number))
            )
    return Apply(*draw.one(forms))


def sampled(draw: Draw, x: Shape) -> nn.Module | None:
    """Sampling at points of a grid, computed or not; pools with indices, unpooled or looked at."""
    if x.rank not in {4, 5} or not x.is_static(1) or not x.inner_static:
        return None
    rank, modes = x.rank - 2, ("bilinear", "nearest", "bicubic")[: 3 if x.rank == 4 else 2]
    mode, padding, corners = draw.one(modes), draw.one(("zeros", "border", "reflection")), draw.chance(0.5)
    held = draw.between(-1.3, 1.3, 1, *(draw.randint(1, 5) for _ in range(rank)), rank)

    def grid(x: Tensor) -> Tensor:
        return torch.stack([1.3 * (x[:, 0] * (2.1 + each)).cos() for each in range(rank)], -1)

    def at(points: Tensor, x: Tensor) -> Tensor:
        return F.grid_sample(x, points, mode, padding, corners)

    pool = {2: F.max_pool2d, 3: F.max_pool3d}[rank]
    unpool = {2: F.max_unpool2d, 3: F.max_unpool3d}[rank]
    adaptive = {2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[rank]
    wanted = [draw.randint(1, 5) for _ in range(rank)]

    def unpooled(x: Tensor) -> Tensor:
        found, index = pool(x, 2, return_indices=True)
        return unpool(found * 0.5 + 0.2 * shifted, index, 2, output_size=x.shape[2:])

    def looked_at(x: Tensor) -> Tensor:
        found, index = pool(x, 2, ceil_mode=ceil, return_indices=True)
        return found + 0.1 * index

    def adapted(x: Tensor) -> Tensor:
        found, index = adaptive(x, wanted, return_indices=True)
        return found + 0.1 * index

    shifted, ceil = draw.one((0.0, 1.0)), draw.chance(0.3)
    return Apply(
        *draw.one(
            (
                (f"grid_sample {mode} {padding} {corners}", lambda x: at(grid(x), x)),
                (f"grid_sample {mode} {padding} {corners}", lambda x: at(grid(x), x)),
                (
                    f"grid_sample {mode} {padding} {corners} fixed",
                    lambda x: at(held.to(x).expand(x.shape[0], *held.shape[1:]), x),
                ),
                (f"unpool {shifted}", unpooled),
                (f"unpool {shifted}", unpooled),
                (f"pool with indices {ceil}", looked_at),
                (f"adaptive pool with indices {wanted}", adapted),
                (f"adaptive pool {wanted}", lambda x: adaptive(x, wanted)),
            )
        )
    )


def fourier(draw: Draw, x: Shape) -> nn.Module | None:
    """Transforms along some axes, padded or cut, and real again."""
    axes = [each for each in range(1, x.rank) if x.is_static(each) and draw.chance(0.5)]
    if not axes:
        return None
    norm, sizes = (
        draw.one(("backward", "ortho", "forward")),
        [max(1, x.sizes[a] + draw.randint(-1, 2)) for a in axes],
    )
    axis, size = axes[-1], sizes[-1]
    forms: list[Form] = [
        (f"fftn {axes} {norm} {sizes}", lambda x: torch.fft.fftn(x, sizes, axes, norm).real),
        (f"rfftn {axes} {norm}", lambda x: torch.fft.rfftn(x, None, axes, norm).abs()),
        (f"fft {axis} {size} {norm}", lambda x: torch.fft.fft(x, size, axis - x.ndim, norm).imag),
        (f"ihfft {axis} {norm}", lambda x: torch.fft.ihfft(x, None, axis, norm).real),
        (f"hfft {axis} {norm}", lambda x: torch.fft.hfft(torch.complex(x, x), size, axis, norm)),
        (
            f"filter {axes} {norm}",
            lambda x: torch.fft.irfftn(
                torch.fft.rfftn(x, None, axes, norm) * 0.5, [x.shape[a] for a in axes], axes, norm
            ),
        ),
    ]
    return Apply(*draw.one(forms))


class Products(nn.Module):
    """A bilinear layer of a value and the same value turned round."""

    def __init__(self, layer: nn.Bilinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x, x.flip(-1))
        return result


def bilinear(draw: Draw, x: Shape) -> nn.Module | None:
    if not x.is_static(x.rank - 1) or x.sizes[-1] > 10:
        return None
    layer = nn.Bilinear(x.sizes[-1], x.sizes[-1], draw.randint(1, 5), bias=draw.chance(0.6))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draw.normal(*parameter.shape, scale=0.3))
    return Products(layer)


ROUTES: dict[str, Kind] = {
    "computed_read": computed_read, "computed_write": computed_write, "assign": assign, "sampled": sampled,
    "fourier": fourier, "bilinear": bilinear,
}  # fmt: skip
