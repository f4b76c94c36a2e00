"""Measured times of layers: what a target makes of them, and how a file keeps them."""

import json

import pytest

from passes.targets import AVX512, Layer
from sbp_compile.errors import ModelFileError
from sbp_compile.tuning import LayerTimes, Measured, default_path, load_times, save_times
from sbp_compile.tuning.layer_times import key_of

IMAGES = Layer(spatial_rank=2, taps=9, positions=14 * 14)
DEPTHWISE = Layer(spatial_rank=2, taps=9, positions=14 * 14, groups=8, is_depthwise=True)
LINEAR = Layer(spatial_rank=0, taps=1, positions=1)


@pytest.fixture
def times():
    return LayerTimes("a processor", "1.0", "cpu", 1, 4)


def test_what_was_measured_counts_for_one_example_without_packing(times):
    times.seconds[key_of(IMAGES, 32, 32)] = 4e-3
    moved = 2 * AVX512.moving(32, 14 * 14)
    assert Measured(times, AVX512).seconds(IMAGES, 32, 32) == pytest.approx(1e-3 - moved)
    assert Measured(times).seconds(IMAGES, 32, 32) == 1e-3


def test_a_time_stays_positive_where_packing_would_take_all_of_it(times):
    times.seconds[key_of(IMAGES, 32, 32)] = 4e-9
    assert Measured(times, AVX512).seconds(IMAGES, 32, 32) > 0


def test_what_was_not_measured_is_the_tables_guess_scaled_by_what_was(times):
    guess = AVX512.seconds(IMAGES, 30, 30)
    assert Measured(times, AVX512).seconds(IMAGES, 30, 30) == guess
    for width in (16, 32, 64):
        times.seconds[key_of(IMAGES, width, width)] = 4 * 3 * AVX512.seconds(IMAGES, width, width)
    assert Measured(times, AVX512).seconds(IMAGES, 30, 30) == pytest.approx(3 * guess)
    assert Measured(times, AVX512).seconds(LINEAR, 30, 30) == AVX512.seconds(LINEAR, 30, 30)


def test_a_depthwise_layer_is_the_same_at_any_number_of_groups(times):
    times.seconds[key_of(DEPTHWISE, 12, 12)] = 4e-3
    assert Measured(times).seconds(DEPTHWISE, 12, 12) == 1e-3


def test_without_a_table_widths_are_multiples_and_nothing_is_packed(times):
    target = Measured(times)
    assert target.widths(13) == (16,)
    assert target.widths(17) == (20, 24, 32)
    assert target.packed(IMAGES, 16, 16) == (False, False)
    assert target.moving(16, 100) == 0


def test_a_file_gives_back_what_was_written_and_keeps_other_machines(times, tmp_path):
    path = tmp_path / "new" / "times.json"
    times.seconds[key_of(IMAGES, 3, 32)] = 1.25e-3
    times.seconds[key_of(DEPTHWISE, 12, 12)] = 2.5e-4
    other = LayerTimes("another", "1.0", "cpu", 1, 4, {key_of(LINEAR, 10, 10): 1e-6})
    save_times(path, times)
    save_times(path, other)
    times.seconds[key_of(LINEAR, 5, 7)] = 3e-6
    save_times(path, times)
    found = {held.machine: held.seconds for held in load_times(path)}
    assert found == {times.machine: times.seconds, other.machine: other.seconds}


def test_no_file_has_no_times(tmp_path):
    assert load_times(tmp_path / "none.json") == []


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "sbp_compile" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".cache" / "sbp_compile" / "tuning.json"


def damaged_files():
    machine = {"processor": "p", "onnxruntime": "1", "provider": "cpu", "threads": 1, "batch": 1}
    columns = ["spatial_rank", "taps", "positions", "groups", "is_depthwise", "is_transposed"]
    columns += ["inputs", "outputs", "seconds"]

    def one(row):
        return {"format": 1, "machines": [{**machine, "columns": columns, "layers": [row]}]}

    yield ""
    yield "[" * 100_000
    yield "\x00\xff"
    yield json.dumps([])
    yield json.dumps({"format": 2, "machines": []})
    yield json.dumps({"format": 1, "machines": [machine]})
    yield json.dumps(one([2, 9, 100, 1, 0, 0, 8, 8, -1.0]))
    yield json.dumps(one([2, 9, 100, 1, 0, 0, 8, 8, float("nan")]))
    yield json.dumps(one([2, 9, 100, 1, 0, 0, "8", 8, 1.0]))
    yield json.dumps(one([2, 9, 100, 1, 0, 0, 8, 1.0]))
    yield json.dumps(one([]))


@pytest.mark.parametrize("content", list(damaged_files()), ids=map(str, range(11)))
def test_a_damaged_file_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ModelFileError, match="is no tuning file") as error:
        load_times(path)
    assert "\n" not in str(error.value)
