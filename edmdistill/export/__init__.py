"""Checkpoints for programs without this package: ONNX runtimes, torch alone, diffusers, NVIDIA's scripts."""
