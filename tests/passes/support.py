"""Compile a small module and hold the result against the original in float64."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from passes import Program, default_pipeline
from sbp_compile.capture.export import quiet_export
from sbp_compile.capture.program import program_from_export

TOLERANCE = 1e-12
Dynamic = bool | tuple[dict[int, Any], ...]


def capture(module: nn.Module, *inputs: Tensor, dynamic: Dynamic = True) -> Program:
    """The Program of a module in eval mode.

    `dynamic`: True for a dynamic axis 0 of every input, or one {axis: Dim} for each input.
    """
    shapes = dynamic
    if isinstance(dynamic, bool):
        batch = torch.export.Dim("batch")
        shapes = tuple({0: batch} for _ in inputs) if dynamic else None
    with quiet_export():
        exported = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes)
    return program_from_export(exported)


def run(program: Program, *inputs: Tensor) -> tuple[object, ...]:
    """The outputs of a Program, computed in float64."""
    feeds = dict(zip((entry.name for entry in program.inputs), inputs, strict=True))
    env: dict[fx.Node, object] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = feeds[node.target]
        elif node.op == "get_attr":
            env[node] = program.constants[node.target]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            is_view = node.target is torch.ops.aten.view.default  # strides depend on the dtype
            target = torch.ops.aten.reshape.default if is_view else node.target
            env[node] = target(*args, **kwargs)
    return fx.node.map_arg(program.outputs, env.__getitem__)


def random_inputs(program: Program, which: int = 0) -> list[Tensor]:
    """Random inputs of the first or the second example shape of each input."""
    found = []
    for entry in program.inputs:
        sizes = entry.other_sizes if which else entry.sizes
        if entry.dtype.is_floating_point:
            found.append(torch.randn(sizes, dtype=torch.float64))
        else:
            found.append(torch.randint(0, 2, sizes).to(entry.dtype))
    return found


def error(wanted: Tensor, got: Tensor) -> float:
    """max|a - b| / max|a|, with 0/0 = 0."""
    assert wanted.shape == got.shape, f"have {tuple(got.shape)}, want {tuple(wanted.shape)}"
    assert wanted.dtype == got.dtype, f"have {got.dtype}, want {wanted.dtype}"
    difference = (wanted.double() - got.double()).abs().max() if wanted.numel() else torch.zeros(())
    return float(difference) and float(difference / wanted.double().abs().max())


def assert_same(original: Program, result: Program) -> None:
    """Both Programs give the same outputs on random inputs of both example shapes."""
    for which in (0, 1):
        inputs = random_inputs(original, which)
        pairs = zip(run(original, *inputs), run(result, *inputs), strict=True)
        for position, (wanted, got) in enumerate(pairs):
            if isinstance(wanted, Tensor):
                assert isinstance(got, Tensor)
                found = error(wanted, got)
                assert found <= TOLERANCE, f"output {position}: error {found:.2e}\n{result.graph}"
            else:
                assert wanted == got


def check(module: nn.Module, *inputs: Tensor, dynamic: Dynamic = True) -> Program:
    """Compile a module, compare with the original at two sizes, lint, and return the compiled Program."""
    original = capture(module, *inputs, dynamic=dynamic)
    result = default_pipeline()(original).program
    result.lint()
    assert_same(original, result)
    return result


def shapes_of(program: Program) -> dict[str, tuple[int, ...]]:
    """The shape of every constant, by name."""
    return {name: tuple(value.shape) for name, value in program.constants.items()}


def targets_of(program: Program) -> list[object]:
    """The operators of a Program, in order."""
    return [node.target for node in program.calls()]
