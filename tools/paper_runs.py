"""The runs behind docs/results/paper.md, as data: network, data set, method, seed, and how hard it presses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEEDS = (0, 1, 2)
LENETS = ("lenet500300", "lenet5")
METHODS = ("dense", "sparse-vd", "ssl", "sbp")
CURVE = (0.1, 0.4, 2.0)  # pressures of the trade-off curves beside 1
RANDOM_EPOCHS = 60
QUICK = "quick"


@dataclass(frozen=True)
class Run:
    """One call of tools/train.py; `more`: further options; `label`: what sets it apart from others."""

    network: str
    dataset: str
    method: str
    seed: int = 0
    pressure: float = 1.0
    random_labels: bool = False
    more: tuple[str, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """Return the stem of the run's files."""
        labels = f"-{self.label}" if self.label else ""
        pressure = "" if self.pressure == 1.0 else f"-p{self.pressure:g}"
        return f"{self.network}-{self.dataset}{labels}-{self.method}{pressure}-{self.seed}"

    @property
    def is_swept(self) -> bool:
        """Tell whether the curve of the data set shows this network under other thresholds and budgets, too."""
        return (self.method, self.seed, self.pressure, self.label) == ("sbp", 0, 1.0, "") and (
            self.network in LENETS
        )

    def arguments(self, folder: Path) -> list[str]:
        """Return what tools/train.py is told, but for the output."""
        given = [self.network, "--dataset", self.dataset, "--method", self.method, "--seed", str(self.seed)]
        if self.pressure != 1.0:
            given += ["--pressure", f"{self.pressure:g}"]
        if self.random_labels:
            given += ["--random-labels"]
        elif self.method != "dense":
            dense = Run(self.network, self.dataset, "dense", self.seed)
            given += ["--pretrained", str(folder / f"{dense.name}.ckpt")]
        return [*given, *self.more]


def _runs() -> Iterator[Run]:
    for seed in SEEDS:
        for network in LENETS:
            for method in METHODS:
                yield Run(network, "digits", method, seed)
    for method in METHODS:
        for network in LENETS:
            yield Run(network, "fashion-mnist", method)
    for method, pressure in (("dropout", 1.0), ("sbp", 1.0), ("sbp", 3.0)):
        epochs = ("--dense-epochs", "0", "--epochs", str(RANDOM_EPOCHS))
        yield Run("lenet500300", "digits", method, 0, pressure, True, epochs, "random")
    for seed in SEEDS:
        yield Run("lenet5", "digits", "sbp", seed, more=("--epochs", "20"), label=QUICK)
    for dataset in ("digits", "fashion-mnist"):
        for network in LENETS:
            for pressure in CURVE:
                yield Run(network, dataset, "sbp", pressure=pressure)
    for method in ("dense", "sparse-vd", "sbp", "sbpa"):
        yield Run("vgg-like", "cifar10", method)


RUNS = tuple(_runs())
