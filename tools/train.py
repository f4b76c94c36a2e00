"""Train a LeNet with Structured Bayesian Pruning, from a dense network that is trained first.

Example: python tools/train.py lenet5 --dataset digits --seed 0 -o model.pt

Writes the model file, and beside it a log (.json) and a checkpoint (.ckpt: the state dicts of the dense and
the pruned network, for `torch.load(..., weights_only=True)`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.atomic import atomic_path, write_atomically
from sbp_compile.capture import save_model
from sbp_compile.errors import CompileError, UsageError
from sbp_compile.training import (
    NETWORKS,
    Epoch,
    ImageData,
    Recipe,
    Result,
    load,
    recipe_for,
    to_tensor,
    train,
)


class ProgressReport:
    """A bar that moves with every step and shows the last epoch's state, and the records for the log."""

    def __init__(self, console: Console):
        self.records: list[Epoch] = []
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressReport:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def step(self, phase: str, done: int, total: int, loss: float) -> None:
        """Move the bar of `phase`."""
        if phase not in self._tasks:
            self._tasks[phase] = self._bar.add_task(phase, loss=loss, state="")
        self._bar.update(self._tasks[phase], completed=done, total=total, loss=loss)

    def epoch(self, record: Epoch) -> None:
        """Print one line and remember the record."""
        self.records.append(record)
        kept = "-".join(map(str, record.kept))
        state = f"  KL {record.kl:.1f}  kept {kept}  MACs 1/{record.mac_ratio:.2f}"
        self._bar.update(self._tasks[record.phase], state=state)
        self._bar.console.print(
            f"{record.phase:>5} {record.epoch:3}  loss {record.loss:.4f}{state}"
            f"  test error {record.error:.2f} %  {record.seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument(
        "--dataset", default="digits", help="digits, mnist, fashion-mnist or folder:PATH (idx files)"
    )
    parser.add_argument("--data", type=Path, help="where the dataset's files are, if not at the usual place")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads (default 1: small networks gain little)"
    )
    parser.add_argument("--dense-epochs", type=int, help="instead of the recipe's number")
    parser.add_argument("--epochs", type=int, help="epochs with noise, instead of the recipe's number")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="MODEL", help="the model file to write"
    )
    return parser.parse_args(argv)


def choose_recipe(args: argparse.Namespace, data: ImageData) -> Recipe:
    """Look up the recipe for this network and data size, with the epochs of the command line."""
    recipe = recipe_for(args.network, len(data.train_images))
    for name, value in (
        ("--threads", args.threads),
        ("--dense-epochs", args.dense_epochs),
        ("--epochs", args.epochs),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{name} (={value}) must be at least 1")
    dense = replace(recipe.dense, epochs=args.dense_epochs or recipe.dense.epochs)
    return replace(recipe, dense=dense, sbp=replace(recipe.sbp, epochs=args.epochs or recipe.sbp.epochs))


def describe(args: argparse.Namespace, recipe: Recipe, result: Result) -> dict[str, Any]:
    """Say in plain values what was run and what came out, for the log and the checkpoint."""
    return {
        "network": args.network,
        "dataset": args.dataset,
        "seed": args.seed,
        "threads": args.threads,
        "recipe": asdict(recipe) | {"network": recipe.network.__name__},
        "dense_error": result.dense_error,
        "masked_error": result.masked_error,
        "kept": list(result.kept),
        "mac_ratio": result.mac_ratio,
    }


def write(
    args: argparse.Namespace, data: ImageData, about: dict[str, Any], result: Result, log: list[Epoch]
) -> None:
    """Write checkpoint, log and model file, each in one step."""
    states = {"dense": result.dense.state_dict(), "model": result.model.state_dict(), "about": about}
    with atomic_path(args.output.with_suffix(".ckpt")) as path:
        torch.save(states, path)
    text = json.dumps(about | {"epochs": [asdict(epoch) for epoch in log]}, indent=1)
    write_atomically(args.output.with_suffix(".json"), text)
    save_model(result.model.eval(), (to_tensor(data.test_images[:2]),), args.output)


def run(args: argparse.Namespace, console: Console) -> None:
    """Train and write; raises CompileError for what the user can put right."""
    if not args.output.parent.is_dir():
        raise UsageError(f"the folder of --output (={args.output}) does not exist: create it")
    data = load(args.dataset, args.data)
    recipe = choose_recipe(args, data)
    torch.set_num_threads(args.threads)
    with ProgressReport(console) as report:
        result = train(data, recipe, report, seed=args.seed)
    write(args, data, describe(args, recipe, result), result, report.records)
    kept, units = ("-".join(map(str, counts)) for counts in (result.kept, result.model.units))
    console.print(
        f"{args.output}: error dense {result.dense_error:.2f} %, masked {result.masked_error:.2f} %; "
        f"kept {kept} of {units}; {result.mac_ratio:.2f} times fewer multiply-adds",
        highlight=False,
        soft_wrap=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    args = parse(argv)
    try:
        run(args, Console())
    except CompileError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
