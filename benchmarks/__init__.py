"""Benchmarks: ratios in one run, peers beside the engine."""
