"""A run of every method that several files of tests look at."""

import pytest

from edmdistill.methods import METHODS

TEN_ROUNDS = {"images": 80, "snapshot_every": 24, "log_every": 16}
"""States fall within the windows of metrics.jsonl, and windows within the states."""
OF_METHODS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in sorted(METHODS)]
"""By the same worker, which trains it once."""
