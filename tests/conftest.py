"""What every test may ask for."""

import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from golden_set import GOLDEN, unpack_bad
from hypothesis import settings

if TYPE_CHECKING:
    from hub_server import Hub

# The same examples in every run, and no deadline: the first call of a torch operation is slow, and machines are shared.
settings.register_profile("edmdistill", derandomize=True, deadline=None)
settings.load_profile("edmdistill")

# Under nohup, or in the background of a script, signals are ignored, and would be in the processes under test.
for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

# Modules and tests are half a million objects that stay: the collector need not go through them again and again.
gc.disable()

# Of a test's own; nothing is left in the user's cache.
os.environ["EDMDISTILL_CACHE"] = tempfile.mkdtemp(prefix="edmdistill-tests-")

# One thread a process, also of those that tests start: runs have the same bits only by the same number of threads, and
# the networks under test are too small to share one. torch is not imported yet.
os.environ["OMP_NUM_THREADS"] = "1"

# Triton reads it when it is imported, which torch.compile does too.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def cache() -> Iterator[None]:
    """Removes the cache of the tests."""
    yield
    shutil.rmtree(os.environ["EDMDISTILL_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden cases: tiny official pickles with outputs of the official code; see its README."""
    return GOLDEN


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of damaged and hostile pickles, golden_set.BAD."""
    return unpack_bad(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads; the number from before comes back after the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Hub"]:
    """A stand-in in the place of the Hub, with an empty cache and a token for it."""
    from hub_server import TOKEN, hub
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    with hub() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server
    close_session()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    if "forks" in sys.modules:
        sys.modules["forks"].stop()


@pytest.hookimpl(tryfirst=True)  # before the test's fixtures
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Gives a test the same random numbers, whichever its process ran before; skips those of a GPU without one."""
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(0)
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
