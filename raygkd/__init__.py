"""Distil large vision models into small ones by matching graphs of their feature channels."""

__version__ = "0.1.0"
