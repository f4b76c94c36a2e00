"""The page docs/results/zoo.md: what was measured of the zoo, and what explains each gap to the bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from zoo_excess import UNEXPLAINED, UNKNOWN
from zoo_rows import GAP, Row

from sbp_compile.timing import environment

LARGEST = 4

HEADER = """\
# The zoo

{networks} architectures (tests/zoo, at reduced width and depth) with random weights, batch norm statistics of their own
values, and masks at random: a share of {shares} of the units of each noise layer, at {placements}. Each is
compiled and compared with the masked network: in float64 (tolerance 1e-12) and, at one share, as a float32 file in
onnxruntime (1e-5, or three times the network's own float32 error where that is larger; the column gives the tolerance
where it is another than 1e-5). Every noise layer is replaced by the constant that it multiplies by in eval mode before
the capture: its arithmetic would fill most of the graph.

Command: `make zoo` (`python tools/zoo.py --write`, seed {seed}), torch {torch}, onnxruntime {onnxruntime}, {processor},
{cores} cores.

## The bound

What any method can reach that cuts channels of the network's own layers, measured by running the masked network
(tools/bound.py) and not by the compiler's analysis. For each convolution (transposed or not) and each linear map or
matrix product with constant weights:

    positions x kernel taps x sum over groups of (input channels x output channels)

- An input channel counts where its values differ between random inputs and a live output channel reads it with a weight
  that is not zero; an output channel where its values differ and a gradient of a random projection of all outputs
  reaches it. Each layer is looked at by itself: of two layers whose results are added, each counts only its own
  live channels. So a residual network whose masks differ between the sides of an add is above the bound unless the
  sides are given different widths.
- A rectifier that is off by chance would hide channels, so functions with flat parts get a slope there, but only where
  their operand differs between inputs: a unit that is off because its input is constant stays off.
- Constants that a border or their own maps make uneven fit into no bias: the layer that reads them needs as many more
  inputs as these maps have rank, and the layer that makes them as many more outputs as the report keeps to stand for
  constants.
- Positions of a convolution all count, those of a linear layer only where they are live. Products of two activations
  (attention) and recurrent cells are left out on both sides; multiply-adds in the table are those of the whole network.

The gap is (compiled - bound) / bound. Negative: the compiler found more than the bound knows of.

## Results

MACs, parameters: before / after, at {middle}, geometric mean over placements. Gap: the middle one and the largest of
all placements and shares; "all gathers": the largest where every gather is taken that saves a multiply-add
(`--fewest-macs`). By default one is taken where it saves time, which on feature maps as small as these it seldom does.
Seconds: capture, passes, verification and emission, the largest.

| network | family | exact | float64 | onnxruntime | MACs | parameters | gap | largest | all gathers | seconds |
|---|---|---|---|---|---|---|---|---|---|---|
"""

# What the reasons of the report mean, by how they begin.
MEANINGS = {
    "aligned by add": "both sides of an add keep the channels that either needs, where a gather would save no time; "
    "the bound counts each side by itself",
    "stands for": "constant channels that stay because a border or their own maps make them uneven; those that a layer "
    "makes for several readers, or that an add carries along, are more than the bound's",
    "the network's interface": "inputs and outputs of the network keep all their channels",
    "aligned by mul": "a mask or a gate on one reader of a value that others read whole, where a gather would save no "
    "time, or both factors of a gate",
    "aligned by cat": "the parts of a concatenation keep what any reader of the whole needs",
    "regrouped by": "a view mixes the channel axis with another one, and whole blocks stay",
    "groups of": "the groups of a convolution keep as many channels as the widest of them, or become one dense layer, "
    "or several, whichever is cheapest; the bound counts the live pairs inside each",
    "read whole by": "an operator reads the whole axis",
    UNEXPLAINED: "the analysis takes these channels for needed and the measurement says that they are not: an operator "
    "without a rule asks for everything, and so do rules where they are cautious",
    UNKNOWN: "a rewriting made it, mostly of a layer behind which constants are added: the sum has its name",
}


def page(rows: Sequence[Row], seed: int) -> str:
    """The whole page as Markdown."""
    found = environment()
    names = list(dict.fromkeys(row.network for row in rows))
    shares = sorted({row.share for row in rows})
    middle = shares[len(shares) // 2]
    header = HEADER.format(
        networks=len(names),
        shares=_listed([f"{share:.0%}" for share in shares]),
        placements=_listed([f'"{place}"' for place in dict.fromkeys(row.placement for row in rows)]),
        seed=seed,
        torch=torch.__version__,
        middle=f"{middle:.0%}",
        **{key: found[key] for key in ("onnxruntime", "processor", "cores")},
    )
    by_name = {name: [row for row in rows if row.network == name] for name in names}
    lines = [summary(own, middle) for own in by_name.values()]
    explained = [explanation(own) for own in by_name.values() if largest_gap(own) > GAP]
    text = header + "\n".join(lines) + "\n\n## Where the gap is above 5%\n\n"
    text += "Shares of the multiply-adds above the bound, over all placements and shares of masks.\n\n"
    text += "\n".join(explained) + "\n\n" + meanings(rows)
    unsized = {row.network: row.unsized for row in rows if row.unsized}
    if unsized:
        text += "\nLayers behind an operator whose sizes are not known are in no count: "
        text += ", ".join(f"{name} ({number})" for name, number in unsized.items()) + ".\n"
    failures = [row for row in rows if row.failure]
    if failures:
        text += "\n## Failures\n\n" + "\n".join(_failure(row) for row in failures) + "\n"
    return text


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def largest_gap(rows: Sequence[Row]) -> float:
    """The largest gap among the rows that got through."""
    return max((row.gap for row in rows if not row.failure), default=0.0)


def summary(rows: Sequence[Row], middle: float) -> str:
    """One network's line."""
    good = [row for row in rows if not row.failure]
    cells = [rows[0].network, rows[0].family, f"{len(good)} of {len(rows)}"]
    if not good:
        return f"| {' | '.join([*cells, *[''] * 8])} |"
    gaps = sorted(row.gap for row in good)
    worst = max(good, key=lambda row: row.gap)
    at_middle = [row for row in good if row.share == middle]
    cells += [
        f"{max(row.float64_error for row in good):.1e}",
        _file_error(good),
        _mean_ratio([row.macs for row in at_middle]),
        _mean_ratio([row.parameters for row in at_middle]),
        f"{gaps[len(gaps) // 2]:.1%}",
        f"{worst.gap:.1%}" + (f" ({worst.placement}, {worst.share:.0%})" if worst.gap > GAP else ""),
        f"{max(row.gap_with_all_gathers for row in good):.1%}",
        f"{max(sum(row.seconds.values()) for row in good):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _file_error(rows: Sequence[Row]) -> str:
    with_file = [row for row in rows if row.file_error is not None]
    if not with_file:
        return "-"
    worst = max(with_file, key=lambda row: (row.file_error or 0.0) / (row.file_tolerance or 1.0))
    other = f" of {worst.file_tolerance:.1e}" if worst.file_tolerance != 1e-5 else ""
    return f"{worst.file_error:.1e}{other}"


def _mean_ratio(pairs: Sequence[tuple[int, int]]) -> str:
    ratios = [before / after for before, after in pairs if after]
    if not ratios:
        return "all removed" if pairs else "-"
    return f"{float(torch.tensor(ratios, dtype=torch.float64).log().mean().exp()):.2f}x"


def explanation(rows: Sequence[Row]) -> str:
    """Why one network is above its bound: the reasons, by their share of the multiply-adds above it."""
    weights = excess_by_reason(rows)
    total = sum(weights.values())
    parts = [f"{why} {weight / total:.0%}" for why, weight in weights.most_common(LARGEST) if weight > 0]
    opaque = sorted({operator for row in rows for operator in row.opaque})
    rules = f"; no rule: {', '.join(opaque)}" if opaque else ""
    gathered = max(row.gap_with_all_gathers for row in rows if not row.failure)
    sizes = f"{largest_gap(rows):.0%}, with all gathers {gathered:.0%}"
    return f"- **{rows[0].network}** ({sizes}): {', '.join(parts) or 'no layer alone'}{rules}"


def excess_by_reason(rows: Sequence[Row]) -> Counter[str]:
    """Multiply-adds above the bound by reason; a layer's are divided by the channels of each reason."""
    weights: Counter[str] = Counter()
    for row in rows:
        for excess in row.excess:
            channels = sum(number for _, number in excess.reasons)
            for why, number in excess.reasons:
                weights[why] += (excess.macs - excess.bound) * number / channels  # type: ignore[assignment]
    return weights


def meanings(rows: Sequence[Row]) -> str:
    """What the reasons that occur mean."""
    reasons = excess_by_reason(rows)
    found = [
        (start, text) for start, text in MEANINGS.items() if any(why.startswith(start) for why in reasons)
    ]
    return "".join(f'- "{start}": {text}.\n' for start, text in found)


def _failure(row: Row) -> str:
    return f"- {row.network}, {row.placement}, {row.share:.0%}: {row.failure}"
