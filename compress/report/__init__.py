"""The report of a run: what a run folder says, as a page, a table and JSON."""

from compress.report.index import write_index
from compress.report.report import read_report, write_report
from compress.report.summary import summary_rows

__all__ = ["read_report", "summary_rows", "write_index", "write_report"]
