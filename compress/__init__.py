"""Shrinks a PyTorch vision network for an ARM board and proves that it did."""

__version__ = "0.1.0"
