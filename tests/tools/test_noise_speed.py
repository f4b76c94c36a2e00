import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import noise_speed

    yield noise_speed
    sys.modules.pop("noise_speed", None)


def test_a_layer_on_feature_maps_needs_one_more_activation(tool):
    """Watching sees what is made: one product of the size of the input in the backward pass, and small tables."""
    found = tool.layer_memory((8, 4, 32, 32))
    assert 1.0 <= found.extra < 1.2


def test_both_networks_take_turns_and_the_figures_are_written(tool, tmp_path, capsys):
    path = tmp_path / "speed.json"
    arguments = ["--networks", "lenet500300", "--batch", "4", "--rounds", "3", "--json", str(path)]
    assert tool.main(arguments) in (0, 1)
    found = json.loads(path.read_text())["steps"][0]
    assert found["low"] <= found["ratio"] <= found["high"]
    assert found["dropout_s"] > 0 < found["noise_s"]
    assert "lenet500300, batch 4: dropout" in capsys.readouterr().out


def test_dropout_stands_where_the_noise_stood(tool):
    network = tool.with_dropout(tool.NETWORKS["lenet5"]())
    assert sum(type(part).__name__ == "Dropout" for part in network.modules()) == 4
    assert not any(type(part).__name__ == "LogNormalNoise" for part in network.modules())
