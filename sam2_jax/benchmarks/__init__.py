"""Measurements beside the reference; scripts/benchmark.py is their command line."""
