"""Parity: whether exported files compute what was trained, and which layer of which file does not."""

from compress.verification.facts import compare_facts
from compress.verification.inputs import Inputs, of_split
from compress.verification.tables import Rows, tables
from compress.verification.verify import Tolerances, Verification, open_file, verify_files, verify_product

__all__ = [
    "Inputs",
    "Rows",
    "Tolerances",
    "Verification",
    "compare_facts",
    "of_split",
    "open_file",
    "tables",
    "verify_files",
    "verify_product",
]
