"""The report of a run on one page: `summary` reads it, `expected` says what was planned, `page` writes it."""
