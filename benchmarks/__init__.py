"""Benchmarks that measure, compare and judge themselves: `python -m benchmarks.NAME [--quick]`."""
