"""A matrix of recipes, run by several workers that share what they have in common, and what came of it."""

from compress.sweep.matrix import Cell, cells
from compress.sweep.page import failures, rows, said_of_best, statements
from compress.sweep.sweep import Asked, Swept, Watched, run_sweep

__all__ = ["Asked", "Cell", "Swept", "Watched", "cells", "failures", "rows", "run_sweep", "said_of_best", "statements"]
