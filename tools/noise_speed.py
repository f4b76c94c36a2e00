"""What noise layers cost in training: a step against the same network with dropout at the same places, and memory.

Example: python tools/noise_speed.py --networks lenet5 vgg-like --rounds 40 --json noise-speed.json

Steps (forward, loss, backward, Adam) of the networks take turns, in an order that is turned round each time; the
ratio is the median over the rounds of the two times of one round. The loss of the noisy network includes the KL.
Memory is counted by watching every tensor that an operator makes in one layer's forward and backward pass: what is
alive at the peak beyond the layer's input, its output and their gradients, in units of the input.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from sbp_compile.atomic import write_atomically
from sbp_compile.nn import LogNormalNoise, elbo_loss, parameter_groups
from sbp_compile.training import LeNet5, LeNet500300, VGGLike

NETWORKS = {"lenet5": LeNet5, "lenet500300": LeNet500300, "vgg-like": VGGLike}
SHAPES = ((128, 500), (128, 20, 24, 24), (128, 50, 8, 8), (32, 256, 8, 8))
TARGET = 1.15


@dataclass(frozen=True)
class StepRatio:
    """Seconds of a training step, medians, and the median ratio of paired steps, with its quartiles."""

    network: str
    batch: int
    dropout_s: float
    noise_s: float
    ratio: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class LayerMemory:
    """The most that one layer's forward and backward pass hold beside input, output and gradients, in inputs."""

    shape: tuple[int, ...]
    extra: float


def with_dropout(network: nn.Module) -> nn.Module:
    """Replace every noise layer by ordinary dropout, in place."""
    for name, part in list(network.named_modules()):
        if isinstance(part, LogNormalNoise):
            path, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(path), attribute, nn.Dropout(0.5))
    return network


def stepper(network: nn.Module, batch: int) -> Callable[[], float]:
    """Return a function that takes one training step on fixed random data and returns its seconds."""
    images = torch.randn(batch, *network.input_shape)  # type: ignore[misc]
    labels = torch.randint(10, (batch,))
    optimizer = torch.optim.Adam(parameter_groups(network.train(), 1e-3))

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(elbo_loss(F.cross_entropy(network(images), labels), network, 50_000))
        optimizer.step()
        return time.perf_counter() - start

    return step


def compare_steps(name: str, batch: int, rounds: int, seed: int) -> StepRatio:
    """Time both networks in turns."""
    torch.manual_seed(seed)
    steps = [stepper(with_dropout(NETWORKS[name]()), batch), stepper(NETWORKS[name](), batch)]
    for step in steps * 2:
        step()
    times: tuple[list[float], list[float]] = ([], [])
    gc.disable()
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            times[which].append(steps[which]())
    gc.enable()
    ratios = [noise / dropout for dropout, noise in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return StepRatio(
        name, batch, statistics.median(times[0]), statistics.median(times[1]), middle, low, high, rounds
    )


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operators make and that are alive, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._watch(value)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result

    def _watch(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        address = storage.data_ptr()
        if storage.nbytes() and address not in self.alive:
            self.alive[address] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, address, None)


def layer_memory(shape: Sequence[int]) -> LayerMemory:
    """Watch one noise layer alone."""
    layer, x = LogNormalNoise(shape[1]), torch.randn(*shape, requires_grad=True)
    gradient = torch.randn(*shape)
    with PeakBytes() as counted:
        layer(x).backward(gradient)
    needed = 2  # the output and the input's gradient
    return LayerMemory(tuple(shape), counted.peak / (x.numel() * x.element_size()) - needed)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["lenet5", "vgg-like"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code: 1 where a network misses the target."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    memory = [layer_memory(shape) for shape in SHAPES]
    for entry in memory:
        print(
            f"layer on {'x'.join(map(str, entry.shape)):>14}: {entry.extra:5.2f} inputs beside what is needed"
        )
    steps = []
    for name in args.networks:
        steps.append(compare_steps(name, args.batch, args.rounds, args.seed))
        found = steps[-1]
        print(
            f"{name:>11}, batch {found.batch}: dropout {1e3 * found.dropout_s:.1f} ms, noise "
            f"{1e3 * found.noise_s:.1f} ms, ratio {found.ratio:.3f} (quartiles {found.low:.3f} to {found.high:.3f})"
        )
    if args.json is not None:
        found_all = {
            "steps": [asdict(entry) for entry in steps],
            "memory": [asdict(entry) for entry in memory],
        }
        write_atomically(args.json, json.dumps(found_all, indent=1))
    return int(any(entry.ratio > TARGET for entry in steps))


if __name__ == "__main__":
    sys.exit(main())
