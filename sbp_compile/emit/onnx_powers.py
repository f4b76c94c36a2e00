"""Powers that roots and products give, which onnxruntime computes 6 to 20 times as fast as a power in general.

Its Pow has a fast way for 2 and 3 alone (docs/results/powers.md). Local response norm asks for x^0.75. The results
differ in rounding, and where x is minus infinity.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from sbp_compile.emit.onnx_names import fresh_name

STEPS: dict[float, tuple[tuple[str, tuple[int, ...]], ...]] = {
    0.25: (("Sqrt", (0,)), ("Sqrt", (1,))),
    0.5: (("Sqrt", (0,)),),
    0.75: (("Sqrt", (0,)), ("Sqrt", (1,)), ("Mul", (1, 2))),
    1.0: (),
    1.5: (("Sqrt", (0,)), ("Mul", (0, 1))),
    4.0: (("Mul", (0, 0)), ("Mul", (1, 1))),
}
"""For each exponent, operators and the numbers of their operands: 0 is x, then the results in order."""


def spell_powers(graph: gs.Graph) -> None:
    """Replace powers of a constant exponent, or its negative, that is in `STEPS`."""
    taken = set(graph.tensors())
    for node in list(graph.nodes):
        exponent = _exponent(node)
        if exponent is None or abs(exponent) not in STEPS:
            continue
        steps = list(STEPS[abs(exponent)])
        if exponent < 0:
            steps.append(("Reciprocal", (len(steps),)))
        if steps:
            _replace(graph, node, steps, taken)


def _exponent(node: gs.Node) -> float | None:
    """The exponent of a power in floating point; None where it is not one number."""
    if node.op != "Pow" or not isinstance(node.inputs[1], gs.Constant):
        return None
    x, values = node.inputs[0], node.inputs[1].values
    if values.size != 1 or values.ndim > 1 or x.dtype is None or not np.issubdtype(x.dtype, np.floating):
        return None
    if values.ndim and not x.shape:  # the power would have another rank than x
        return None
    return float(values.reshape(()))


def _replace(
    graph: gs.Graph, power: gs.Node, steps: list[tuple[str, tuple[int, ...]]], taken: set[str]
) -> None:
    result = power.outputs[0]
    values = [power.inputs[0]]
    power.outputs.clear()
    for position, (operator, operands) in enumerate(steps, 1):
        if position == len(steps):
            values.append(result)
        else:
            name = fresh_name(f"{result.name}.{position}", taken)
            values.append(gs.Variable(name, dtype=result.dtype, shape=result.shape))
        inputs = [values[operand] for operand in operands]
        graph.nodes.append(
            gs.Node(operator, f"{values[-1].name}.{operator}", inputs=inputs, outputs=[values[-1]])
        )
