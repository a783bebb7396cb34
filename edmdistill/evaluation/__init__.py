"""Measures images against a reference, bound to a protocol."""
