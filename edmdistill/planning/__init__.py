"""Estimates of a run before it begins: memory, operations, time."""
