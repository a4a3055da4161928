"""Benchmarks that measure, compare and judge themselves.

`python -m benchmarks.NAME [--quick]` prints one JSON object, {"results": [...], "goals": [...]}, as all of its
standard output, and exits 0 only if every goal is met. Peers are timed in turns in one process, so that a busy
machine slows all of them; only ratios are judged. What all benchmarks share is in `benchmarks.contract`.
"""
