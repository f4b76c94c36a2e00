"""Try every registered rule against the real operator on random samples.

    python tools/validate_rules.py [--op NAME] [--samples N] [--seed S] [--show-repro] [--json] [--write]

Each sample is a random variant of the calls in tests/passes/rules/samples.py, with random facts, demand and keep sets
(tools/rule_variants.py, tools/rule_trials.py). Two lists come out:

- incorrect: what the rule claims is false, a bug of the first rank; none may exist;
- missing: something is true that the rule does not claim, which costs channels and nothing else; each needs a reason
  in tools/rule_reasons.py.

Indices that a coupling keeps beyond the necessary ones, and that the rewrite cannot do without, are *widened*: no
finding, listed with the reason that the rule itself gives. The exit code is 1 if anything is incorrect or is missing
without a reason. `--show-repro` prints, for each finding, a few lines of python that reproduce the smallest one.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from rule_reasons import reasons_for
from rule_trials import LAWS, STYLES, Count, Trial, incorrect, missing, size_of
from rule_variants import vary

from passes.ir import schema
from passes.rules import registered_rules
from sbp_compile.atomic import write_atomically
from tests.passes.rules.laws import Sample
from tests.passes.rules.samples import samples_of

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "rules.md"


@dataclass(frozen=True)
class Finding:
    """One trial that shows something incorrect or missing."""

    law: str
    kind: str
    text: str
    sample: Sample
    seed: int
    style: str
    size: int

    def repro(self) -> str:
        """Lines of python, to be run from the repository's root, that show it."""
        function = "incorrect" if self.kind == "incorrect" else "missing"
        fields = dataclasses.fields(self.sample)
        written = ", ".join(f"{entry.name}={_written(getattr(self.sample, entry.name))}" for entry in fields)
        return "\n".join(
            (
                "import sys; sys.path[:0] = ['.', 'tools']",
                "from math import inf, nan",
                "import torch",
                f"from rule_trials import Trial, {function}",
                "from tests.passes.rules.laws import Sample, X",
                f"sample = Sample({written})",
                f"print(Trial(sample, {self.seed}, {self.style!r}))",
                f"print({function}(Trial(sample, {self.seed}, {self.style!r}), {self.law!r}))",
            )
        )


def _written(value: Any) -> str:
    """Python for an argument of a sample."""
    if isinstance(value, torch.Tensor):
        return f"torch.tensor({value.tolist()}, dtype={value.dtype}).reshape({tuple(value.shape)})"
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_written(item) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_written(item)}" for name, item in value.items()) + "}"
    return f"torch.ops.{value}" if schema.is_overload(value) else repr(value)


@dataclass
class Row:
    """What was found for one overload."""

    overload: str
    module: str
    samples: int = 0
    counts: dict[str, Count] = field(default_factory=lambda: {law: Count() for law in LAWS})
    incorrect: int = 0
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        """Remember the smallest finding of its kind."""
        held = self.findings.get((finding.law, finding.kind))
        if held is None or finding.size < held.size:
            self.findings[finding.law, finding.kind] = finding

    @property
    def missed(self) -> list[str]:
        """The laws in which the rule misses something."""
        return [law for law in LAWS if self.counts[law].missed]

    @property
    def unexplained(self) -> list[str]:
        """The laws in which it misses something without a reason in the table."""
        return [law for law in self.missed if not self.reasons(law)]

    def reasons(self, law: str) -> tuple[str, ...]:
        """Why the rule misses what it misses in one law."""
        return reasons_for(self.overload, self.module, law)

    @property
    def is_bad(self) -> bool:
        return bool(self.incorrect or self.unexplained or not self.samples)

    def why_widened(self) -> str:
        """The rule's most frequent reason for keeping more than is necessary."""
        common = collections.Counter(self.counts["couple"].reasons).most_common(1)
        return common[0][0] if common else ""


def validate(overload: Any, samples: int, seed: int) -> Row:
    """Try the rule of an overload on random variants of its sample calls."""
    row = Row(str(overload), type(registered_rules()[overload]).__module__)
    torch.manual_seed(0)
    originals = samples_of(overload)
    for number in range(samples):
        source = random.Random(f"{overload} {seed} {number}")
        sample = vary(source.choice(originals), source)
        style, trial_seed = source.choice(STYLES), source.randrange(2**31)
        trial = Trial(sample, trial_seed, style)
        if not trial.is_covered:
            continue
        row.samples += 1
        for law in LAWS:
            at = (sample, trial_seed, style, size_of(trial))
            _try(row, law, at)
    return row


def _try(row: Row, law: str, at: tuple[Sample, int, str, int]) -> None:
    failure = incorrect(Trial(*at[:3]), law)
    if failure is not None:
        row.incorrect += 1
        row.add(Finding(law, "incorrect", failure, *at))
        return
    found = missing(Trial(*at[:3]), law)
    row.counts[law] += found
    if found.missed:
        row.add(Finding(law, "missing", f"{found.missed} missed", *at))


def chosen(name: str) -> list[Any]:
    """The registered overloads whose names contain `name`."""
    return [overload for overload in sorted(registered_rules(), key=str) if name in str(overload)]


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--op", default="", metavar="NAME", help="only overloads whose names contain this")
    made.add_argument("--samples", type=int, default=40, metavar="N", help="for each overload (default 40)")
    made.add_argument(
        "--seed", type=int, default=0, metavar="S", help="another seed, other samples (default 0)"
    )
    made.add_argument("--show-repro", action="store_true", help="print python that reproduces each finding")
    made.add_argument("--json", action="store_true", help="print the rows as JSON")
    made.add_argument("--write", action="store_true", help="write docs/results/rules.md")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    overloads = chosen(options.op)
    if not overloads:
        print(f"no registered overload contains {options.op!r}", file=sys.stderr)
        return 2
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for overload in overloads:
            rows.append(validate(overload, options.samples, options.seed))
            if not options.json:
                show(rows[-1], options.show_repro)
    if options.json:
        print(json.dumps([as_json(row) for row in rows], indent=1))
    else:
        print(summary(rows))
    if options.write:
        write_atomically(RESULT, document(rows, options))
    return 1 if any(row.is_bad for row in rows) else 0


def show(row: Row, with_repro: bool) -> None:
    """Print what is incorrect or missing for one overload."""
    if not row.samples:
        print(f"{row.overload}: its rule covers none of the samples")
    for (law, kind), finding in sorted(row.findings.items()):
        if kind == "incorrect":
            print(f"INCORRECT {row.overload} {law}: {finding.text}")
        else:
            reason = " ".join(row.reasons(law)) or "no reason given"
            print(f"missing   {row.overload} {law}: {row.counts[law].missed} missed: {reason}")
        if with_repro:
            print("\n".join(f"    {line}" for line in finding.repro().splitlines()))
    sys.stdout.flush()


def as_json(row: Row) -> dict[str, Any]:
    """One row of the table as plain data."""
    return {
        "overload": row.overload,
        "samples": row.samples,
        "incorrect": row.incorrect,
        **{law: {"claimed": row.counts[law].claimed, "missed": row.counts[law].missed} for law in LAWS},
        "widened": dict(collections.Counter(row.counts["couple"].reasons)),
        "reasons": {law: list(row.reasons(law)) for law in row.missed},
        "unexplained": row.unexplained,
        "findings": [
            {"law": law, "kind": kind, "text": finding.text, "repro": finding.repro()}
            for (law, kind), finding in row.findings.items()
        ],
    }


def summary(rows: Sequence[Row]) -> str:
    """The totals in one line."""
    return (
        f"{len(rows)} overloads, {sum(row.samples for row in rows)} samples: "
        f"{sum(row.incorrect for row in rows)} incorrect, {sum(len(row.missed) for row in rows)} missing, "
        f"{sum(len(row.unexplained) for row in rows)} of them without a reason"
    )


HEADER = """\
# Rules against the real operators

{summary}.

Each rule is tried on {samples} random variants of its sample calls (sizes, ranks, dynamic axes, dtypes, arguments,
constants), with random facts, demand and keep sets. *Incorrect*: a claim that is false. *Missed*: an entry (forward,
backward) or an index (couple) that the rule could have claimed and did not, with its reason below. What is counted:

- forward: entries of the result claimed known; missed are those that stayed the same under up to 264 fillings of the
  unknown entries, of varied scale and sign;
- backward: unknown entries of operands called dead; missed are those no change of which changed a demanded entry;
- couple: indices of operands and result that go; missed are those that the coupling kept although the rewrite does
  without them. *Widened* are the ones that nobody needs and the rewrite cannot do without, with the rule's own most
  frequent reason.

Command: `python tools/validate_rules.py --samples {samples} --seed {seed} --write`

| overload | samples | incorrect | forward claimed / missed | backward | couple | widened | reasons |
|---|---|---|---|---|---|---|---|
"""


def document(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """docs/results/rules.md."""
    numbered = list(dict.fromkeys(_reasons(rows)))
    lines = [_line(row, numbered) for row in rows]
    listed = [f"{number}. {reason}" for number, reason in enumerate(numbered, 1)]
    head = HEADER.format(summary=summary(rows), samples=options.samples, seed=options.seed)
    return head + "\n".join(lines) + "\n\n## Reasons\n\n" + "\n".join(listed) + "\n"


def _reasons(rows: Iterable[Row]) -> Iterable[str]:
    return (reason for row in rows for law in row.missed for reason in row.reasons(law))


def _line(row: Row, numbered: Sequence[str]) -> str:
    counts = [f"{row.counts[law].claimed} / {row.counts[law].missed}" for law in LAWS]
    widened = f"{row.counts['couple'].widened} {row.why_widened()}".strip()
    numbers = sorted({numbered.index(reason) + 1 for reason in _reasons([row])})
    cells = (row.overload, row.samples, row.incorrect, *counts, widened, ", ".join(map(str, numbers)))
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    raise SystemExit(main())
