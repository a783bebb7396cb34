"""Recipes, which decide what a run computes: the schema of recipes, and the library of those that ship."""
