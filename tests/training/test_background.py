"""Jobs beside training: in order, one at a time, with their errors raised by the next call."""

import threading

import pytest
from waiting import LIMIT

from edmdistill.training.background import Background


def test_jobs_are_done_in_order() -> None:
    background, done, go = Background(), [], threading.Event()
    background.begin(lambda: (go.wait(LIMIT), done.append(1)))
    assert done == []
    go.set()
    background.begin(lambda: done.append(2))  # waits for the first
    assert done[0] == 1
    background.finish()
    background.close()
    assert done == [1, 2]


def test_an_error_is_raised_once_by_the_next_call() -> None:
    background = Background()
    background.begin(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.begin(lambda: None)
    background.finish()
    background.begin(lambda: 1 / 0)
    background.close()  # as after another error, which must not be hidden
