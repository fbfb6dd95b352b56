"""The report of a run: what a run folder says, as a page, a table and JSON."""

from compress.report.report import read_report, summary_rows, write_report

__all__ = ["read_report", "summary_rows", "write_report"]
