"""The command line's options for tuning: by measurement here, or by what was measured elsewhere."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from sbp_compile.errors import CompileError, TuningCacheWarning, UsageError

if TYPE_CHECKING:
    from passes import Target
    from sbp_compile.timing import Progress
    from sbp_compile.tuning import LayerTimes, OnnxruntimeTuner

DEFAULT_SECONDS = 60.0
LEAST_SECONDS, MOST_SECONDS = 1.0, 86400.0


def add_tuning_options(parser: argparse.ArgumentParser) -> None:
    """Add `--tune` and `--tuning-file`."""
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--tune",
        type=_seconds,
        nargs="?",
        const=DEFAULT_SECONDS,
        metavar="SECONDS",
        help="choose widths by timing layers and networks in onnxruntime here, at the first --batch and at --threads "
        f"and --provider, for about so many seconds ({DEFAULT_SECONDS:.0f})",
    )
    group.add_argument(
        "--tuning-file",
        type=Path,
        metavar="FILE",
        help="where --tune keeps measured times (a cache of the user's); without --tune: choose widths by the times in "
        "this file, which may be another machine's",
    )


def check_tuning_options(options: argparse.Namespace) -> None:
    """Refuse before any work what cannot be tuned for."""
    if options.tune is None and options.tuning_file is None:
        return
    if options.target == "none":
        raise UsageError(
            "--target none asks for the fewest channels: leave it out, or --tune and --tuning-file"
        )
    from sbp_compile.timing import require_provider

    if options.tune is not None:
        require_provider(options.provider)


def tuning_files(options: argparse.Namespace) -> list[Path]:
    """What the user named to be written."""
    return [] if options.tune is None or options.tuning_file is None else [options.tuning_file]


def tuned(
    options: argparse.Namespace, table: Target | None, progress: Progress
) -> tuple[Target | None, OnnxruntimeTuner | None]:
    """The target and the tuner for the pipeline: the table and none unless something else is asked for."""
    if options.tune is None and options.tuning_file is None:
        return table, None
    from sbp_compile.tuning import LayerTimes, Measured, OnnxruntimeTuner, default_path, load_times

    here = LayerTimes.of_this_machine(
        batch=options.batch[0], threads=options.threads, provider=options.provider
    )
    path = options.tuning_file or default_path()
    known = load_times(path)
    if options.tune is None:
        return Measured(_of_file(path, known, here), table), None
    times = next((times for times in known if times.machine == here.machine), here)
    return table, OnnxruntimeTuner(times, options.tune, progress)


def keep_times(options: argparse.Namespace, tuner: OnnxruntimeTuner | None) -> None:
    """Write what was measured where `--tuning-file` says, else into the user's cache."""
    if tuner is None:
        return
    from sbp_compile.tuning import default_path, save_times

    if options.tuning_file is not None:
        save_times(options.tuning_file, tuner.times)
        return
    try:
        save_times(default_path(), tuner.times)
    except CompileError as error:  # the network is what was asked for, not the cache
        warnings.warn(f"measured times are not kept: {error}", TuningCacheWarning, stacklevel=2)


def _of_file(path: Path, known: list[LayerTimes], here: LayerTimes) -> LayerTimes:
    """The times of the machine at hand, else those of the only machine in the file."""
    for times in known:
        if times.machine == here.machine:
            return times
    if len(known) == 1:
        return known[0]
    if not known:
        raise UsageError(f"tuning file {str(path)!r} does not exist: --tune makes one")
    machines = "; ".join(map(str, known))
    raise UsageError(
        f"tuning file {str(path)!r} has {len(known)} machines, none of them this one ({machines})"
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not LEAST_SECONDS <= value <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds between {LEAST_SECONDS:.0f} and {MOST_SECONDS:.0f}"
        )
    return value
