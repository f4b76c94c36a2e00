import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from passes.ir.lattice import Facts, full_mask
from passes.rules import Rule, base
from passes.rules.pointwise import Pointwise
from tests.passes.rules import samples
from tests.passes.rules.laws import X, call

ROOT = Path(__file__).resolve().parents[2]
ADD = torch.ops.aten.add.Tensor


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    yield importlib.import_module("validate_rules")
    torch.set_num_threads(2)


@pytest.fixture
def register(monkeypatch):
    """Another rule for `aten.add.Tensor` for the time of a test."""

    def chosen(rule):
        monkeypatch.setitem(base._RULES, ADD, rule())
        monkeypatch.setitem(samples.SPECIFIC, ADD, lambda op: [call(op, X((2, 4)), X((2, 4)))])

    return chosen


class ClaimsWhatOneSideKnows(Pointwise):
    def known(self, op, facts):
        return facts[0].known | facts[1].known


class ForgetsASide(Pointwise):
    def backward(self, op, demand, facts):
        return [demand, full_mask(op.info_of(op.operands[1]), False)]


class CouplesNothing(Pointwise):
    def couple(self, op, keep, facts):
        pass


class Raises(Pointwise):
    def forward(self, op, facts):
        raise ValueError("not today")


class SubtractsInstead(Pointwise):
    def rewrite(self, op, rewriter):
        return rewriter.call(torch.ops.aten.sub.Tensor, rewriter.map(op.node.args), like=op.node)


class KnowsNothing(Pointwise):
    def forward(self, op, facts):
        return Facts.unknown(op.out)


class AsksForEverything(Pointwise):
    def backward(self, op, demand, facts):
        return [full_mask(op.info_of(operand), True) for operand in op.operands]


class KeepsEverything(Pointwise):
    def couple(self, op, keep, facts):
        Rule.couple(self, op, keep, facts)


@pytest.mark.parametrize(
    ("rule", "law"),
    [
        (ClaimsWhatOneSideKnows, "forward"),
        (ForgetsASide, "backward"),
        (CouplesNothing, "couple"),
        (SubtractsInstead, "couple"),
        (Raises, "forward"),
    ],
)
def test_a_wrong_rule_is_incorrect_in_the_law_that_it_breaks(tool, register, capsys, rule, law):
    register(rule)
    assert tool.main(["--op", "aten.add.Tensor", "--samples", "20"]) == 1
    assert f"INCORRECT aten.add.Tensor {law}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rule", "law"),
    [(KnowsNothing, "forward"), (AsksForEverything, "backward"), (KeepsEverything, "couple")],
)
def test_a_timid_rule_is_missing_something_and_wants_a_reason(tool, register, capsys, rule, law):
    register(rule)
    assert tool.main(["--op", "aten.add.Tensor", "--samples", "20"]) == 1
    printed = capsys.readouterr().out
    assert "INCORRECT" not in printed
    assert f"missing   aten.add.Tensor {law}: " in printed
    assert "no reason given" in printed


def test_a_missing_claim_with_a_reason_is_no_failure(tool, register, capsys, monkeypatch):
    register(KnowsNothing)
    reasons = importlib.import_module("rule_reasons")
    monkeypatch.setattr(reasons, "REASONS", (("aten.add.*", "forward", "a test"),))
    assert tool.main(["--op", "aten.add.Tensor", "--samples", "20"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("missed: a test")


def test_a_right_rule_passes_without_a_word(tool, register, capsys):
    register(Pointwise)
    assert tool.main(["--op", "aten.add.Tensor", "--samples", "20"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("1 overloads, 20 samples: 0 incorrect, 0 missing")


def test_an_op_that_is_not_registered_is_named(tool, capsys):
    assert tool.main(["--op", "no such thing"]) == 2
    assert capsys.readouterr().err == "no registered overload contains 'no such thing'\n"


@pytest.mark.parametrize(("rule", "shown"), [(ForgetsASide, "changes"), (AsksForEverything, "Count(")])
def test_the_lines_of_a_repro_run_and_show_the_finding(tool, register, capsys, monkeypatch, rule, shown):
    register(rule)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    tool.main(["--op", "aten.add.Tensor", "--samples", "10", "--show-repro"])
    printed = capsys.readouterr().out.splitlines()
    lines = [line.removeprefix("    ") for line in printed if line.startswith("    ")]
    exec("\n".join(lines[: next(n for n, line in enumerate(lines) if "print(" in line) + 2]), {})
    result = capsys.readouterr().out
    assert "aten.add.Tensor" in result
    assert shown in result.splitlines()[-1]
    assert "missed=0" not in result.splitlines()[-1]


def test_the_same_seed_finds_the_same(tool, register, capsys):
    register(KnowsNothing)
    printed = []
    for seed in ("3", "3", "4"):
        tool.main(["--op", "aten.add.Tensor", "--samples", "5", "--json", "--seed", seed])
        printed.append(json.loads(capsys.readouterr().out)[0])
    assert printed[0] == printed[1] != printed[2]
    assert printed[0]["overload"] == "aten.add.Tensor"
    assert printed[0]["unexplained"] == ["forward"]


def test_it_writes_the_table(tool, register, capsys, monkeypatch, tmp_path):
    register(KnowsNothing)
    monkeypatch.setattr(tool, "RESULT", tmp_path / "rules.md")
    tool.main(["--op", "aten.add.Tensor", "--samples", "5", "--write"])
    assert "| aten.add.Tensor | 5 | 0 | 0 / " in (tmp_path / "rules.md").read_text()


def test_every_reason_is_about_a_registered_operator(tool):
    reasons = importlib.import_module("rule_reasons")
    homes = {str(overload): type(rule).__module__ for overload, rule in base.registered_rules().items()}
    for patterns, laws, reason in reasons.REASONS:
        assert set(laws.split()) <= set(tool.LAWS)
        assert reason
        for pattern in patterns.split():
            names = [name for name, home in homes.items() if home.endswith(pattern.replace("/", "."))]
            assert names or any(reasons.fnmatchcase(name, pattern) for name in homes), pattern
