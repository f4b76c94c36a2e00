"""Small ONNX models for tests, made of their text, with weights whose channels are partly off."""

from __future__ import annotations

import numpy as np
import onnx

TEXT = """
<ir_version: 8, opset_import: ["" : {opset}], producer_name: "factory", producer_version: "3", doc_string: "a model",
 model_version: 7, metadata_props: ["license": "mine", "classes": "5"]>
network (float[{batch}, 3, 8, 8] x) => (float[{batch}, 5] scores)
<float[6, 3, 3, 3] first, float[6] shift, float[6] mask, float[4, 6, 3, 3] second, float[4, 5] last>
{{
  c = Conv <pads = [1, 1, 1, 1]> (x, first, shift)
  shape1 = Constant <value = int64[3] {{6, 1, 1}}> ()
  column = Reshape(mask, shape1)
  m = Mul(c, column)
  r = Relu(m)
  d = Conv <strides = [2, 2]> (r, second)
  p = GlobalAveragePool(d)
  sizes = Shape(p)
  zero = Constant <value = int64[1] {{0}}> ()
  n = Gather <axis = 0> (sizes, zero)
  rest = Constant <value = int64[1] {{-1}}> ()
  wanted = Concat <axis = 0> (n, rest)
  f = Reshape(p, wanted)
  scores = MatMul(f, last)
}}
"""
SHAPES = {"first": (6, 3, 3, 3), "shift": (6,), "second": (4, 6, 3, 3), "last": (4, 5)}


def masked_model(opset: int = 13, batch: str = "N") -> onnx.ModelProto:
    """Return a network in which 3 of 6 channels are off, with the shape arithmetic of older exporters."""
    model = onnx.parser.parse_model(TEXT.format(opset=opset, batch=batch))
    generator = np.random.default_rng(0)
    weights = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    weights["mask"] = np.array([1, 0, 1.5, 0, 0, 0.5], np.float32)
    del model.graph.value_info[:]
    del model.graph.initializer[:]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(weights[name], name) for name in weights)
    model.graph.name = "network"
    return model


def parsed(text: str, opset: int = 13) -> onnx.ModelProto:
    """Return a model of a graph's text."""
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>{text}')
