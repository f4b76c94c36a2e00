"""The ONNX file: names, dimensions, metadata, external weights."""

import re
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, fx, nn

import sbp_compile
from passes import Program
from sbp_compile.emit import onnx_file
from sbp_compile.emit.module import emit_graph_module
from sbp_compile.errors import OutputError, UnsupportedModelError, UsageError, VerificationError
from tests.networks import Masked, assert_close, run_onnx


class Clashing(nn.Module):
    """Result keys that are also names of inputs, of values inside the graph, or of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Masked()

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.body(x)
        inner = {"b": y + 2}
        return {"relu": y, "linear": torch.sigmoid(y), "x": x * 2, "a.b": y + 1, "a": inner, "same": x}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module, path = Clashing().eval(), tmp_path_factory.mktemp("onnx") / "small.onnx"
    sbp_compile.compile(module, torch.randn(4, 6)).save(path)
    return module, path


def test_no_name_stands_for_two_values(saved: tuple[nn.Module, Path]) -> None:
    module, path = saved
    names = [entry.name for entry in onnx.load(path).graph.output]
    assert names == ["relu", "linear", "x_output", "a.b", "a.b_output", "same"]
    x = torch.randn(3, 6)
    results = dict(zip(names, run_onnx(path, x), strict=True))
    wanted = module(x)
    for key in ("relu", "linear", "a.b", "same"):
        assert_close(wanted[key].detach(), results[key])
    assert_close(wanted["x"].detach(), results["x_output"])
    assert_close(wanted["a"]["b"].detach(), results["a.b_output"])


def test_it_passes_the_checker_and_every_value_has_a_shape(saved: tuple[nn.Module, Path]) -> None:
    model = onnx.load(saved[1])
    onnx.checker.check_model(model, full_check=True)
    shaped = {entry.name for entry in (*model.graph.value_info, *model.graph.output)}
    assert {name for node in model.graph.node for name in node.output} <= shaped


def test_the_batch_axis_is_called_batch(saved: tuple[nn.Module, Path]) -> None:
    graph = onnx.load(saved[1]).graph
    for entry in (*graph.input, *graph.output):
        assert entry.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_metadata_say_what_it_was_made_from(saved: tuple[nn.Module, Path]) -> None:
    model = onnx.load(saved[1])
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["sbp_compile.kept_channels"] == "body.first=4/8, body.second=3/3"
    assert metadata["sbp_compile.macs"] == "36 of 72"
    assert len(metadata["sbp_compile.source_sha256"]) == 64
    assert "sbp_compile.version" in metadata
    assert model.producer_name == "sbp_compile"


def test_it_says_nothing_of_the_machine_it_was_made_on(saved: tuple[nn.Module, Path]) -> None:
    content = saved[1].read_bytes()
    assert str(Path.cwd()).encode() not in content
    assert b".py" not in content


def test_outputs_that_are_no_tensors_are_left_out(tmp_path: Path) -> None:
    class Sparse(Masked):
        def forward(self, x: Tensor) -> tuple[None, Tensor, int]:
            return None, super().forward(x), 7

    module = Sparse()
    compiled = sbp_compile.compile(module, torch.randn(4, 6))
    compiled.save(tmp_path / "small.onnx")
    assert compiled.output_names == (None, "output_1", None)
    x = torch.randn(2, 6)
    assert compiled.module(x)[::2] == (None, 7)
    [result] = run_onnx(tmp_path / "small.onnx", x)
    assert_close(module(x)[1].detach(), result)


class Large(nn.Module):
    """Weights of more than a kilobyte, below which ONNX never takes them out of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> sbp_compile.Compiled:
    torch.manual_seed(0)
    monkeypatch.setattr(onnx_file, "LARGEST_EMBEDDED", 4000)
    return sbp_compile.compile(Large(), torch.randn(4, 32))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_large_weights_go_to_a_second_file_that_is_found(large: sbp_compile.Compiled, tmp_path: Path) -> None:
    large.save(tmp_path / "small.onnx")
    first, second = names(tmp_path)
    assert first == "small.onnx"
    assert re.fullmatch(r"small\.onnx\.[0-9a-f]{16}\.data", second)
    assert (tmp_path / first).stat().st_size < 4000 < (tmp_path / second).stat().st_size
    x = torch.randn(5, 32)
    assert_close(large.module(x).detach(), run_onnx(tmp_path / "small.onnx", x)[0])
    onnx.checker.check_model(str(tmp_path / "small.onnx"))


def test_both_files_are_replaced_and_work_in_another_folder(
    large: sbp_compile.Compiled, tmp_path: Path
) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "small.onnx").write_bytes(b"old")
    (folder / "small.onnx.0123456789abcdef.data").write_bytes(b"old")
    (folder / "other.onnx.0123456789abcdef.data").write_bytes(b"another network's")
    large.save(folder / "small.onnx")
    assert len(names(folder)) == 3
    assert "small.onnx.0123456789abcdef.data" not in names(folder)
    assert "other.onnx.0123456789abcdef.data" in names(folder)
    folder.rename(tmp_path / "two")
    x = torch.randn(5, 32)
    assert_close(large.module(x).detach(), run_onnx(tmp_path / "two" / "small.onnx", x)[0])


def test_neither_file_is_left_where_verification_fails(
    large: sbp_compile.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emit_wrongly(program: Program, *_: object) -> fx.GraphModule:
        module = emit_graph_module(program)
        with torch.no_grad():
            module.get_parameter("first_weight").add_(1.0)
        return module

    monkeypatch.setattr(onnx_file, "emit_graph_module", emit_wrongly)
    old = tmp_path / "small.onnx.0123456789abcdef.data"
    old.write_bytes(b"old")
    with pytest.raises(
        VerificationError, match=r"the values part at linear \(aten.linear.default in first\)"
    ):
        large.save(tmp_path / "small.onnx")
    assert names(tmp_path) == [old.name]
    assert old.read_bytes() == b"old"


def test_neither_file_is_left_where_the_disk_is_full(
    large: sbp_compile.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", refuse)
    with pytest.raises(OutputError, match="no space left on device"):
        large.save(tmp_path / "small.onnx")
    assert not names(tmp_path)


def test_weights_go_to_a_second_file_on_request_and_come_back_into_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compiled = sbp_compile.compile(Large(), torch.randn(4, 32))
    compiled.save(tmp_path / "small.onnx", external_data=True)
    assert len(names(tmp_path)) == 2
    x = torch.randn(5, 32)
    assert_close(compiled.module(x).detach(), run_onnx(tmp_path / "small.onnx", x)[0])
    compiled.save(tmp_path / "small.onnx")
    assert names(tmp_path) == ["small.onnx"]


def test_the_same_network_gives_the_same_two_files_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, found = Large().eval(), []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        sbp_compile.compile(module, torch.ones(4, 32)).save(folder / "small.onnx", external_data=True)
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1]
    assert len(found[0]) == 2


@pytest.mark.parametrize("opset", [11, 14, 18, 21])
def test_the_opset_can_be_chosen(opset: int, tmp_path: Path) -> None:
    compiled = sbp_compile.compile(Large(), torch.randn(4, 32))
    compiled.save(tmp_path / "small.onnx", opset=opset)
    assert [entry.version for entry in onnx.load(tmp_path / "small.onnx").opset_import] == [opset]


class BiasedAttention(nn.Module):
    """Attention as in T5: a bias for each head and pair of positions, repeated for every example."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(1, 2, 5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.taken(x).view(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = self.bias.expand(x.shape[0], -1, -1, -1)
        heads = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: torch.Tensor = self.out(heads.transpose(1, 2).reshape(-1, 5, 8))
        return out


def test_attention_with_a_bias_for_each_example_is_written(tmp_path: Path) -> None:
    """The exporter had taken the reshape for a view, which under the strides of its next run it is not."""
    network = BiasedAttention().eval()
    sbp_compile.compile(network, torch.randn(2, 5, 8)).save(tmp_path / "small.onnx")
    x = torch.randn(3, 5, 8)
    [got] = run_onnx(tmp_path / "small.onnx", x)
    assert_close(got, network(x))


@pytest.mark.parametrize(("average", "opset"), [(nn.AvgPool2d(2), 18), (nn.AdaptiveAvgPool2d(1), 20)])
def test_windows_are_averaged_in_the_opset_with_the_fast_kernel(
    average: nn.Module, opset: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Conv2d(3, 4, 1), average).eval(), torch.randn(2, 3, 8, 8)
    compiled = sbp_compile.compile(module, x)
    for wanted, options in ((opset, {}), (21, {"opset": 21})):
        compiled.save(tmp_path / "small.onnx", **options)
        assert [entry.version for entry in onnx.load(tmp_path / "small.onnx").opset_import] == [wanted]


class SqueezeExcite(nn.Module):
    """A layer whose channels are scaled by what is computed of their averages."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * torch.sigmoid(self.gate(nn.functional.adaptive_avg_pool2d(y, 1)))


def test_weights_in_another_order_of_memory_leave_no_calls_behind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module: nn.Module = SqueezeExcite().eval().to(memory_format=torch.channels_last)
    sbp_compile.compile(module, torch.randn(2, 3, 8, 8)).save(tmp_path / "small.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert kinds == ["Conv", "ReduceMean", "Conv", "Sigmoid", "Mul"]


@pytest.mark.parametrize("opset", [9, 99])
def test_an_opset_that_the_converter_does_not_reach_is_refused(opset: int, tmp_path: Path) -> None:
    compiled = sbp_compile.compile(Large(), torch.randn(4, 32))
    with pytest.raises(
        UsageError, match=f"opset {opset} cannot express this network.*(opset 18 can|11 is the oldest)"
    ):
        compiled.save(tmp_path / "small.onnx", opset=opset)
    assert not names(tmp_path)


class Products(nn.Module):
    """Running products, which torch's exporter does not translate."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumprod(x, 1)


def test_an_operator_that_the_exporter_does_not_know_is_refused_in_one_line(tmp_path: Path) -> None:
    compiled = sbp_compile.compile(Products().eval(), torch.randn(2, 5))
    with pytest.raises(
        UnsupportedModelError, match=r"cannot translate the network: .*prod.*write \.pt2"
    ) as found:
        compiled.save(tmp_path / "small.onnx")
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())
    compiled.save(tmp_path / "small.pt2")


def test_shapes_that_onnx_does_not_agree_with_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx.shape_inference.InferenceError("[ShapeInferenceError] op MaxPool: (2) vs (1)\n\n")

    compiled = sbp_compile.compile(nn.Linear(3, 2), torch.randn(2, 3))
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", refuse)
    with pytest.raises(UnsupportedModelError, match=r"MaxPool: \(2\) vs \(1\); write \.pt2 instead"):
        compiled.save(tmp_path / "small.onnx")
