"""What a signal does to a run is in cli/test_train.py; what it does to several processes, in test_launch.py."""

import signal

import pytest

from edmdistill.machine.signals import stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number: int) -> None:
    """As SIGHUP is by nohup, and SIGINT in a script's background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_on_signal(print) as stop:
            signal.raise_signal(number)
            assert not stop.is_set()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
