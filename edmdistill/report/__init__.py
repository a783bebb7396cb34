"""What a run has to show, on one page: `summary` reads it, `expected` says what was planned, `page` writes it."""
