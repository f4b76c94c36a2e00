"""torch does not publish the expression behind a symbolic size; these tests say when what is used of it changes."""

import torch
from torch import nn

from sbp_compile.capture.export import export_module
from sbp_compile.capture.program import program_from_export


def sizes_of(module, *inputs, shapes):
    program = program_from_export(export_module(module, inputs, dynamic_shapes=shapes))
    return program, [[entry.key(axis) for axis in range(len(entry.sizes))] for entry in program.inputs]


def test_every_symbol_has_three_sizes_of_its_own():
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height", min=4)
    program, keys = sizes_of(nn.ReLU(), torch.randn(2, 3, 8, 9), shapes=({0: batch, 2: height},))
    assert [len(set(key)) for key in keys[0]] == [3, 1, 3, 1]
    assert keys[0][0] != keys[0][2]
    assert program.infos[program.outputs[0]].static_axes == (1, 3)


def test_a_derived_size_follows_its_symbol():
    half = torch.export.Dim("half", min=2)
    _, keys = sizes_of(nn.ReLU(), torch.randn(2, 3, 8), shapes=({2: 2 * half},))
    assert all(size % 2 == 0 for size in keys[0][2])
    assert len(set(keys[0][2])) == 3


def test_a_range_bounds_the_sizes():
    height = torch.export.Dim("height", min=4, max=12)
    _, keys = sizes_of(nn.ReLU(), torch.randn(2, 3, 8), shapes=({2: height},))
    assert all(4 <= size <= 12 for size in keys[0][2])
    assert len(set(keys[0][2])) > 1


def test_axes_with_narrow_ranges_have_sizes_that_differ_under_every_shape():
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=256)
    exported = export_module(
        nn.Linear(6, 3), (torch.randn(2, 7, 6),), dynamic_shapes=({0: batch, 1: length},)
    )
    [entry] = program_from_export(exported).inputs
    assert all(one != other for one, other in zip(entry.key(0), entry.key(1), strict=True))
    assert max(entry.key(1)) <= 256
