"""Checkpoints for programs that know nothing of us: ONNX runtimes, torch alone, diffusers, NVIDIA's scripts."""
