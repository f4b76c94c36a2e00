import torch

from tests.passes.rules.between import LIVE, Between, free_axes, kept_by

FREE = free_axes("height", "width")


def test_tensors_of_one_number_are_constants_of_any_size():
    functions = {
        "zeros_like": lambda x: torch.where(x > 0.1, x, torch.zeros_like(x)),
        "ones_like": lambda x: x * torch.ones_like(x),
        "full_like": lambda x: x + torch.full_like(x, 2.0),
        "new_zeros": lambda x: x + x.new_zeros(x.shape),
        "new_full": lambda x: x * x.new_full((x.shape[0], 6, 1, x.shape[3]), 2.0),
        "full": lambda x: x + torch.full((x.shape[0], 1, x.shape[2], 1), 0.5),
    }
    parts = {name: Between(function) for name, function in functions.items()}
    for dynamic in (True, FREE):
        assert kept_by(parts, 8, 8, dynamic=dynamic) == dict.fromkeys(parts, LIVE)


def test_a_size_that_no_input_has_is_filled_at_run_time():
    def function(x):
        flat = x.flatten(2)
        return (flat + torch.ones_like(flat)).reshape(x.shape)

    parts = {"ones_like": Between(function), "new_ones": Between(lambda x: joined(x, x.flatten(2)))}

    def joined(x, flat):
        return (flat + flat.new_ones(flat.shape)).reshape(x.shape)

    kept_by(parts, 8, 8, dynamic=FREE, unseen=(9, 12))
