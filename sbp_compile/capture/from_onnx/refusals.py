"""Why an operator without a translation has none, and what the user can do about it."""

from __future__ import annotations

from sbp_compile.capture.from_onnx.node import Node

_QUANTISED = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
        "MatMulInteger",
    }
)  # fmt: skip
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_BY_DATA = frozenset(
    {"NonZero", "Unique", "Compress", "NonMaxSuppression", "StringNormalizer", "TfIdfVectorizer"}
)


def reason_for(node: Node) -> str:
    """Return the reason in words, with what to do."""
    if node.domain:
        return (
            f"operators of the domain {node.domain!r} belong to one runtime and are not read; export the network "
            "without runtime-specific optimisation (the file it was optimised from will do)"
        )
    if node.op in _QUANTISED:
        return "quantised networks cannot be compiled; give the floating-point network, and quantise what comes out"
    if node.op in _RANDOM:
        return "it draws random numbers, so there is no one function to compile; make them an input of the network"
    if node.op in _BY_DATA:
        return (
            "the shape of its result depends on the values of a tensor; cut the file in front of it "
            "(onnx.utils.extract_model) and run it behind the small network"
        )
    return (
        "there is no translation of it; give the PyTorch module or TorchScript the file was exported from, or export "
        "it with another opset, in which other operators stand for it"
    )
