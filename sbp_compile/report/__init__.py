"""What was removed, and why the rest stayed."""

from sbp_compile.report.report import Layer, Report, build_report

__all__ = ["Layer", "Report", "build_report"]
