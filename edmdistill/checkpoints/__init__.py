"""Checkpoints: reading the official pickles safely, our own directories, and the way from one to the other."""
