"""The report of a root: static pages, and the same pages served live."""

from pipeline.report.build import build
from pipeline.report.serve import LiveReport, make_server

__all__ = ["build", "LiveReport", "make_server"]
