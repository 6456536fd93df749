"""Shared code of the training, sampling and evaluation scripts."""

__version__ = "0.1.0"
