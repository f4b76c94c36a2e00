"""What the benchmark keeps and says: rows of several runs, goals that are missed, tools that have nothing to show."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from bench_figure import draw
from bench_page import Results, Row, page, summary


def row(network="LeNet-5", threads=1, batch=1, over_minimal=(0.8, 0.79, 0.81), **medians):
    times = {"dense": 4e-4, "minimal": 1e-4, "fewest": 1e-4, "ours": 8e-5, **medians}
    ratios = {"dense": (0.2, 0.19, 0.21), "minimal": over_minimal, "fewest": (0.8, 0.8, 0.8)}
    macs = {"dense": 4000, "minimal": 1000, "fewest": 1000, "ours": 1100}
    return Row(network, batch, threads, macs, times, ratios, (), True, 5.41)


def test_a_row_replaces_the_one_of_an_earlier_run_and_the_others_stay(tmp_path):
    results = Results(peaks={1: 1e9})
    results.put(row(batch=1))
    results.put(row(batch=16))
    results.put(row(batch=1, ours=7e-5))
    results.write(tmp_path / "bench.json")
    again = Results.read(tmp_path / "bench.json")
    assert again == results
    assert [(entry.batch, entry.medians["ours"]) for entry in again.rows] == [(16, 8e-5), (1, 7e-5)]
    assert Results.read(tmp_path / "none.json") == Results.read(None) == Results()


@pytest.mark.parametrize(
    ("ratio", "count"), [((0.9, 0.8, 1.2), 0), ((1.05, 1.01, 1.1), 0), ((1.05, 1.03, 1.1), 1)]
)
def test_a_network_is_called_slower_only_where_the_whole_interval_says_so(ratio, count):
    first, *_ = summary([row(over_minimal=ratio)])
    assert f"{count} of 1 rows" in first
    assert ("LeNet-5" in first) == bool(count)


def test_the_page_has_the_goals_the_table_and_what_other_tools_gave():
    results = Results(
        [row()], {1: 2e8}, {"LeNet-5": {"one": "", "other": "not exact: error 1.0e-01"}}, ["run"]
    )
    results.rows[0].ratios["one"] = (0.5, 0.4, 0.6)
    text = page(results)
    assert "1.25x in the geometric mean" in text
    assert "LeNet-5: 5.00x over dense; the paper has 5.41x" in text
    assert "| LeNet-5 | one | 2.00x (1.67 to 2.50) |  |" in text
    assert "| LeNet-5 | other | not exact: error 1.0e-01 |  |" in text
    assert "5%, 5%, 7%" in text


def test_the_figure_is_the_same_twice(tmp_path):
    rows = [row(threads=threads, batch=batch) for threads in (1, 2) for batch in (1, 16)]
    for name in ("a.svg", "b.svg"):
        draw(rows, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
