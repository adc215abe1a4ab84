"""Breaks real processes on hosts that are network namespaces, and counts what clients saw of it."""
