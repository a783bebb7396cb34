"""The parts of benchmarks/gpu_check.py: each yields lines of JSON, and takes a Setting."""
