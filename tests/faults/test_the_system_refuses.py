"""Files, disks and folders that the system refuses: one sentence and exit 2; only faults of ours keep a traceback."""

import errno
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from edmdistill.checkpoints.download import download
from edmdistill.cli import REFUSALS, main
from edmdistill.cli.measurements import SharingOptions
from edmdistill.cli.types import OutputPath
from edmdistill.errors import CheckpointError


@pytest.fixture
def body(monkeypatch: pytest.MonkeyPatch):
    """Runs `edmdistill inspect` with a body of the test's own."""
    import types

    def run(function):
        module = types.ModuleType("edmdistill.cli.inspect")
        module.command = click.command()(function)
        monkeypatch.setitem(sys.modules, "edmdistill.cli.inspect", module)
        return CliRunner().invoke(main, ["inspect"])

    return run


@pytest.mark.parametrize("number", sorted(REFUSALS))
def test_a_refusal_is_one_sentence(body, number: int):
    def command():
        raise OSError(number, os.strerror(number), "a/file")

    result = body(command)
    assert result.exit_code == 2
    advice = {errno.EFBIG: "; raise the limit of a file's size (ulimit -f)"}
    advice[errno.EMFILE] = "; raise the limit of open files (ulimit -n)"
    assert result.stderr == f"Error: a/file: {os.strerror(number)}{advice.get(number, '')}.\n"


def no_process() -> None:
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def no_thread() -> None:
    size = threading.stack_size(2**46)  # more than a process can have
    try:
        threading.Thread(target=int).start()
    finally:
        threading.stack_size(size)


@pytest.mark.parametrize("command", [no_process, no_thread])
def test_no_more_processes_and_threads(body, command: Callable[[], None]):
    """By `ulimit -u`, or a container's limit."""
    result = body(command)
    assert result.exit_code == 2
    sentence = "raise the limit of processes and threads (ulimit -u, or the container's)"
    assert result.stderr == f"Error: no more processes or threads can be started: {sentence}.\n"


def test_an_output_that_would_block_keeps_its_traceback(body):
    def command():
        raise BlockingIOError(errno.EAGAIN, "write could not complete without blocking", 0)

    assert isinstance(body(command).exception, BlockingIOError)


@pytest.mark.parametrize("wrapped", [False, True])
def test_no_folder_for_temporary_files(body, wrapped: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)

    def command():
        try:
            tempfile.gettempdir()
        except OSError as error:
            if wrapped:
                raise CheckpointError("a cannot be written") from error
            raise

    result = body(command)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: there is no folder where temporary files can be written: set TMPDIR to one")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("CUDNN_STATUS_ALLOC_FAILED")],
    ids=["torch", "cudnn"],
)
def test_a_gpu_without_memory_is_one_sentence(body, error: RuntimeError):
    def command():
        raise error

    result = body(command)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: the GPU's memory is full ({str(error).partition('.')[0]}): free ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "~nobody.here/x"],
        ["tune-schedule", "~nobody.here/x", "--nfe", "2", "--metric", "fd_pixels"],
        ["data", "stats", "digits", "a.npz", "--features", "inception", "--weights", "inception=~nobody.here/x"],
    ],
    ids=lambda words: words[0],
)
def test_a_user_who_is_not_on_this_machine(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    sentence = "~nobody.here/x names a user who does not exist on this machine, or has no home folder"
    assert result.stderr == f"Error: {sentence}: write the path in full\n"


def test_without_a_home_folder_the_cache_needs_a_place(monkeypatch: pytest.MonkeyPatch):
    """As in a container whose user has a number alone."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("EDMDISTILL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    result = CliRunner().invoke(main, ["fetch", "list"])
    assert result.exit_code == 2
    assert result.stderr == "Error: there is no home folder for the cache ~/.cache/edmdistill: set EDMDISTILL_CACHE\n"
    monkeypatch.setenv("EDMDISTILL_CACHE", "/cache")
    assert CliRunner().invoke(main, ["fetch", "list"]).exit_code == 0


def test_a_cache_that_cannot_be_written_may_be_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path / "file" / "cache"))
    sentence = r"^the cache \S+ cannot be written \(Not a directory\): set EDMDISTILL_CACHE to a folder that can$"
    with pytest.raises(CheckpointError, match=sentence):
        download("http://127.0.0.1:9/a.pkl")
    with pytest.raises(CheckpointError, match=r"set EDMDISTILL_CACHE"):
        SharingOptions(device=None, processes=None, work=None).open_work()


def test_a_file_that_we_forgot_to_write_keeps_its_traceback(body):
    def command():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "ours")

    assert isinstance(body(command).exception, FileNotFoundError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_behind_stdout():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edmdistill", "recipes", "list"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "Error: the output: No space left on device.\n"


def test_a_working_directory_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = CliRunner().invoke(main, ["recipes", "list"])
    assert result.exit_code == 2
    assert result.stderr == "Error: the working directory no longer exists: change to another one\n"
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("", "the path is empty; name a file or folder."),
        (" ", "the path is empty; name a file or folder."),
        ("/", "/ is the root folder; name a folder inside it."),
        ("n" * 256, "the name is longer than the 255 bytes a file name may have."),
        ("/".join(["n" * 200] * 30), "the name is longer than the 255 bytes a file name may have."),
        ("~nobody-of-that-name/x", "~nobody-of-that-name/x names a user who does not exist on this machine; write the"),
    ],
)
def test_places_that_can_never_be_written(place: str, sentence: str):
    with pytest.raises(click.BadParameter) as refused:
        OutputPath().convert(place, None, None)
    assert refused.value.message.startswith(sentence)


def test_a_place_in_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert OutputPath().convert("~/x", None, None) == Path("/home/me/x")
