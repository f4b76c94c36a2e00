"""Whatever the user has, as an exported program: capture of modules, and the files that are read."""

from sbp_compile.capture.export import export_module
from sbp_compile.capture.load import load_model
from sbp_compile.capture.model_file import LoadedModel, save_model
from sbp_compile.capture.program import program_from_export

__all__ = ["LoadedModel", "export_module", "load_model", "program_from_export", "save_model"]
