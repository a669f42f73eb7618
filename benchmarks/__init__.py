"""Timings of fxopt beside its peers; each module runs with ``python -m benchmarks.<name>``."""
