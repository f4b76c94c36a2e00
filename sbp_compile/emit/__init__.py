"""Program to what users run: a torch module, an ONNX file, an exported program."""

from sbp_compile.emit.module import CompiledModule, emit_graph_module

__all__ = ["CompiledModule", "emit_graph_module"]
