"""Stator serves large language models over several machines."""

__version__ = "0.1.0"
