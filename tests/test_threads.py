"""Threads: items in order, no result before a failure lost, and nothing left running where nobody waits."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch
from waiting import LIMIT, wait_until

from edmdistill.threads import Background, _Crew, ahead, in_crew


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_items_are_acted_on_in_order_a_few_ahead(threads: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    results: list[tuple[int, threading.Thread]] = []
    for result in ahead(lambda item: (item, threading.current_thread()), items(), threads):
        assert len(taken) <= len(results) + 1 + threads
        results.append(result)
    assert [item for item, _ in results] == list(range(20))
    assert {thread is threading.main_thread() for _, thread in results} == {threads == 0}


def test_as_many_items_are_begun_as_asked_for() -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            begun.append(item)
            yield item

    with closing(ahead(lambda item: item, items(), 2, waiting=7)) as results:
        assert [next(results), len(begun), next(results), len(begun)] == [0, 8, 1, 9]
        assert [*results] == list(range(2, 20))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_what_comes_before_a_failure_is_not_lost(threads: int) -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise KeyboardInterrupt

    results: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        results.extend(ahead(lambda item: 2 * item, items(), threads))
    assert results == [0, 2, 4, 6, 8]


def test_ctrl_c_while_an_item_is_handed_out_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no failure of the items: what a thread is at is given up."""
    submit, results = ThreadPoolExecutor.submit, list[int]()

    def interrupted(pool: ThreadPoolExecutor, run: Callable[..., int], act: Callable[[int], int], item: int) -> object:
        if item == 1:
            raise KeyboardInterrupt
        return submit(pool, run, act, item)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.extend(ahead(lambda item: item, range(9), 2))
    assert not results


def test_a_failure_of_an_act_is_raised_in_its_place() -> None:
    def act(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results: list[int] = []
    with pytest.raises(ValueError, match="three"):
        results.extend(ahead(act, range(9), 2))
    assert results == [0, 1, 2]


@pytest.mark.parametrize(("threads", "each"), [(0, 3), (1, 3), (2, 1), (3, 1), (4, 1)])
def test_the_cores_are_shared_out_and_given_back(threads: int, each: int, set_threads: Callable[[int], None]) -> None:
    set_threads(3)
    act = lambda item: (torch.get_num_threads(), in_crew())  # noqa: E731
    assert [*ahead(act, range(9), threads, share_cores=True)] == [(each, threads > 0)] * 9
    later: list[int] = []
    new = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert (torch.get_num_threads(), later, in_crew()) == (3, [3], False)


def test_acts_that_do_not_compute_leave_the_cores_alone(set_threads: Callable[[int], None]) -> None:
    set_threads(3)
    assert [*ahead(lambda item: in_crew(), range(9), 3)] == [False] * 9
    assert torch.get_num_threads() == 3


class Endless:
    """Acts for ever, but on item 2, which fails, and on 6, which presses Ctrl-C.  ended: what ended it."""

    def __init__(self) -> None:
        self.began, self.ended = threading.Semaphore(0), list[type[BaseException]]()

    def __call__(self, item: int) -> int:
        if item == 0:
            return item
        self.began.release()
        try:
            if item == 2:
                self.began.acquire(timeout=LIMIT)
                self.began.acquire(timeout=LIMIT)  # another has begun
                raise ValueError("two")
            if item == 6:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            for _ in range(1000 * LIMIT):
                time.sleep(0.001)
            raise AssertionError("nothing ended it")
        except BaseException as error:
            self.ended.append(type(error))
            raise


def test_threads_end_where_no_more_is_asked_for() -> None:
    act, before = Endless(), set(threading.enumerate())
    with closing(ahead(act, (0, 1, 3, 4, 5), 2)) as results:
        assert next(results) == 0
        act.began.acquire(timeout=LIMIT)
        act.began.acquire(timeout=LIMIT)
    assert act.ended == [SystemExit] * 2
    assert set(threading.enumerate()) <= before


def test_threads_end_where_one_fails() -> None:
    act, before = Endless(), set(threading.enumerate())
    with pytest.raises(ValueError, match="two"):
        list(ahead(act, (0, 2, 3, 4, 5), 2))
    assert act.ended[0] is ValueError
    assert set(act.ended[1:]) == {SystemExit}
    assert set(threading.enumerate()) <= before


def test_threads_end_at_ctrl_c_while_one_is_waited_for() -> None:
    act, before = Endless(), set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        list(ahead(act, (3, 6, 4, 5), 2))
    wait_until(lambda: set(threading.enumerate()) <= before)  # a pool does not know a thread that Ctrl-C saw start
    assert set(act.ended) == {SystemExit}


def test_an_end_that_a_finalizer_lost_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edmdistill.threads.PATIENCE", 0.05)
    act, before = Endless(), set(threading.enumerate())

    def loses_it(item: int) -> int:
        try:
            return act(item)
        except SystemExit:  # as Python does around a finalizer
            return act(item)

    with closing(ahead(loses_it, (0, 1, 3), 1)) as results:
        assert next(results) == 0
        act.began.acquire(timeout=LIMIT)
    assert set(act.ended) == {SystemExit}
    assert set(threading.enumerate()) <= before


def test_what_a_thread_has_taken_but_not_begun_is_not_begun() -> None:
    crew, begun = _Crew(), []
    crew.stop()
    with pytest.raises(SystemExit):
        crew.run(begun.append, 1)
    assert not begun


def test_jobs_in_the_background_are_done_in_order() -> None:
    background, done, go = Background(), [], threading.Event()
    background.begin(lambda: (go.wait(LIMIT), done.append(1)))
    assert done == []
    go.set()
    background.begin(lambda: done.append(2))  # waits for the first
    assert done[0] == 1
    background.finish()
    background.close()
    assert done == [1, 2]


def test_an_error_in_the_background_is_raised_once_by_the_next_call() -> None:
    background = Background()
    background.begin(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.begin(lambda: None)
    background.finish()
    background.begin(lambda: 1 / 0)
    background.close()  # as after another error, which must not be hidden


def test_nothing_is_left_in_the_background() -> None:
    before, done = set(threading.enumerate()), []
    with closing(Background()) as background:
        background.begin(lambda: (time.sleep(0.01), done.append(1)))
    assert done == [1]
    assert set(threading.enumerate()) <= before
