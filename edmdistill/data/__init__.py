"""Data sets, and the order in which training visits them."""
