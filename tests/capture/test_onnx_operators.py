"""Each translation of an ONNX operator against onnxruntime on the same one-node graph."""
# ruff: noqa: E501  (graphs and tables are read better in one line)

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sbp_compile.capture.from_onnx import load_onnx, onnx_network
from sbp_compile.errors import UnsupportedModelError

IMAGE = "float[2, 4, 6, 8] x"
ROWS = "float[2, 3, 5] x"
VECTOR = "float[4, 6] x"


def one_node(opset: int, inputs: str, body: str, weights: str = "", kind: str = "float") -> onnx.ModelProto:
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
    g ({inputs}) => ({kind}[] y) {f"<{weights}>" if weights else ""} {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("y"))
    model.graph.output[0].type.CopyFrom(onnx.helper.make_tensor_type_proto(KINDS[kind], None))
    return model


KINDS = {"float": 1, "int64": 7, "bool": 9}


def feeds_of(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    known = {entry.name for entry in model.graph.initializer}
    feeds = {}
    for entry in model.graph.input:
        if entry.name not in known:
            shape = [size.dim_value for size in entry.type.tensor_type.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
            values = (
                generator.standard_normal(shape) if dtype.kind == "f" else generator.integers(0, 2, shape)
            )
            feeds[entry.name] = values.astype(dtype)
    return feeds


def both(tmp_path: Path, model: onnx.ModelProto) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    feeds = feeds_of(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    network = onnx_network(load_onnx(path))
    with torch.no_grad():
        results = network(*(torch.from_numpy(feeds[name]) for name in network.input_names))
    return session.run(None, feeds), [results] if isinstance(results, torch.Tensor) else list(results)


KERNEL = "float[3, 4, 3, 3] w = {" + ",".join(str((7 * i % 11) / 10 - 0.5) for i in range(108)) + "}"
UPWARDS = "float[4, 2, 3, 3] w = {" + ",".join(str((5 * i % 13) / 10 - 0.6) for i in range(72)) + "}"
BIAS = "float[2] b = {0.5, -0.25}"

CALLS = {
    "convolution with uneven padding": (13, IMAGE, "y = Conv <pads=[1,0,2,1], strides=[2,1]> (x, w)", KERNEL),
    "convolution padded to the same size": (13, IMAGE, 'y = Conv <auto_pad="SAME_UPPER", strides=[2,3]> (x, w)', KERNEL),
    "convolution padded in front": (13, IMAGE, 'y = Conv <auto_pad="SAME_LOWER", strides=[2,2]> (x, w)', KERNEL),
    "transposed convolution": (
        13, IMAGE, "y = ConvTranspose <strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]> (x, w, b)", f"{UPWARDS}, {BIAS}",
    ),
    "transposed convolution cut unevenly": (
        13, IMAGE, "y = ConvTranspose <strides=[2,2], pads=[0,1,2,0], output_padding=[1,0]> (x, w, b)", f"{UPWARDS}, {BIAS}",
    ),
    "transposed convolution of a given size": (
        13, IMAGE, "y = ConvTranspose <strides=[2,2], output_shape=[12,17]> (x, w, b)", f"{UPWARDS}, {BIAS}",
    ),
    "transposed convolution to the same size": (
        13, IMAGE, 'y = ConvTranspose <strides=[2,2], auto_pad="SAME_UPPER"> (x, w, b)', f"{UPWARDS}, {BIAS}",
    ),
    "maximum with uneven padding": (13, IMAGE, "y = MaxPool <kernel_shape=[3,2], pads=[2,0,1,1]> (x)"),
    "maximum rounded up": (13, IMAGE, "y = MaxPool <kernel_shape=[3,3], strides=[2,2], ceil_mode=1> (x)"),
    "maximum dilated": (13, IMAGE, "y = MaxPool <kernel_shape=[2,2], dilations=[2,3]> (x)"),
    "average without its padding": (13, IMAGE, "y = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (x)"),
    "average with its padding": (
        13, IMAGE, "y = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1> (x)",
    ),
    "average of uneven padding": (13, IMAGE, "y = AveragePool <kernel_shape=[3,3], pads=[0,1,2,1]> (x)"),
    "average of uneven padding, counted": (
        13, IMAGE, "y = AveragePool <kernel_shape=[3,3], pads=[0,1,2,1], count_include_pad=1> (x)",
    ),
    "average padded to the same size": (
        13, IMAGE, 'y = AveragePool <kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER"> (x)',
    ),
    "norm of windows": (13, IMAGE, "y = LpPool <kernel_shape=[2,2], p=2> (x)"),
    "mean over positions": (13, IMAGE, "y = GlobalAveragePool(x)"),
    "maximum over positions": (13, IMAGE, "y = GlobalMaxPool(x)"),
    "norm over positions": (13, IMAGE, "y = GlobalLpPool(x)"),
    "product with transposed operands": (
        13, "float[3, 2] x", "y = Gemm <alpha=0.5, beta=2.0, transA=1> (x, w, b)", "float[3,2] w = {1,2,3,4,5,6}, float[2] b = {1,2}",
    ),
    "product with a matrix added": (
        13, "float[2, 3] x, float[2, 2] c", "y = Gemm <transB=1> (x, w, c)", "float[2,3] w = {1,2,3,4,5,6}",
    ),
    "softmax over several axes": (11, ROWS, "y = Softmax <axis=1> (x)"),
    "logarithm of softmax over several axes": (12, ROWS, "y = LogSoftmax <axis=1> (x)"),
    "softmax over one axis": (13, ROWS, "y = Softmax <axis=1> (x)"),
    "layer norm over two axes": (17, ROWS, "y = LayerNormalization <axis=1> (x, s, b)", "float[3,5] s = {1,2,3,4,5,1,2,3,4,5,1,2,3,4,5}, float[3,5] b = {1,2,3,4,5,1,2,3,4,5,1,2,3,4,5}"),
    "layer norm with one scale": (17, ROWS, "y = LayerNormalization (x, s)", "float[1] s = {2}"),
    "group norm": (
        21, IMAGE, "y = GroupNormalization <num_groups=2> (x, s, b)", "float[4] s = {2, 3, 4, 5}, float[4] b = {1, -1, 0, 2}",
    ),
    "instance norm": (13, IMAGE, "y = InstanceNormalization(x, s, b)", "float[4] s = {1,2,3,4}, float[4] b = {4,3,2,1}"),
    "response norm": (13, IMAGE, "y = LRN <size=3, alpha=0.1, beta=0.6, bias=1.5> (x)"),
    "unit norm": (13, ROWS, "y = LpNormalization <axis=1, p=1> (x)"),
    "the largest as one": (13, ROWS, "y = Hardmax <axis=1> (x)"),
    "mean with axes as an attribute": (13, IMAGE, "y = ReduceMean <axes=[1,-1], keepdims=0> (x)"),
    "mean with axes as an operand": (18, IMAGE, "y = ReduceMean <keepdims=0> (x, a)", "int64[2] a = {1, -1}"),
    "mean of everything": (18, IMAGE, "y = ReduceMean(x)"),
    "a reduction that is none": (18, ROWS, "y = ReduceSum <noop_with_empty_axes=1> (x)"),
    "sum of magnitudes": (18, ROWS, "y = ReduceL1(x, a)", "int64[1] a = {1}"),
    "root of squares": (18, ROWS, "y = ReduceL2(x, a)", "int64[1] a = {1}"),
    "sum of squares": (18, ROWS, "y = ReduceSumSquare(x, a)", "int64[1] a = {1}"),
    "logarithm of exponentials": (18, ROWS, "y = ReduceLogSumExp(x, a)", "int64[1] a = {1}"),
    "product of entries": (18, ROWS, "y = ReduceProd(x, a)", "int64[2] a = {0, 2}"),
    "smallest": (18, ROWS, "y = ReduceMin(x, a)", "int64[1] a = {1}"),
    "place of the last largest": (13, "int64[3, 4] x", "y = ArgMax <axis=1, select_last_index=1> (x)", "", "int64"),
    "running sum": (14, ROWS, "y = CumSum <exclusive=1, reverse=1> (x, a)", "int64 a = {1}"),
    "slice with steps": (13, IMAGE, "y = Slice(x, s, e, a, t)", "int64[2] s = {1, -1}, int64[2] e = {10, -7}, int64[2] a = {2, 3}, int64[2] t = {2, -2}"),
    "slice turned round": (13, IMAGE, "y = Slice(x, s, e, a, t)", "int64[1] s = {-1}, int64[1] e = {-9223372036854775808}, int64[1] a = {1}, int64[1] t = {-1}"),
    "gather with negative indices": (13, ROWS, "y = Gather <axis=2> (x, i)", "int64[2,2] i = {0, -1, 3, -5}"),
    "gather of one": (13, ROWS, "y = Gather <axis=1> (x, i)", "int64 i = {-1}"),
    "gather by data": (13, "float[4, 3] x, int64[2, 2] i", "y = Gather <axis=0> (x, i)"),
    "gather along an axis by data": (13, "float[4, 3] x, int64[4, 3] i", "y = GatherElements <axis=1> (x, i)"),
    "gather of points": (13, ROWS, "y = GatherND(x, i)", "int64[3,2] i = {0,1,1,2,0,0}"),
    "scatter along an axis": (16, "float[3, 4] x, float[1, 4] u", "y = ScatterElements <axis=0> (x, i, u)", "int64[1,4] i = {0,-1,1,2}"),
    "scatter of points": (16, "float[3, 4] x, float[2, 4] u", "y = ScatterND(x, i, u)", "int64[2,1] i = {0,2}"),
    "sizes of a split as an attribute": (11, ROWS, "a, y = Split <axis=2, split=[2,3]> (x)"),
    "sizes of a split as an operand": (13, ROWS, "a, y = Split <axis=2> (x, s)", "int64[2] s = {2, 3}"),
    "a split into uneven parts": (18, ROWS, "a, y = Split <axis=2, num_outputs=2> (x)"),
    "shuffled into positions": (13, IMAGE, "y = DepthToSpace <blocksize=2> (x)"),
    "shuffled into positions in torch's order": (13, IMAGE, 'y = DepthToSpace <blocksize=2, mode="CRD"> (x)'),
    "positions shuffled into channels": (13, IMAGE, "y = SpaceToDepth <blocksize=2> (x)"),
    "expanded both ways": (13, "float[3, 1] x", "y = Expand(x, s)", "int64[3] s = {2, 1, 4}"),
    "tiled": (13, VECTOR, "y = Tile(x, s)", "int64[2] s = {2, 3}"),
    "padded along chosen axes": (18, IMAGE, "y = Pad(x, p, v, a)", "int64[4] p = {1, 0, 2, 1}, float v = {3}, int64[2] a = {1, 3}"),
    "padded by a negative amount": (13, IMAGE, "y = Pad(x, p)", "int64[8] p = {0,0,-1,1,0,0,2,-2}"),
    "reflected": (13, IMAGE, 'y = Pad <mode="reflect"> (x, p)', "int64[8] p = {0,0,1,0,0,0,2,3}"),
    "edges repeated": (13, IMAGE, 'y = Pad <mode="edge"> (x, p)', "int64[8] p = {0,0,0,2,0,0,0,1}"),
    "flattened at the front": (13, IMAGE, "y = Flatten <axis=0> (x)"),
    "flattened in the middle": (13, IMAGE, "y = Flatten <axis=-2> (x)"),
    "reshaped with kept sizes": (13, IMAGE, "y = Reshape(x, s)", "int64[3] s = {0, -1, 8}"),
    "squeezed by an attribute": (11, "float[2, 1, 3] x", "y = Squeeze <axes=[-2]> (x)"),
    "squeezed everywhere": (13, "float[1, 2, 1] x", "y = Squeeze(x)"),
    "axes added": (13, VECTOR, "y = Unsqueeze(x, a)", "int64[2] a = {0, -1}"),
    "one of many": (13, "int64[3] x", "y = OneHot <axis=0> (x, d, v)", "int64 d = {4}, float[2] v = {-1, 2}"),
    "lower triangle": (14, VECTOR, "y = Trilu <upper=0> (x, k)", "int64 k = {1}"),
    "clipped by attributes of old": (11, VECTOR, "y = Clip(x, l, h)", "float l = {-0.5}, float h = {0.25}"),
    "clipped from above": (13, VECTOR, "y = Clip(x, , h)", "float h = {0.25}"),
    "whole numbers divided": (13, "int64[4] x", "n = Neg(x) y = Div(n, d)", "int64[4] d = {2, 3, 2, 5}", "int64"),
    "whole numbers to a power": (13, "int64[4] x", "y = Pow(x, e)", "float e = {2}", "int64"),
    "remainder": (13, "int64[4] x", "n = Sub(x, m) y = Mod(n, d)", "int64 m = {5}, int64[4] d = {2, 3, -2, 4}", "int64"),
    "remainder as in C": (13, VECTOR, "y = Mod <fmod=1> (x, d)", "float d = {0.3}"),
    "slopes of each channel": (16, IMAGE, "y = PRelu(x, s)", "float[4,1,1] s = {0.1, 0.2, -0.5, 0}"),
    "slopes of each position": (16, VECTOR, "y = PRelu(x, s)", "float[6] s = {0.1, 0.2, -0.5, 0, 1, 2}"),
    "hard sigmoid": (13, VECTOR, "y = HardSigmoid <alpha=0.3, beta=0.4> (x)"),
    "scaled exponential": (13, VECTOR, "y = Selu(x)"),
    "shrunk": (13, VECTOR, "y = Shrink <lambd=0.4, bias=0.2> (x)"),
    "thresholded": (13, VECTOR, "y = ThresholdedRelu <alpha=0.3> (x)"),
    "largest of three": (13, "float[2, 3] x, float[3] z", "y = Max(x, z, l)", "float l = {0.1}"),
    "smallest with a number": (13, VECTOR, "y = Min(x, l)", "float l = {0.1}"),
    "mean of two": (13, "float[2, 3] x, float[3] z", "y = Mean(x, z)"),
    "number minus tensor": (13, VECTOR, "y = Sub(l, x)", "float l = {0.1}"),
    "number over tensor": (13, VECTOR, "y = Div(l, x)", "float l = {0.1}"),
    "number below tensor": (13, VECTOR, "y = Less(l, x)", "float l = {0.1}", "bool"),
    "chosen": (13, "float[2, 3] x, bool[3] c", "y = Where(c, x, l)", "float l = {0.1}"),
    "contracted": (13, "float[2, 3] x, float[3, 4] z", 'y = Einsum <equation="ij,jk->ki"> (x, z)'),
    "defined by the standard's other operators": (13, IMAGE, "y = MeanVarianceNormalization <axes=[2,3]> (x)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_computes_what_onnxruntime_computes(name: str, tmp_path: Path) -> None:
    wanted, got = both(tmp_path, one_node(*CALLS[name]))
    assert len(wanted) == len(got)
    for a, b in zip(wanted, got, strict=True):
        assert a.shape == tuple(b.shape)
        assert str(b.dtype).removeprefix("torch.") == a.dtype.name
        np.testing.assert_allclose(b.numpy(), a, rtol=2e-5, atol=2e-6)


MODES = [
    ("nearest", where, rounding)
    for where in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    for rounding in ("round_prefer_floor", "floor", "ceil", "round_prefer_ceil")
]
MODES += [
    (mode, where, "floor")
    for mode in ("linear", "cubic")
    for where in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
]


@pytest.mark.parametrize("scales", ["1, 1, 2, 3", "1, 1, 0.5, 1.5"])
@pytest.mark.parametrize(("mode", "where", "rounding"), MODES)
def test_sizes_change_as_in_onnxruntime(
    mode: str, where: str, rounding: str, scales: str, tmp_path: Path
) -> None:
    body = f'y = Resize <mode="{mode}", coordinate_transformation_mode="{where}", nearest_mode="{rounding}"> (x, , s)'
    [wanted], [got] = both(tmp_path, one_node(13, IMAGE, body, f"float[4] s = {{{scales}}}"))
    np.testing.assert_allclose(got.numpy(), wanted, rtol=2e-5, atol=5e-6)


def test_a_size_that_is_given_stretches(tmp_path: Path) -> None:
    body = 'y = Resize <mode="linear", coordinate_transformation_mode="half_pixel"> (x, , , s)'
    [wanted], [got] = both(tmp_path, one_node(13, IMAGE, body, "int64[4] s = {2, 4, 9, 5}"))
    np.testing.assert_allclose(got.numpy(), wanted, rtol=2e-5, atol=5e-6)


def recurrent(kind: str, direction: str, tmp_path: Path, rest: str = "") -> None:
    gates, directions = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 2 if direction == "bidirectional" else 1
    generator = np.random.default_rng(3)
    attributes = {
        "hidden_size": 3,
        "direction": direction,
        **({"linear_before_reset": 1} if kind == "GRU" else {}),
    }
    outputs = ["y", "h", "c"][: 3 if kind == "LSTM" else 2]
    node = onnx.helper.make_node(kind, ["x", "w", "r", "b"], outputs, **attributes)
    shapes = {"w": (directions, 3 * gates, 4), "r": (directions, 3 * gates, 3), "b": (directions, 6 * gates)}
    weights = [
        onnx.numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, (5, 2, 4))],
        [onnx.helper.make_tensor_value_info(name, 1, None) for name in outputs],
        weights,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    wanted, got = both(tmp_path, model)
    for a, b in zip(wanted, got, strict=True):
        np.testing.assert_allclose(b.numpy(), a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_layer_computes_what_onnxruntime_computes(
    kind: str, direction: str, tmp_path: Path
) -> None:
    recurrent(kind, direction, tmp_path)


REFUSED = {
    "quantised": (13, IMAGE, "q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)", "float s = {0.1}"),
    "random numbers": (13, IMAGE, "r = RandomNormalLike(x) y = Add(x, r)"),
    "depends on the values": (13, VECTOR, "y = NonZero(x)", "", "int64"),
    "runtime-specific": (13, VECTOR, "y = com.microsoft.FastGelu(x)"),
    "new sizes": (13, "float[4] x, int64[2] s", "y = Reshape(x, s)"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_translation_is_refused_by_name(reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = one_node(*REFUSED[reason])
    if "com.microsoft" in str(model):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(path))
    feeds = feeds_of(model)
    network = onnx_network(load_onnx(path))
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        network(*(torch.from_numpy(feeds[name]) for name in network.input_names))
    assert "opset" in str(refusal.value)
    assert "\n" not in str(refusal.value)
