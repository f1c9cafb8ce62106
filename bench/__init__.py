"""Benchmarks: what saving costs, always against a floor measured in the same run."""
