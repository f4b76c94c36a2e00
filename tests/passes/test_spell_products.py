"""Every spelling of a product as linear or matmul, with the same values."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from passes import Canonicalize, default_pipeline
from tests.passes.support import assert_same, capture, check, shapes_of, targets_of

aten = torch.ops.aten


class On(nn.Module):
    """A function of inputs and one buffer."""

    def __init__(self, function, *buffer):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("c", torch.randn(buffer) if buffer else None)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def spelled(module, *shapes):
    """The operators of the canonical form, which gives the same values at two batch sizes."""
    torch.manual_seed(0)
    batch = Dim("batch")
    inputs = [torch.randn(shape) for shape in shapes]
    original = capture(module, *inputs, dynamic=(tuple({0: batch} for _ in inputs),))
    result = Canonicalize()(original).program
    assert_same(original, result)
    assert_same(original, default_pipeline()(original).program)
    return set(targets_of(result))


@pytest.mark.parametrize(
    ("equation", "shapes", "buffer"),
    [
        ("bthd,bshd->bhts", [(2, 5, 3, 4), (2, 7, 3, 4)], ()),
        ("bhts,bshd->bthd", [(2, 3, 5, 7), (2, 7, 3, 4)], ()),
        ("bqc,chd->bhqd", [(2, 5, 6)], (6, 3, 4)),
        ("bthd,hde->bte", [(2, 5, 3, 4)], (3, 4, 6)),
        ("...ij,...jk->...ik", [(2, 3, 4, 5), (2, 3, 5, 6)], ()),
        ("bi,bi->b", [(3, 4), (3, 4)], ()),
        ("bi,bj->bij", [(2, 3), (2, 4)], ()),
        ("bij,bkl->bik", [(2, 3, 4), (2, 5, 6)], ()),
        ("bijk,bkj->bi", [(2, 3, 4, 5), (2, 5, 4)], ()),
        ("bij->bj", [(2, 3, 4)], ()),
        ("bi,ij", [(3, 4)], (4, 5)),
        ("bij,bjk,bkl->bil", [(2, 3, 4), (2, 4, 5), (2, 5, 6)], ()),
    ],
    ids=str,
)
def test_an_einsum_becomes_products(equation, shapes, buffer):
    def function(self, *inputs):
        return torch.einsum(equation, *inputs, *([self.c] if buffer else []))

    assert aten.einsum.default not in spelled(On(function, *buffer), *shapes)


@pytest.mark.parametrize(
    ("dims", "shapes", "buffer"),
    [
        (([-1], [0]), [(2, 5, 4)], (4, 3)),
        (([1, 2], [1, 0]), [(2, 5, 4)], (4, 5, 3)),
        (([0], [0]), [(2, 5), (2, 4)], ()),
        (([], []), [(2, 5)], (3,)),
    ],
    ids=str,
)
def test_a_tensordot_becomes_products(dims, shapes, buffer):
    def function(self, *inputs):
        return torch.tensordot(*inputs, *([self.c] if buffer else []), dims=dims)

    assert aten.tensordot.default not in spelled(On(function, *buffer), *shapes)


def test_a_tensordot_with_weights_is_a_linear_layer():
    def function(self, x):
        return torch.tensordot(x, self.c, dims=([-1], [0]))

    assert spelled(On(function, 4, 3), (2, 5, 4)) == {aten.linear.default}


def test_an_einsum_of_a_diagonal_stays():
    assert aten.einsum.default in spelled(On(lambda self, x: torch.einsum("bii->bi", x)), (2, 3, 3))


@pytest.mark.parametrize(
    ("function", "shapes", "buffer"),
    [
        (lambda self, x, y: torch.bmm(x, y), [(2, 3, 4), (2, 4, 5)], ()),
        (
            lambda self, x, y, z: torch.baddbmm(x, y, z, beta=0.5, alpha=2),
            [(2, 3, 5), (2, 3, 4), (2, 4, 5)],
            (),
        ),
        (lambda self, x, y: F.linear(x, y[0], y[0, :, 0]), [(2, 4, 6), (2, 5, 6)], ()),
        (lambda self, x, y: F.linear(x, y[0]), [(2, 4, 6), (2, 5, 6)], ()),
        (lambda self, x: torch.mv(x, self.c), [(3, 4)], (4,)),
        (lambda self, x: torch.addmv(x[:, 0], x, self.c, beta=2, alpha=3), [(3, 4)], (4,)),
        (lambda self, x: torch.dot(x[0], self.c).expand(x.shape[0]), [(3, 4)], (4,)),
        (lambda self, x: torch.addmm(x[:, :5], x, self.c, alpha=0.5), [(3, 6)], (6, 5)),
        (lambda self, x, y: torch.mm(x, y.T), [(3, 6), (3, 6)], ()),
        (lambda self, x: torch.matmul(self.c, x), [(3, 6, 2)], (4, 6)),
    ],
    ids=[
        "bmm",
        "baddbmm",
        "linear",
        "linear without bias",
        "mv",
        "addmv",
        "dot",
        "addmm",
        "mm",
        "constant first",
    ],
)
def test_other_products_become_linear_or_matmul(function, shapes, buffer):
    found = spelled(On(function, *buffer), *shapes)
    assert found & {aten.matmul.default, aten.linear.default}
    assert not found & {
        aten.bmm.default,
        aten.baddbmm.default,
        aten.mv.default,
        aten.dot.default,
        aten.mm.default,
    }


class Between(nn.Module):
    """Two layers with a product of two values between them; some channels are masked in front of it."""

    def __init__(self, first, second):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("first", torch.tensor(first))
        self.register_buffer("second", torch.tensor(second))


MASK = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
LEAVES = [0.0, 0.7, 0.0, 0.0, -1.3, 0.0]


class Contracted(Between):
    def forward(self, x, y):
        a = self.a(x) * self.first + torch.tensor(LEAVES)
        b = self.b(y) * self.second + torch.tensor(LEAVES)
        return a @ b.transpose(1, 2)


def test_channels_that_are_constant_on_both_sides_of_a_product_leave_a_constant():
    result = check(Contracted(MASK, MASK), torch.randn(2, 4, 5), torch.randn(2, 7, 5))
    assert shapes_of(result)["a.weight"] == shapes_of(result)["b.weight"] == (3, 5)
    assert aten.add.Tensor in targets_of(result)


def test_channels_that_are_constant_on_one_side_alone_stay():
    result = check(Contracted(MASK, [1.0] * 6), torch.randn(2, 4, 5), torch.randn(2, 7, 5))
    assert shapes_of(result)["b.weight"] == (5, 5)  # channel 3 of the first is 0, channels 1 and 4 are not


class Columns(Between):
    def forward(self, x, y):
        return self.last(x @ (self.b(y) * self.second))


def test_masked_columns_of_a_product_go_from_what_follows():
    result = check(Columns(MASK, MASK), torch.randn(2, 4, 7), torch.randn(2, 7, 5))
    assert shapes_of(result)["b.weight"] == (3, 5)
    assert shapes_of(result)["last.weight"] == (3, 3)
