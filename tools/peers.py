"""Compact one masked network with one tool: the worker of tools/compare.py, a process of its own.

python tools/peers.py TOOL SPEC FOLDER, with SPEC in JSON, leaves `result.json` and, where the tool's result can be had
as ONNX, `result.onnx` (batch 1) in FOLDER. Whatever a tool raises becomes a line of `result.json`.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_cost
import peer_openvino
import peer_torch_pruning
import torch
from peer_case import Case, Outcome, Spec, build, export, results
from torch import nn

import sbp_compile
from passes import CostModel, FewestMacs, Target, default_pipeline, this_cpu

TORCHVISION_CLASSES = {
    "torchvision.models": ("MobileNetV3", "ShuffleNetV2"),
    "torchvision.models.densenet": ("_DenseLayer",),
}


def masked(case: Case) -> Outcome:
    """The network as it is, for comparison."""
    return Outcome(module=case.network)


def ours(case: Case) -> Outcome:
    """What the command line gives."""
    return _compiled(case, None, this_cpu())


def _compiled(case: Case, cost: CostModel | None, target: Target | None) -> Outcome:
    """Compiled in float64 for the error and in float32 for the file."""
    pipeline = default_pipeline(cost, target)
    module = sbp_compile.compile(case.network, case.example, verify=False, pipeline=pipeline).module
    float32 = tuple(value.float() if value.is_floating_point() else value for value in case.example)
    path = case.folder / "small.onnx"
    sbp_compile.compile(case.network32(), float32, pipeline=pipeline).save(path)
    return Outcome(module=module, model=onnx.load(str(path)))


def ours_minimal(case: Case) -> Outcome:
    """The same with the fewest channels, as `--target none` asks for."""
    return _compiled(case, None, None)


def ours_smallest(case: Case) -> Outcome:
    """With every gather and map that saves a multiply-add as well, as `--target none --fewest-macs` does."""
    return _compiled(case, FewestMacs(), None)


def torch_simplify(case: Case) -> Outcome:
    """`simplify.simplify` with biases propagated; batch norms were fused before, in float64 (it would use float32)."""
    with _stand_in_for_torchvision():
        simplify = importlib.import_module("simplify").simplify
    if len(case.example) != 1:
        raise NotImplementedError("takes networks with one input")
    torch.set_default_dtype(torch.float64)
    zeros = torch.zeros_like(case.example[0][:1])
    module: nn.Module = simplify(case.folded(), zeros, fuse_bn=False)
    torch.set_default_dtype(torch.float32)
    file = copy.deepcopy(module).float()
    layers: list[Any] = list(file.modules())
    for layer in layers:
        if hasattr(
            layer, "zero_cache"
        ):  # plain attributes: `float` passes them by, and a tensor decides a branch
            layer.zero_cache, layer.idxs_cache = layer.zeros, layer.idxs
            layer.use_bf = bool(layer.use_bf)
    results(file, case.inputs32[0])
    return Outcome(module=module, model=export(file, case.inputs32[0]))


@contextmanager
def _stand_in_for_torchvision() -> Iterator[None]:
    """Give it empty classes: it imports three of torchvision's, only to ask whether a model is one of them."""
    modules = {name: types.ModuleType(name) for name in ("torchvision", *TORCHVISION_CLASSES)}
    for name, classes in TORCHVISION_CLASSES.items():
        for entry in classes:
            setattr(modules[name], entry, type(entry, (nn.Module,), {}))
    sys.modules.update(modules)
    yield
    for name in modules:
        del sys.modules[name]


def onnxsim(case: Case) -> Outcome:
    """`onnxsim.simplify`."""
    return Outcome(model=_simplified(case.folded_onnx()))


def onnxsim_share(case: Case) -> Outcome:
    """Structured pruning by L2 norm behind it, with the share of masked channels, layer by layer."""
    prune = importlib.import_module("onnxsim").apply_structured_pruning
    return Outcome(model=prune(_simplified(case.folded_onnx()), sparsity=case.spec.share))


def onnxsim_exact(case: Case) -> Outcome:
    """The same with one ranking of all channels and the largest share found by bisection that is still exact."""
    prune = importlib.import_module("onnxsim").apply_structured_pruning
    simplified = _simplified(case.folded_onnx())
    best, low, high = simplified, 0.0, 1.0
    for _ in range(8):
        share = (low + high) / 2
        pruned = prune(simplified, sparsity=share, global_sparsity=True)
        if case.error_of_file(pruned) <= case.bound32:
            best, low = pruned, share
        else:
            high = share
    return Outcome(model=best, note=f"share {low:.2f}")


def _simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    simplified: onnx.ModelProto = importlib.import_module("onnxsim").simplify(model)[0]
    return simplified


def onnxslim(case: Case) -> Outcome:
    """`onnxslim.slim`."""
    return Outcome(model=importlib.import_module("onnxslim").slim(case.folded_onnx()))


@dataclass(frozen=True)
class Tool:
    """One row of a comparison: the package it needs (None: ours) and what it does."""

    package: str | None
    run: Callable[[Case], Outcome]


TOOLS: dict[str, Tool] = {
    "masked": Tool(None, masked),
    "sbp_compile": Tool(None, ours),
    "sbp_compile --target none": Tool(None, ours_minimal),
    "sbp_compile --target none --fewest-macs": Tool(None, ours_smallest),
    "torch-pruning, usual": Tool("torch-pruning", peer_torch_pruning.usual),
    "torch-pruning, careful": Tool("torch-pruning", peer_torch_pruning.careful),
    "OpenVINO pruning": Tool("openvino", peer_openvino.pruning),
    "onnxsim": Tool("onnxsim", onnxsim),
    "onnxsim pruning, share": Tool("onnxsim", onnxsim_share),
    "onnxsim pruning, exact": Tool("onnxsim", onnxsim_exact),
    "onnxslim": Tool("onnxslim", onnxslim),
    "torch-simplify": Tool("torch-simplify", torch_simplify),
}


def main() -> None:
    """Run one tool; write `result.json`."""
    name, spec, folder = sys.argv[1], Spec(**json.loads(sys.argv[2])), Path(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        found = measured(build(spec, folder), TOOLS[name])
    except Exception as error:  # whatever a tool raises is a row
        found = {"failure": reason(error)}
    (folder / "result.json").write_text(json.dumps(found))


def measured(case: Case, tool: Tool) -> dict[str, Any]:
    """Run a tool and return its row: errors with their bounds, multiply-adds, parameters."""
    outcome = tool.run(case)
    found: dict[str, Any] = {"note": "; ".join(filter(None, (case.note, outcome.note)))}
    if outcome.module is not None:
        found |= {"error": case.error_of_module(outcome.module), "bound": 1e-12, "measured": "float64"}
    if outcome.row is not None:
        found |= outcome.row
    try:
        model = outcome.model
        if model is None and outcome.module is not None:
            model = export(outcome.module, case.inputs32[0])
        if model is not None:
            row = case.row_of_file(model)
            found = row | found | {"file_error": row["error"], "file_bound": row["bound"]}
            onnx.save_model(onnx_cost.pin_batch(model, case.inputs32[0]), str(case.folder / "result.onnx"))
    except Exception as error:
        if "error" not in found:
            raise
        found["failure"] = f"no ONNX: {reason(error)}"
    return found


def reason(error: Exception) -> str:
    """Return an exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) < 160 else text[:157] + "..."


if __name__ == "__main__":
    main()
