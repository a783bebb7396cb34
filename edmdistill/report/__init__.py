"""The report of a run on one page: `summary` reads it, `plan_comparison` says what was planned, `page` writes it."""
