"""The paper's tables, from networks that are trained here.

    python tools/paper.py [--only WORD...] [--data digits=PATH...]

Trains what is not trained yet (tools/train.py, one run after the other; an interrupted one goes on), compiles and
measures what is not measured yet, and writes docs/results/paper.md with its figures from what is there. `--list` shows
the runs, `--only` takes those whose name holds one of the words, `--no-train` and `--no-measure` leave a stage out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

import sweep
from paper_measure import measure
from paper_page import write_page
from paper_runs import RUNS, Run

from sbp_compile.atomic import write_atomically
from sbp_compile.errors import InputError

TRAIN = Path(__file__).with_name("train.py")


def train(run: Run, folder: Path, data: dict[str, str], threads: int) -> bool:
    """Train one network, or go on with it, unless it is there; False where its data set is not.

    Ends the program where training ends otherwise than well, with the same exit code.
    """
    output = folder / f"{run.name}.pt"  # written last
    if output.exists():
        return True
    command = [sys.executable, str(TRAIN), *run.arguments(folder), "--resume", "--threads", str(threads)]
    command += ["-o", str(output)]
    if run.dataset in data:
        command += ["--data", data[run.dataset]]
    print(f"-- {run.name}", flush=True)
    code = subprocess.run(command).returncode
    if code not in (0, InputError.exit_code):
        raise SystemExit(code)
    return code == 0


def measured(run: Run, folder: Path, data: dict[str, str], budget: float) -> None:
    """Compile and time one trained network, unless that was done for this very file."""
    model, target = folder / f"{run.name}.pt", folder / f"{run.name}.measured.json"
    if not model.exists() or (target.exists() and target.stat().st_mtime >= model.stat().st_mtime):
        return
    found = measure(model, run.dataset, data.get(run.dataset), budget)
    write_atomically(target, json.dumps(found, indent=1))
    print(f"-- {run.name}: {found}", flush=True)


def swept(run: Run, folder: Path, data: dict[str, str]) -> None:
    """Try thresholds and budgets on one trained network, without files and times, unless that was done."""
    checkpoint, target = folder / f"{run.name}.ckpt", folder / f"{run.name}.sweep.json"
    if not run.is_swept or not (folder / f"{run.name}.pt").exists():
        return
    if not target.exists() or target.stat().st_mtime < checkpoint.stat().st_mtime:
        given = ["--data", data[run.dataset]] if run.dataset in data else []
        sweep.main([str(checkpoint), *given, "--budget", "0", "--criteria", "snr", "macs", "-o", str(target)])


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, default=Path("out/paper"), help="where models, logs and measurements lie")
    add("--data", action="append", default=[], metavar="DATASET=PATH", help="as --data of tools/train.py")
    add("--only", nargs="*", default=[""], metavar="WORD")
    add("--threads", type=int, default=1)
    add("--budget", type=float, default=10.0, help="seconds for each timing")
    add("--list", action="store_true")
    add("--no-train", dest="train", action="store_false")
    add("--no-measure", dest="measure", action="store_false")
    options = parser.parse_args()
    chosen = [run for run in RUNS if any(word in run.name for word in options.only)]
    if options.list:
        print("\n".join(run.name for run in chosen))
        return
    data = dict(item.split("=", 1) for item in options.data)
    options.folder.mkdir(parents=True, exist_ok=True)
    absent: set[str] = set()
    for run in chosen:
        if (
            options.train
            and run.dataset not in absent
            and not train(run, options.folder, data, options.threads)
        ):
            absent.add(run.dataset)
        if options.measure:
            measured(run, options.folder, data, options.budget)
            swept(run, options.folder, data)
    write_page(options.folder)


if __name__ == "__main__":
    main()
