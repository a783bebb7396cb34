"""Samplers: Heun for teachers, gamma-sampling for generators; `generate.sample` is the entry point."""
