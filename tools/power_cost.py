"""Measure powers of a constant exponent as onnxruntime's Pow, and by roots and products.

python tools/power_cost.py [--write]; sbp_compile/emit/onnx_powers.py writes the second.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from cost_table import add_row, asked, finish, graph_model, ratio_cells

from sbp_compile.emit.onnx_powers import STEPS, spell_powers
from sbp_compile.timing import compare, environment

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "powers.md"
SIZES = (256, 65536)
HEADER = """\
# Powers by roots and products

relu(x)^e for n entries: time with Pow over the time with the operators of sbp_compile/emit/onnx_powers.py; above 1
these are faster. The last rows are exponents that it leaves alone (1: the same file twice). onnxruntime
{onnxruntime}, one thread, {processor}.

Command: `python tools/power_cost.py --write`

| e | n | faster | 95% interval |
|---|---|---|---|
"""


def power(exponent: float, size: int, spelled: bool) -> bytes:
    """relu(x)^exponent as an ONNX model, float32."""
    x, y, inner = (gs.Variable(name, dtype=np.float32, shape=(1, size)) for name in ("x", "y", "inner"))
    nodes = [
        gs.Node("Relu", inputs=[x], outputs=[inner]),
        gs.Node("Pow", inputs=[inner, gs.Constant("e", np.array(exponent, np.float32))], outputs=[y]),
    ]
    graph = gs.Graph(nodes, [x], [y], opset=20)
    if spelled:
        spell_powers(graph)
    return graph_model(graph)


def main() -> None:
    """Measure and print, or write, the table."""
    options = asked(__doc__, 2.0)
    exponents = [exponent for exponent in STEPS if exponent != 1]
    rows: list[str] = []
    for exponent in (*exponents, -0.5, -1.0, 2.0, 3.0):
        for size in SIZES:
            models = {str(spelled): power(exponent, size, spelled) for spelled in (False, True)}
            found = compare(models, budget_s=options.budget).ratios[0]
            add_row(rows, (f"{exponent:g}", size, *ratio_cells(found)))
    finish(options, RESULT, HEADER.format(**environment()), rows)


if __name__ == "__main__":
    main()
