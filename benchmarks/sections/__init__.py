"""The parts of benchmarks/bench.py, a file each: `measure` yields the rows of its table."""
