"""Processes of the suites, each ``python -m benchmarks.workers.NAME``."""
