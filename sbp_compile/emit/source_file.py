"""The small network as a Python file that a person could have written, and the weights that belong to it.

The file imports torch alone. Layers are modules of torch.nn; weights that no layer holds are parameters, or buffers
where they are nothing that one trains: integers, single numbers, tensors of one value, tensors with infinities.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbp_compile.capture.call import Call
from sbp_compile.emit.source_body import body_lines
from sbp_compile.emit.source_call import Interface
from sbp_compile.emit.source_layers import Layer, layer_of
from sbp_compile.emit.source_text import identifier, literal
from sbp_compile.errors import UnsupportedModelError

CLASS = "Network"
_CHECKSUM = re.compile(r"# Written by sbp_compile \(([0-9a-f]{16})\)")


@dataclass(frozen=True)
class Source:
    """The text of the file, and the tensors of its state dict."""

    text: str
    tensors: Mapping[str, Tensor]


def network_source(
    network: fx.GraphModule,
    call: Call,
    modules: Mapping[str, str],
    ranks: Mapping[str, int],
    stem: str,
) -> Source:
    """Return the file of an emitted network.

    `modules`: the original module that each value was computed in, by value; `ranks`: of each value; `stem`: the
    file's name without suffix. Raises `UnsupportedModelError` for what has no Python text.
    """
    try:
        interface = Interface.of(call, network.graph)
        attributes = _Attributes(network, modules, ranks)
        body = body_lines(network.graph, attributes.names, attributes.layers, modules, interface)
        text = _file(attributes, interface, body, stem)
    except TypeError as error:
        raise UnsupportedModelError(
            f"the network cannot be written as Python source: {error} has no text; write .pt2 or .onnx instead"
        ) from error
    return Source(with_checksum(text), attributes.tensors)


def load_source(path: Path, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return the network of a file that was just written, with its weights."""
    namespace: dict[str, Any] = {"__name__": path.stem}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    network: nn.Module = namespace[CLASS]()
    network.load_state_dict(dict(weights))
    return network.eval()


def with_checksum(text: str) -> str:
    """Return a file's text below a line that says who wrote it and what the text was."""
    head = f"# Written by sbp_compile ({_checksum(text)}), which will not overwrite it once it was changed.\n"
    return head + text


def is_unchanged(content: str) -> bool:
    """Whether a file is as `with_checksum` made it."""
    head, _, text = content.partition("\n")
    found = _CHECKSUM.match(head)
    return found is not None and found[1] == _checksum(text)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Attributes:
    """The attributes of the class: which layers, parameters and buffers there are, and their names.

    `names`: of each constant outside a layer, by node; `layers`: the attribute and the layer of each call that is one;
    `tensors`: the state dict; `lines`: of `__init__`.
    """

    def __init__(self, network: fx.GraphModule, modules: Mapping[str, str], ranks: Mapping[str, int]) -> None:
        self._values = {
            node: _attribute(network, str(node.target))
            for node in network.graph.nodes
            if node.op == "get_attr"
        }
        self._taken = {*dir(nn.Module()), "forward"}
        self.names: dict[fx.Node, str] = {}
        self.layers: dict[fx.Node, tuple[str, Layer]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.lines: list[str] = []
        found = {node: layer_of(node, self._values, ranks.get(node.name)) for node in network.graph.nodes}
        self._add_layers({node: layer for node, layer in found.items() if layer is not None}, modules)
        for node in network.graph.nodes:
            if node.op == "get_attr" and any(user not in self.layers for user in node.users):
                self._add_tensor(node)
        dtype = _common_dtype(self.tensors.values())
        if dtype not in {None, torch.float32}:
            self.lines.append(f"self.to({literal(dtype)})")

    def _add_layers(self, layers: Mapping[fx.Node, Layer], modules: Mapping[str, str]) -> None:
        """Name the layers; calls of the same layer share one, and a constant of two different layers stays outside."""
        keys = {node: (layer.constructor, layer.tensors) for node, layer in layers.items()}
        holders = Counter(
            constant for key in set(keys.values()) for constant in {tensor for _, tensor in key[1]}
        )
        for node, layer in layers.items():
            readers = [user for _, constant in layer.tensors for user in constant.users]
            if any(holders[tensor] > 1 for _, tensor in layer.tensors) or any(
                keys.get(reader) != keys[node] for reader in readers
            ):
                continue
            twin = next((other for other in self.layers if keys[other] == keys[node]), None)
            if twin is not None:
                self.layers[node] = (self.layers[twin][0], layer)
                continue
            name = self._name(modules.get(node.name) or _common_name(layer) or node.name)
            self.layers[node] = (name, layer)
            self.lines.append(f"self.{name} = {layer.constructor}")
            for key, constant in layer.tensors:
                self.tensors[f"{name}.{key}"] = self._values[constant]

    def _add_tensor(self, node: fx.Node) -> None:
        value = self._values[node]
        self.names[node] = name = self._name(str(node.target), "constant")
        self.tensors[name] = value
        shape = ", ".join(map(str, value.shape)) or "()"
        if _is_trained(value):
            self.lines.append(f"self.{name} = nn.Parameter(torch.zeros({shape}))")
        else:
            kind = "" if value.dtype == torch.float32 else f", dtype={literal(value.dtype)}"
            self.lines.append(f'self.register_buffer("{name}", torch.zeros({shape}{kind}))')

    def _name(self, wanted: str, prefix: str = "layer") -> str:
        name = identifier(wanted, self._taken, prefix)
        self._taken.add(name)
        return name


def _attribute(network: fx.GraphModule, name: str) -> Tensor:
    value: Tensor = getattr(network, name)
    return value.detach()


def _common_name(layer: Layer) -> str:
    return str(layer.tensors[0][1].target).removesuffix(f"_{layer.tensors[0][0]}")


def _is_trained(value: Tensor) -> bool:
    return (
        value.is_floating_point()
        and value.numel() > 1
        and bool(torch.isfinite(value).all())
        and not bool((value == value.flatten()[0]).all())
    )


def _common_dtype(tensors: Any) -> torch.dtype | None:
    found = {value.dtype for value in tensors if value.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _file(attributes: _Attributes, interface: Interface, body: Sequence[str], stem: str) -> str:
    lines = [f"        {line}" for line in attributes.lines]
    code = "\n".join(
        [
            f"class {CLASS}(nn.Module):",
            '    """The network; `forward` takes and gives what the original does."""',
            "",
            "    def __init__(self):",
            "        super().__init__()",
            *lines,
            "",
            f"    def forward({interface.signature}):",
            *body,
            "",
        ]
    )
    imports = [line for line, name in _IMPORTS if re.search(rf"\b{name}\.", code)]
    shown = stem if re.fullmatch(r"[\w.-]+", stem) else "small"  # it stands in a string
    return "\n".join([_DOCUMENTATION.format(stem=shown), *imports, "", "", code])


_IMPORTS = (
    ("import torch", "torch"),
    ("import torch.nn.functional as F", "F"),
    ("from torch import nn", "nn"),
)
_DOCUMENTATION = '''"""What sbp_compile left of a masked network, as ordinary modules of torch.

    from safetensors.torch import load_file

    network = {CLASS}()
    network.load_state_dict(load_file("{stem}.safetensors"))

Constant masks and noise are part of the weights. Everything here may be changed and trained further.
"""
'''.replace("{CLASS}", CLASS)
