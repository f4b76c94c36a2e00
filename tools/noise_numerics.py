"""Prints how accurate the noise layer is, against mpmath, and what it costs next to dropout.

    python tools/noise_numerics.py [--points 1000]

Needs the `dev` extra. Every value is the largest error over a grid of edge cases (mu from -40 to 40,
log_sigma from -20 to 5) and random points of [-20, 5] x [-20, 5]. The exact value is taken at the parameters
as rounded to their dtype, and skipped where it is below the dtype's smallest normal number.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sbp_compile.nn import LogNormalNoise
from sbp_compile.nn.truncated import divergence, moments
from tests.nn import log_normal_reference as reference

Point = tuple[float, float]
_SHAPES = ((128, 500), (128, 800), (32, 500), (128, 20, 24, 24), (128, 50, 8, 8), (128, 256, 8, 8))


def main() -> None:
    """Parse the command line and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--points", type=int, default=1000, help="random points beside the grid (default 1000)"
    )
    points = reference.points(count=parser.parse_args().points)
    print(f"{len(points)} points, torch {torch.__version__}\n")
    print_accuracy(points)
    print()
    torch.set_num_threads(1)
    print_cost()


def print_accuracy(points: list[Point]) -> None:
    """Print the largest relative errors of values and gradients."""
    print("| quantity | float32 value | float64 value | at (mu, log_sigma) | float64 gradient |")
    print("|---|---|---|---|---|")
    single, double = value_errors(points, torch.float32), value_errors(points, torch.float64)
    gradients = gradient_errors(points[::4])
    for i, name in enumerate(reference.QUANTITIES):
        worst, (mu, log_sigma) = double[i]
        place = f"({mu:.4g}, {log_sigma:.4g})"
        print(f"| {name} | {single[i][0]:.1e} | {worst:.1e} | {place} | {gradients[i]:.1e} |")


def value_errors(points: list[Point], dtype: torch.dtype) -> list[tuple[float, Point]]:
    """For each quantity the largest relative error and the point where it occurs."""
    mu, log_sigma = torch.tensor(points, dtype=dtype).T
    rounded = list(zip(mu.tolist(), log_sigma.tolist(), strict=True))
    exact = [reference.exact(*point) for point in rounded]
    tiny = torch.finfo(dtype).tiny
    worst = []
    for i, values in enumerate(quantities(mu, log_sigma)):
        errors = [
            (reference.relative_error(got, wanted[i]), point)
            for got, wanted, point in zip(values.to(dtype).tolist(), exact, rounded, strict=True)
            if abs(wanted[i]) > tiny
        ]
        worst.append(max(errors))
    return worst


def gradient_errors(points: list[Point]) -> list[float]:
    """For each quantity the largest error of either derivative, relative to the larger (mu in units of s)."""
    mu, log_sigma = torch.tensor(points, dtype=torch.float64).T.contiguous()
    parameters = mu.requires_grad_(), log_sigma.requires_grad_()
    worst = []
    for i, values in enumerate(quantities(*parameters)):
        by_mu, by_log_sigma = torch.autograd.grad(values.sum(), parameters, retain_graph=True)
        errors = [0.0]
        for point, got_mu, got_log_sigma in zip(points, by_mu.tolist(), by_log_sigma.tolist(), strict=True):
            exact_mu, exact_log_sigma = reference.gradients(*point)[i]
            s = math.exp(point[1])
            scale = max(abs(exact_mu) * s, abs(exact_log_sigma))
            errors.append(reference.relative_error(got_mu, exact_mu, scale / s))
            errors.append(reference.relative_error(got_log_sigma, exact_log_sigma, scale))
        worst.append(max(errors))
    return worst


def quantities(mu: Tensor, log_sigma: Tensor) -> tuple[Tensor, ...]:
    """Evaluate what `reference.QUANTITIES` names."""
    return (divergence(mu, log_sigma, *reference.LOG_RANGE), *moments(mu, log_sigma, *reference.LOG_RANGE))


def print_cost() -> None:
    """Print milliseconds of one thread for forward and backward of one layer, noise next to dropout."""
    print("| input | noise | all modes outside | one draw per batch | dropout | kl() | eval mode |")
    print("|---|---|---|---|---|---|---|")
    for shape in _SHAPES:
        cells = " | ".join(f"{cell:.2f}" for cell in costs(shape))
        print(f"| {'x'.join(map(str, shape))} | {cells} |")


def costs(shape: tuple[int, ...]) -> list[float]:
    """Milliseconds for the columns of `print_cost`."""
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    noise, outside = LogNormalNoise(shape[1]), LogNormalNoise(shape[1])
    nn.init.constant_(outside.mu, 0.1)
    shared = LogNormalNoise(shape[1], per_example=False)
    dropout = nn.Dropout2d(0.5) if len(shape) == 4 else nn.Dropout(0.5)

    def step(layer: nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.backward(layer(x), grad)

    runs = [step(layer) for layer in (noise, outside, shared, dropout)]
    runs += [lambda: torch.autograd.backward(noise.kl()), lambda: shared.eval()(x)]
    return [milliseconds(run) for run in runs]


def milliseconds(run: Callable[[], object], repeats: int = 40) -> float:
    """Time `run` by the CPU time of this thread, the smallest of some repetitions."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times) * 1e3


if __name__ == "__main__":
    main()
