"""Train a network with Structured Bayesian Pruning, or a baseline, from a dense network that is trained first.

    python tools/train.py lenet5 --dataset digits --seed 0 -o model.pt
    python tools/train.py --model package.module:factory --dataset cifar10 --method ssl -o model.pt
    torchrun --nproc-per-node=2 tools/train.py lenet5 --dataset fashion-mnist -o model.pt  # --shard: FSDP2

Writes the model file, which `python -m sbp_compile` takes, and beside it a log (.json), the checkpoint (.ckpt) and two
figures (.curves.png, .units.png). A run that was interrupted goes on with --resume, from the last checkpoint, and
gives bitwise the network that it would have given. The recipes are data: sbp_compile/training/recipes.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from train_progress import ProgressReport, Silence

from sbp_compile.atomic import write_atomically
from sbp_compile.capture import save_model
from sbp_compile.errors import CompileError, UsageError
from sbp_compile.interruption import EXIT_CODES, INTERRUPTIONS, interrupted_exit_code, interruptible
from sbp_compile.training import (
    METHODS,
    NETWORKS,
    Conditions,
    Recipe,
    Result,
    Task,
    World,
    joined,
    load,
    recipe_for,
    train,
)
from sbp_compile.training.checkpoint import State, plain, read_state, refuse_other_run
from sbp_compile.training.figures import draw_curves, draw_units
from sbp_compile.training.recipes import changed, pressed

COUNTS = ("threads", "dense_epochs", "epochs", "batch")
POSITIVE = ("learning_rate", "pressure")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("network", nargs="?", choices=NETWORKS)
    add("--model", metavar="MODULE:FACTORY", help="a network of your own, instead of NETWORK")
    add("--method", choices=METHODS, default="sbp", help="sbpa: the KL of each layer by its multiply-adds")
    add(
        "--dataset", default="digits", help="mnist, fashion-mnist, cifar10, digits or folder:PATH (idx files)"
    )
    add("--data", type=Path, help="where the dataset's files are, if not at the usual place")
    add("--random-labels", action="store_true", help="shuffle the training labels: there is nothing to learn")
    add("--pretrained", type=Path, metavar="CKPT", help="begin with the dense network of another run")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="CPU threads (default 1: small networks gain little)")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        help="of the forward pass; default: bfloat16 on a GPU that has it, else float32",
    )
    add("--dense-epochs", type=int, help="instead of the recipe's number")
    add("--epochs", type=int, help="epochs with the method, instead of the recipe's number")
    add("--batch", type=int, help="examples in a step of the method (of all processes together)")
    add("--learning-rate", type=float, help="of the method, instead of the recipe's")
    add("--pressure", type=float, default=1.0, help="factor on all weights of the KL, or of the lasso")
    add(
        "--shard",
        action="store_true",
        help="each process of torchrun holds its part of the parameters (FSDP2)",
    )
    add("--resume", action="store_true", help="go on where a run with the same options was stopped")
    add("--checkpoint-every", type=float, default=30.0, metavar="SECONDS")
    add("--no-figures", dest="figures", action="store_false")
    add("-o", "--output", type=Path, required=True, metavar="MODEL", help="the model file to write")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for options that cannot be used."""
    if (args.network is None) == (args.model is None):
        raise UsageError(
            f"give a network ({', '.join(NETWORKS)}) or --model package.module:factory, one of them"
        )
    if args.model is not None and ":" not in args.model:
        raise UsageError(f"--model (={args.model}) must be package.module:factory")
    for name in COUNTS:
        value, least = getattr(args, name), 0 if name == "dense_epochs" else 1
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} (={value}) must be at least {least}")
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} (={value}) must be a positive number")
    if not args.output.parent.is_dir():
        raise UsageError(f"the folder of --output (={args.output}) does not exist: create it")
    if args.figures and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("figures need matplotlib: pip install matplotlib, or pass --no-figures")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; leave the option out")


def choose_recipe(args: argparse.Namespace, examples: int) -> Recipe:
    """Look up the recipe for this network and data size, with what the command line changes."""
    recipe = recipe_for(args.model or args.network, examples)
    if args.dense_epochs is not None:
        recipe = replace(recipe, dense=replace(recipe.dense, epochs=args.dense_epochs))
    changes = (args.epochs, args.batch, args.learning_rate)
    if args.method == "dense":
        return replace(recipe, dense=changed(recipe.dense, *changes), methods={})
    settings = pressed(recipe.settings(args.method), args.pressure)
    settings = replace(settings, phase=changed(settings.phase, *changes))
    return replace(recipe, methods={args.method: settings})


def choose_precision(asked: str | None, device: str) -> str:
    """Return the precision asked for, else what suits the device."""
    return asked or ("bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32")


def first_state(args: argparse.Namespace, about: dict[str, Any], device: str, checkpoint: Path) -> State:
    """Return where the run begins: at a checkpoint, behind the pretraining of another run, or at the start."""
    if args.resume and checkpoint.exists():
        state = read_state(checkpoint, device)
        refuse_other_run(state, about, checkpoint)
        return state
    if checkpoint.exists() and not read_state(checkpoint).finished:
        raise UsageError(f"{checkpoint} is of a run that was stopped: go on with --resume, or remove it")
    if args.pretrained is None:
        return State(about)
    other = read_state(args.pretrained, device)
    if not other.dense or other.about["network"] != about["network"]:
        raise UsageError(
            f"--pretrained {args.pretrained} has no finished {about['network']}: give a run of that network"
        )
    return State(about, phase=1, dense=other.dense, epochs=[e for e in other.epochs if e["phase"] == "dense"])


def describe(args: argparse.Namespace, recipe: Recipe, precision: str) -> dict[str, Any]:
    """Say in plain values what is run: what has to be the same when it goes on."""
    return {
        "network": recipe.network,
        "method": args.method,
        "dataset": args.dataset,
        "random_labels": args.random_labels,
        "pretrained": args.pretrained and str(args.pretrained),
        "seed": args.seed,
        "precision": precision,
        "recipe": plain(recipe),
    }


def results(result: Result, state: State) -> dict[str, Any]:
    """Say in plain values what came out; no number stands for infinitely fewer multiply-adds."""
    finite = {ratio: ratio if math.isfinite(ratio) else None for ratio in [result.mac_ratio]}
    epochs = [
        epoch
        | {"kept": list(epoch["kept"])}
        | {"mac_ratio": epoch["mac_ratio"] if math.isfinite(epoch["mac_ratio"]) else None}
        for epoch in state.epochs
    ]
    return {
        "dense_error": result.dense_error,
        "masked_error": result.masked_error,
        "train_error": result.train_error,
        "kept": list(result.kept),
        "mac_ratio": finite[result.mac_ratio],
        "epochs": epochs,
    }


def write(args: argparse.Namespace, task: Task, result: Result, log: dict[str, Any]) -> None:
    """Write figures, log and model file, each in one step, the model last."""
    if args.figures:
        draw_curves(log["epochs"], args.output.with_suffix(".curves.png"))
        draw_units(result.method.module, args.output.with_suffix(".units.png"))
    write_atomically(args.output.with_suffix(".json"), json.dumps(log, indent=1))
    save_model(result.model.cpu().eval(), (task.example.cpu(),), args.output)


def run(args: argparse.Namespace, console: Console, device: str, world: World) -> None:
    """Train and write; raises CompileError for what the user can put right."""
    data = load(args.dataset, args.data)
    recipe = choose_recipe(args, len(data.train_images))
    precision = choose_precision(args.precision, device)
    about, checkpoint = describe(args, recipe, precision), args.output.with_suffix(".ckpt")
    # With shards the whole state would not be for the device: each process takes its part to it.
    state = first_state(args, about, "cpu" if world.shards else device, checkpoint)
    world.meet()  # nobody writes the checkpoint before all have read it
    labels = args.seed if args.random_labels else None
    task = Task(data, device=device, augment=recipe.augment, random_labels=labels)
    conditions = Conditions(args.seed, precision, world, checkpoint, args.checkpoint_every)
    report = ProgressReport(console) if world.rank == 0 else Silence()
    with report if isinstance(report, ProgressReport) else nullcontext():
        result = train(task, recipe, args.method, report, conditions, state=state)
    if world.rank == 0:
        log = about | {"threads": args.threads, "processes": world.size} | results(result, state)
        write(args, task, result, log)
        console.print(summary(args.output, result), highlight=False, soft_wrap=True)


def summary(output: Path, result: Result) -> str:
    """Say in a line what came out."""
    kept = "-".join(map(str, result.kept))
    return (
        f"{output}: error dense {result.dense_error:.2f} %, masked {result.masked_error:.2f} % "
        f"(training {result.train_error:.2f} %); kept {kept}; {result.mac_ratio:.2f} times fewer multiply-adds"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code, 130 or 143 after Ctrl-C or SIGTERM."""
    args = parse(argv)
    with interruptible():
        try:
            check(args)
            torch.set_num_threads(args.threads)
            device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
            with joined(device, sharded=args.shard) as world:
                run(args, Console(), device, world)
        except CompileError as error:
            print(f"train.py: {error}", file=sys.stderr)
            return error.exit_code
        except INTERRUPTIONS:
            print("train.py: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
            return interrupted_exit_code() or EXIT_CODES[signal.SIGINT]
    return 0


if __name__ == "__main__":
    sys.exit(main())
