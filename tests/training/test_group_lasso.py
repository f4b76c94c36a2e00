import pytest
import torch
from torch import nn

from sbp_compile.training.group_lasso import clear_groups, group_norms, penalty, shrink_groups, zero_groups


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4)).double()


def test_the_penalty_sums_the_norms_of_rows_and_columns_by_the_root_of_their_size():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert penalty(nn.Sequential(layer)).item() == pytest.approx((5 + 3 + 4) * 2**0.5)


def test_groups_of_a_convolution_are_filters_and_input_channels():
    weight = torch.randn(4, 3, 2, 2)
    rows, columns = group_norms(weight)
    torch.testing.assert_close(rows, torch.stack([w.norm() for w in weight]))
    torch.testing.assert_close(columns, torch.stack([weight[:, i].norm() for i in range(3)]))


def test_a_small_proximal_step_follows_the_gradient_of_the_penalty():
    stepped, reference = model(), model()
    shrink_groups(stepped, 1e-6)
    penalty(reference).backward()
    for one, other in zip(stepped.parameters(), reference.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close((one - other).detach(), -1e-6 * other.grad, rtol=0, atol=1e-10)


def test_groups_that_are_smaller_than_the_step_become_zero_and_others_stay():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.1, 0.0]]))
    shrink_groups(nn.Sequential(layer), 0.5)
    assert (layer.weight[1] == 0).all()
    assert (layer.weight[0] > 1.5).all()
    before = layer.weight.clone()
    shrink_groups(nn.Sequential(layer), 0.0)
    assert torch.equal(layer.weight, before)


def test_groups_that_were_zero_are_cleared_and_others_are_not():
    network = model()
    with torch.no_grad():
        network[0].weight[1] = 0.0
        network[2].weight[:, 5] = 0.0
        zero = zero_groups(network)
        expected = [parameter.clone() for parameter in network.parameters()]
        network[0].weight[1] = 3.0
        network[2].weight[:, 5] = 2.0
    clear_groups(network, zero)
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), expected, strict=True))
