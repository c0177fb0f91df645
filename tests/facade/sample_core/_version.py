"""Stands for a private module with something public."""

__version__ = "1.2.3"
