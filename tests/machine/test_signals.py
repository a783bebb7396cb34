"""What a signal does to a run is in cli/test_train.py; what it does to several processes, in test_launch.py."""

import signal

import pytest

from edmdistill.machine.signals import NOTICES, stop_on_signal


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


@pytest.mark.parametrize("notice", NOTICES)
def test_what_follows_a_notice_does_not_stop_at_once(notice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler repeats its notice, and sends SIGTERM in the end; a state may be half-written then."""
    monkeypatch.setattr("edmdistill.machine.signals.ECHO", 0)
    said: list[str] = []
    with stop_on_signal(said.append) as stop:
        for number in (notice, notice, signal.SIGTERM, notice):
            signal.raise_signal(number)
            assert stop.is_set()
    assert said == ["Stopping after this round.", "Stopping after this round; once more stops at once."]
    assert signal.getsignal(notice) == signal.SIG_DFL
