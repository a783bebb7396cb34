"""Downloads from the Hub: what the cache has, of which revision, and what is wrong with what came."""

import errno
import os
from pathlib import Path

import hub_server
import huggingface_hub
import pytest
from hub_server import Hub, Repository

from edmdistill.checkpoints import hub_client
from edmdistill.checkpoints.hub_client import cached_from_hub, download_from_hub
from edmdistill.checkpoints.source import resolve
from edmdistill.errors import CheckpointError, HubError

FILES = "a.json", "b.safetensors"


@pytest.fixture
def repository(server: Hub) -> Repository:
    """me/it, with a branch that has other files."""
    server.repositories["me/it"] = made = Repository(private=False)
    made.commit("main", dict(zip(FILES, (b"A", b"B"), strict=True)))
    made.commit("next", dict(zip((*FILES, "c.pkl"), (b"AA", b"BB", b"CC"), strict=True)))
    return made


def test_the_cache_has_all_files_of_that_revision_or_nothing(repository: Repository) -> None:
    folder = download_from_hub("me/it", FILES[:1])
    assert (folder / FILES[0]).read_bytes() == b"A"
    assert cached_from_hub("me/it", FILES[:1]) == cached_from_hub("me/it@main", FILES[:1]) == folder
    assert cached_from_hub("me/it", FILES) is None
    assert cached_from_hub("me/it@next", FILES[:1]) is None
    other = download_from_hub("me/it@next", FILES)
    assert [(other / name).read_bytes() for name in FILES] == [b"AA", b"BB"]
    assert cached_from_hub("me/it@next", FILES) == cached_from_hub(f"me/it@{other.name}", FILES) == other
    assert cached_from_hub("me/it", FILES[:1]) == folder


def test_a_file_of_a_branch_is_there_without_the_hub_afterwards(server: Hub, repository: Repository) -> None:
    path = resolve("hf://me/it/c.pkl@next")
    assert path.read_bytes() == b"CC"
    server.faults[""] = 503, 1000
    assert resolve("hf://me/it/c.pkl@next") == path
    with pytest.raises(HubError, match=r"^me/it/c\.pkl cannot be downloaded .* internal error \(503\)"):
        resolve("hf://me/it/c.pkl")


def test_what_an_address_holds_beside_the_name_is_left_out(server: Hub, repository: Repository) -> None:
    assert resolve("hf://me:secret@me/it/a.json?download=true#top").read_bytes() == b"A"
    with pytest.raises(HubError, match=r"^me/it/d\.pkl cannot be downloaded from the Hub: it has no such file"):
        resolve("hf://me:secret@me/it/d.pkl?token=secret")
    with pytest.raises(CheckpointError, match=r"^hf://me/a b/c is not a repository of the Hub: write hf://owner/name"):
        resolve("hf://me/a b/c")


@pytest.mark.parametrize("name", ["me/it", "hf://me/it/b.safetensors"])
def test_a_large_file_that_is_not_what_the_hub_says_is_not_kept(
    server: Hub, repository: Repository, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(again: str = name) -> Path:
        return resolve(again) if again.startswith("hf://") else download_from_hub(again, FILES)

    with monkeypatch.context() as patch:
        patch.setattr(hub_server, "_oid", lambda path, content: "0" * (64 if path == FILES[1] else 40))
        with pytest.raises(HubError, match=r"b\.safetensors came with the sha256 \w+, but the Hub has 0+; download it"):
            read()
    path = read()
    assert (path if path.is_file() else path / FILES[1]).read_bytes() == b"B"
    monkeypatch.setattr(hub_client, "sha256_file", None)  # what has been compared is not read again
    monkeypatch.setattr(hub_client.time, "time", lambda: path.stat().st_mtime + 10)
    assert read() == path


def test_a_gated_repository_says_where_to_ask(repository: Repository) -> None:
    repository.gated = True
    with pytest.raises(
        HubError, match=r"^me/it cannot be downloaded .*: access to it is gated; request it on its page"
    ):
        download_from_hub("me/it", FILES)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "No space left on device); free some of its disk, or set HF_HOME to a folder on another"),
        (errno.EROFS, "Read-only file system); set HF_HOME to a folder that can be"),
    ],
    ids=["full", "read-only"],
)
def test_a_cache_that_cannot_be_written_is_named(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubError) as error:
        download_from_hub("me/it", FILES)
    cache = huggingface_hub.constants.HF_HUB_CACHE
    assert str(error.value) == (
        f"me/it cannot be downloaded from the Hub: its cache {cache} cannot be written ({sentence}"
    )
