"""The tuner: layers at candidate widths take turns in onnxruntime, then whole networks do."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from passes import Input, Note, Program, Target, widths_of
from passes.targets import Layer
from sbp_compile.emit.onnx_file import onnx_model, save_onnx
from sbp_compile.timing import Progress, compare
from sbp_compile.timing.session import Runner, open_session
from sbp_compile.tuning.layer_models import input_sizes, layer_model, shape_of
from sbp_compile.tuning.layer_times import Key, LayerTimes, Measured, key_of

LAYERS_SHARE = 0.6  # of the budget; the rest is for whole networks
FEWEST_VISITS = 5
VISIT_S = 200e-6
OVERHEAD_S = 5e-3  # of opening a session, beside the runs
MOST_WEIGHTS = 1 << 28  # of the candidates of one layer, in entries: sessions live side by side


@dataclass
class OnnxruntimeTuner:
    """Measures for `passes.default_pipeline(tuner=...)`; see `passes.choose_widths.Tuner`.

    `times`: what is known already; what is measured is added. `seconds`: for everything together, at least for
    a few runs of each network. `progress`: called with a fraction and a text.
    """

    times: LayerTimes
    seconds: float = 60.0
    progress: Progress = lambda fraction, text: None
    measured: int = 0
    asked: int = 0
    _began: float = field(default=0.0, init=False, repr=False)

    def target(self, original: Program, minimal: Program, table: Target | None) -> Target:
        """Time every layer at the widths that it may get, the dearest first, until its share of the budget is over."""
        self._began = time.monotonic()
        guess = Measured(self.times, table)
        questions = widths_of(minimal, original, guess).questions()
        keys = list(dict.fromkeys(key_of(*question) for question in questions if shape_of(question[0])))
        fresh = [key for key in keys if key not in self.times.seconds]
        self.asked, self.measured = len(keys), len(keys) - len(fresh)
        groups = sorted(_of_one_layer(fresh), key=lambda keys: -max(guess.seconds(*key) for key in keys))
        self._time_groups(groups, guess)
        return Measured(self.times, table)

    def _time_groups(self, groups: Sequence[Sequence[Key]], guess: Target) -> None:
        end = self._began + LAYERS_SHARE * self.seconds
        costs = [sum(guess.seconds(*key) * self.times.batch + OVERHEAD_S for key in keys) for keys in groups]
        for number, keys in enumerate(groups):
            left = end - time.monotonic()
            if left <= 0:
                return
            self.progress(number / len(groups) * LAYERS_SHARE, f"tuning: layer {number + 1} of {len(groups)}")
            self._time_group(keys, left * costs[number] / sum(costs[number:]))

    def _time_group(self, keys: Sequence[Key], seconds: float) -> None:
        """The fastest of all visits of each; they take turns."""
        end = time.monotonic() + seconds
        runners = [self._runner(key) for key in keys]
        fastest = [runner.seconds_per_run(1) for runner in runners]
        runs = max(1, round(VISIT_S / max(min(fastest), 1e-7)))
        visits = 0
        while visits < FEWEST_VISITS or time.monotonic() < end:
            for number, runner in enumerate(runners):
                fastest[number] = min(fastest[number], runner.seconds_per_run(runs))
            visits += 1
        self.times.seconds.update(zip(keys, fastest, strict=True))
        self.measured += len(keys)

    def _runner(self, key: Key) -> Runner:
        layer, inputs, _ = key
        times = self.times
        model = layer_model([key], times.batch)
        session = open_session(str(key), model, provider=times.provider, threads=times.threads)
        sizes = input_sizes(layer, inputs, times.batch)
        values = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
        return Runner(str(key), session, {"x": values}, times.provider)

    def fastest(self, programs: Mapping[str, Program]) -> tuple[str, Note]:
        """Time whole networks in turns; the one whose median ratio to the first is the best."""
        left = max(self.seconds - (time.monotonic() - self._began), (1 - LAYERS_SHARE) * self.seconds)
        distinct = dict(_distinct(programs))
        layers = f"{self.measured} of {self.asked} layers at candidate widths measured"
        if len(distinct) == 1:
            name = next(iter(distinct))
            return name, Note("tuning", f"{layers}; no width is better than the fewest channels")
        first = next(iter(programs.values()))
        shapes = {entry.shown: _timed_shape(entry) for entry in first.inputs}
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / f"{name}.onnx" for name in distinct}
            for name, program in distinct.items():
                save_onnx(
                    onnx_model(program, [f"sbp_compile.{at}" for at in range(len(program.outputs))], {}),
                    files[name],
                )
            found = compare(
                files,
                batch=self._batch(first),
                threads=self.times.threads,
                provider=self.times.provider,
                shapes=shapes,
                budget_s=left,
                progress=lambda fraction, text: self.progress(
                    LAYERS_SHARE + (1 - LAYERS_SHARE) * fraction, f"tuning: {text}"
                ),
            )
        best = max(
            (ratio for ratio in found.ratios if ratio.ratio > 1), key=lambda ratio: ratio.ratio, default=None
        )
        against = ", ".join(
            f"{ratio.other} {ratio.ratio:.2f}x ({ratio.ci_low:.2f} to {ratio.ci_high:.2f})"
            for ratio in found.ratios
        )
        taken = next(iter(distinct)) if best is None else best.other
        return taken, Note("tuning", f"{layers}; against the fewest channels: {against}; taken: {taken}")

    def _batch(self, program: Program) -> int:
        """The batch that is asked for, where the network takes it."""
        entries = [entry for entry in program.inputs if entry.sizes]
        dynamic = [entry for entry in entries if not entry.is_static(0)]
        return self.times.batch if dynamic or not entries else entries[0].sizes[0]


def _timed_shape(entry: Input) -> list[int | str]:
    """The example's sizes, with the batch where the leading axis is dynamic."""
    is_batch = bool(entry.sizes) and not entry.is_static(0)
    return ["batch", *entry.sizes[1:]] if is_batch else list(entry.sizes)


def _of_one_layer(keys: Sequence[Key]) -> Iterator[list[Key]]:
    """Keys of one layer together, in pieces whose weights fit into memory side by side."""

    def layer_of(key: Key) -> tuple[int, ...]:
        layer: Layer = key[0]
        groups = 0 if layer.is_depthwise else layer.groups
        return layer.spatial_rank, layer.taps, layer.positions, groups

    for _, group in groupby(sorted(keys, key=layer_of), key=layer_of):
        held, weights = list[Key](), 0
        for key in group:
            size = key[0].taps * key[1] * key[2]
            if held and weights + size > MOST_WEIGHTS:
                yield held
                held, weights = [], 0
            held.append(key)
            weights += size
        yield held


def _distinct(programs: Mapping[str, Program]) -> Iterator[tuple[str, Program]]:
    """Each network once: under the first of its names."""
    seen: list[Program] = []
    for name, program in programs.items():
        if not any(program is other or _are_equal(program, other) for other in seen):
            seen.append(program)
            yield name, program


def _are_equal(first: Program, second: Program) -> bool:
    """Whether graphs and constants agree to the last bit."""
    return (
        str(first.graph) == str(second.graph)
        and first.constants.keys() == second.constants.keys()
        and all(torch.equal(value, second.constants[name]) for name, value in first.constants.items())
    )
