import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sbp_compile.nn import LogNormalNoise
from tests.zoo import ZOO, masked_network

TOOLS = Path(__file__).resolve().parents[2] / "tools"
MODULES = ("bound", "layer_shapes", "zoo_excess", "zoo_rows", "zoo_page", "zoo")


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import zoo
    import zoo_excess
    import zoo_page
    import zoo_rows

    yield {"zoo": zoo, "excess": zoo_excess, "page": zoo_page, "rows": zoo_rows}
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_small_network_is_exact_and_at_its_bound_at_every_share(tools):
    rows = tools["rows"]
    measured = list(rows.measure(rows.Task("lenet5", "before norm", (0.3, 0.9), 0, (0.9,))))
    assert [(row.share, row.failure, row.gap) for row in measured] == [(0.3, "", 0.0), (0.9, "", 0.0)]
    assert measured[1].layer_macs[1] < measured[0].layer_macs[1] < measured[0].layer_macs[0]
    assert measured[0].file_error is None
    assert measured[1].file_error <= measured[1].file_tolerance
    assert [rows.Row.from_dict(json.loads(json.dumps(row.to_dict()))) for row in measured] == measured


def test_a_network_that_fails_is_a_row(tools, monkeypatch):
    def fail(*_):
        raise ValueError("no such thing\nand more")

    monkeypatch.setattr("tests.zoo.masked_network", fail)
    rows = tools["rows"]
    [row] = rows.measure(rows.Task("lenet5", "random", (0.5,), 0, ()))
    assert row.failure == "ValueError: no such thing"


def test_a_process_that_takes_too_long_is_a_row_and_the_next_task_runs(tools):
    zoo, rows = tools["zoo"], tools["rows"]
    tasks = [rows.Task("lenet5", place, (0.5,), 0, ()) for place in ("before norm", "random")]
    found = list(zoo.run(tasks, jobs=1, limit=0.0))
    assert [(task, [row.failure for row in own]) for task, own in found] == [
        (task, ["not done after 0 s"]) for task in tasks
    ]


def test_frozen_noise_computes_what_the_layers_do(tools):
    architecture = ZOO["lenet5"]
    network = masked_network(architecture, "random", 0.5)
    wanted = network(*architecture.example())
    count = sum(isinstance(module, LogNormalNoise) for module in network.modules())
    assert tools["rows"].freeze_noise(network) == count > 0
    assert not any(isinstance(module, LogNormalNoise) for module in network.modules())
    assert torch.equal(network(*architecture.example()), wanted)


def test_a_network_that_is_a_noise_layer_twice_is_frozen_at_both_places(tools):
    layer = LogNormalNoise(3)
    network = nn.Sequential(layer, nn.Linear(3, 3), layer).eval()
    tools["rows"].freeze_noise(network)
    assert network[0] is network[2]


def test_reasons_are_added_up_over_operators(tools):
    told = [
        ("aligned by add_3", 2),
        ("stands for the constants that conv2d_1 reads", 1),
        ("aligned by add", 4),
    ]
    assert tools["excess"].added_up(told) == (
        ("aligned by add", 6),
        ("stands for the constants that conv2d reads", 1),
    )


def row(tools, **changes):
    rows, excess = tools["rows"], tools["excess"]
    layer = excess.Excess(
        "a.conv", "conv2d", 150, 100.0, "3 of 3, bound 3", "6 of 8, bound 4", (("aligned by add", 2),)
    )
    values = {
        "network": "lenet5",
        "family": "LeNet",
        "placement": "random",
        "share": 0.5,
        "float64_error": 1e-15,
        "macs": (200, 150),
        "parameters": (20, 10),
        "layer_macs": (200, 150),
        "bound": 100.0,
        "seconds": {"capture": 1.0, "passes": 2.0},
        "excess": (layer,),
    }
    return rows.Row(**values | changes)


def test_the_page_explains_gaps_above_five_percent_and_lists_failures(tools):
    rows = [
        row(tools),
        row(tools, network="vgg11", layer_macs=(200, 104), excess=(), unsized=3),
        row(tools, network="bert", failure="ValueError: no"),
    ]
    page = tools["page"].page(rows, 0)
    assert (
        "| lenet5 | LeNet | 1 of 1 | 1.0e-15 | - | 1.33x | 2.00x | 50.0% | 50.0% (random, 50%) | 50.0% | 3.0 |"
        in page
    )
    assert "- **lenet5** (50%, with all gathers 50%): aligned by add 100%" in page
    assert "**vgg11**" not in page
    assert "in no count: vgg11 (3)." in page
    assert "| bert | LeNet | 0 of 1 |" in page
    assert "- bert, random, 50%: ValueError: no" in page


def test_a_network_without_a_bound_has_no_gap_only_where_nothing_is_left(tools):
    assert row(tools, layer_macs=(10, 0), bound=0.0).gap == 0.0
    assert row(tools, layer_macs=(10, 1), bound=0.0).gap == float("inf")
