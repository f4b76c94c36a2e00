"""What an ONNX file says beside its graph, and what an ONNX file made of it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Interface:
    """Names, texts and opset of the file a network came from.

    `inputs`: names by those that the captured network has for them; `outputs`: one for each result; `texts`: by the
    field of the model that holds them; `documents`: of inputs and outputs, by name.
    """

    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    opset: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, str] = field(default_factory=dict)
    version: int = 0
    graph_name: str = ""
    graph_document: str = ""
