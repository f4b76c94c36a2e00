"""Damage model files at random, load each, and see that nothing but a network or an error of ours comes of it.

    python tools/fuzz_files.py --flips 1000 --seed 0 [--format F]... [--json FILE] [--write]
    python tools/fuzz_files.py --name onnx:flip:17

Each mutant has a name, FORMAT:KIND:NUMBER, that makes it again:

flip    one bit is flipped
run     up to 16 bytes are overwritten, by ones, zeros or random bytes
cut     the file is cut off: at every kilobyte, and at random lengths
inner   one byte inside of a record of a zip archive changes, and the checksums with it
value   one value in JSON is missing, is there twice or is something odd
crafted made by hand (NUMBER is its name): 100 GB claimed, bombs, absurd sizes, odd names, deep nesting, other files

Each is read in a process of its own, forked from one that has torch loaded: ONNX files up to a module, weights without
the network that they are for, other networks up to an exported program; what is given beside a network (arrays to
verify on and to calibrate 8 bits by, recipes, measured times) up to what the network takes. One in 40 (of the latter
one in 200), and every crafted one, goes through the command line and all of the compiler. What is damaged stands in
fuzz_formats.py, how in fuzz_mutants.py and fuzz_crafted.py, and what is a defect in fuzz_judge.py.
A defect is an exception of another kind than ours, an exit code that is not documented, a new file after a refusal, a
signal, more than 10 s of processor time for a refusal, 60 s for anything, or more than 2 GB (of the whole process).
Exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

from fuzz_formats import FORMATS
from fuzz_judge import Outcome, in_a_process, judged
from fuzz_mutants import mutant, names

from sbp_compile.atomic import write_atomically

SAVED_EVERY = 25
ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "fuzz-files.md"
HEADING = """# Damaged files

    python tools/fuzz_files.py --flips {flips} --seed {seed} --write

Mutants of one small network in every format that is read, and of what is given beside one: arrays (`--inputs`,
`--int8`), recipes (`--apply`), measured times (`--tuning-file`). What each kind of damage is stands in
tools/fuzz_files.py. *Read*: the damage left something to go on with, another network or the same. *Refused*: by an
error of ours, with the exit code that is documented and nothing written. *Defects*: anything else, a signal, more than
10 s of processor time for a refusal, 60 s for anything, or more than 2 GB. Memory is that of the whole process, torch
and onnxruntime included; {base:.2f} GB of it are there before a file is opened.

"""


def base_memory() -> int:
    """Return the peak memory of a process that opens no file."""
    return in_a_process("nothing", lambda: (0, "")).memory


def save(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Keep outcomes in a file, from which a later run goes on."""
    write_atomically(path, json.dumps([asdict(outcome) for outcome in outcomes]))


def fuzz(chosen: Sequence[str], seed: int, console: Console, found: list[Outcome], path: Path | None) -> None:
    """Judge the mutants of some names, and add what became of them to `found`, and to a file now and then."""
    for name in track(chosen, "files", console=console, transient=True):
        outcome = judged(name, mutant(name, seed), seed=seed)
        found.append(outcome)
        if path is not None and len(found) % SAVED_EVERY == 0:
            save(path, found)
        if outcome.defect:
            console.print(f"{name}: {outcome.defect}: {outcome.message}", markup=False, soft_wrap=True)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return counts, worst seconds and worst memory for each format and kind, as Markdown."""
    groups: dict[tuple[str, str], list[Outcome]] = collections.defaultdict(list)
    for outcome in outcomes:
        kind_of_file, kind, _ = outcome.name.split(":")
        groups[kind_of_file, kind].append(outcome)
    lines = [
        "| format | damage | files | read | refused | defects | longest, s | largest, GB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (kind_of_file, kind), group in groups.items():
        defects = sum(bool(outcome.defect) for outcome in group)
        read = sum(outcome.is_read and not outcome.defect for outcome in group)
        cells = [kind_of_file, kind, len(group), read, len(group) - read - defects, defects]
        cells += [f"{max(o.seconds for o in group):.1f}", f"{max(o.memory for o in group) / 1e9:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=1000, help="random flips of each format (1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", action="append", choices=FORMATS, help="only this one; may be repeated")
    parser.add_argument("--name", action="append", help="only this mutant; may be repeated")
    parser.add_argument("--json", type=Path, help="keep the outcomes here, and go on from what is there")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    chosen = options.name or list(names(options.format or list(FORMATS), options.flips))
    outcomes: list[Outcome] = []
    if options.json and options.json.exists():
        outcomes = [Outcome(**entry) for entry in json.loads(options.json.read_text())]
    done = {outcome.name for outcome in outcomes}
    interrupted = False
    try:
        fuzz([name for name in chosen if name not in done], options.seed, console, outcomes, options.json)
    except KeyboardInterrupt:  # the next run goes on from here
        interrupted = True
    if options.json:
        save(options.json, outcomes)
    if interrupted:
        return 130
    text = table(outcomes)
    console.print(text, markup=False, soft_wrap=True)
    if options.write:
        heading = HEADING.format(flips=options.flips, seed=options.seed, base=base_memory() / 1e9)
        RESULT.write_text(heading + text + "\n", encoding="utf-8")
    return int(any(outcome.defect for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
