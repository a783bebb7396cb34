"""What every test may ask for."""

import signal
from pathlib import Path

import pytest
from golden_set import GOLDEN, unpack_bad
from hypothesis import settings

# The same examples in every run, and no deadline: the first call of a torch operation is slow, and machines are shared.
settings.register_profile("edmdistill", derandomize=True, deadline=None)
settings.load_profile("edmdistill")

# Under nohup, or in the background of a script, signals are ignored, and would be in the processes under test.
for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden cases: tiny official pickles with outputs of the official code; see its README."""
    return GOLDEN


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of damaged and hostile pickles, golden_set.BAD."""
    return unpack_bad(tmp_path_factory.mktemp("bad"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
