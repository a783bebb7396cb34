"""Files that ship with the package, and the programs that made them."""
