"""Files that ship with the package; `scripts/` in the repository made them."""
