"""Paths, URLs and the Hub."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from edmdistill.checkpoints.source import file_digest, resolve, source_name
from edmdistill.errors import CheckpointError, HubError

CONTENT = bytes(range(256)) * 9000


class Server(ThreadingHTTPServer):
    """Serves CONTENT at /edm.pkl, and some that is wrong elsewhere."""

    requests: list[str]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.requests.append(self.path)
        if self.path == "/gone.pkl":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if "login" in self.path else "application/binary")
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if "cut" in self.path else CONTENT)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path / "cache"))
    with Server(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "edm2-s.pkl").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve("teachers/edm2-s.pkl") == Path("teachers/edm2-s.pkl")
    assert resolve(tmp_path) == tmp_path
    # Looks like owner/name, but the folder is here: no repository is asked for.
    with pytest.raises(
        CheckpointError, match=r"teachers/edm2-x\.pkl does not exist: did you mean teachers/edm2-s\.pkl"
    ):
        resolve("teachers/edm2-x.pkl")
    for nothing in ("nothing.pkl", "c:/nothing.pkl"):  # the letter of a drive is no scheme
        with pytest.raises(
            CheckpointError, match=r"nothing\.pkl does not exist: give a path, a URL or a Hub repository"
        ):
            resolve(nothing)
    for scheme in ("ftp", "FTP", "s3"):
        address = f"{scheme}://me:secret@host/edm.pkl"
        with pytest.raises(CheckpointError, match="cannot be downloaded: use an http, https or hf address") as caught:
            resolve(address)
        assert "secret" not in str(caught.value)
    with pytest.raises(CheckpointError, match="is not a repository of the Hub"):
        resolve("HF://owner")


def test_what_provenance_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_name(tmp_path / "edm.pkl").endswith("edm.pkl")
    (tmp_path / "edm.pkl").touch()
    assert source_name(tmp_path / "edm.pkl") == "edm.pkl"
    assert source_name(".") == tmp_path.name
    for whole in ("https://host/a/edm.pkl", "hf://owner/name/edm.pkl@v1", "owner/name"):
        assert source_name(whole) == whole
    assert source_name("digits") == "digits-teacher.pkl"
    (tmp_path / "digits").mkdir()
    assert source_name("digits") == "digits"


def test_a_digest_is_that_of_a_file_or_what_was_said_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "edm.pkl").write_bytes(CONTENT)
    assert file_digest(tmp_path / "edm.pkl") == hashlib.sha256(CONTENT).hexdigest()
    said = file_digest("https://me:secret@host/edm.pkl?sig=secret")
    assert "host/edm.pkl" in said
    assert "secret" not in said


def test_a_url_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    url = f"{address(server)}/edm.pkl"
    path = resolve(url)
    assert path.name == "edm.pkl"
    assert path.read_bytes() == CONTENT
    assert resolve(url) == path
    assert server.requests == ["/edm.pkl"]
    assert [entry for entry in (tmp_path / "cache").rglob("*") if entry.is_file()] == [path]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("gone.pkl", "the server says 404 Not Found"),
        ("cut.pkl", "it ended after 1000 of"),
        ("login.pkl", "it is a web page"),
    ],
)
def test_a_broken_download_leaves_nothing(server: Server, tmp_path: Path, file: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be downloaded: {reason}"):
        resolve(f"{address(server)}/{file}")
    assert not [entry for entry in (tmp_path / "cache").rglob("*") if entry.is_file()]


@pytest.mark.parametrize("url", ["http://[x/edm.pkl", "http://", "https://h:port/..", "http:///edm.pkl"])
def test_what_is_no_address_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        resolve(url)


def test_nobody_answers(server: Server) -> None:
    port = server.server_address[1]
    server.shutdown()
    server.server_close()
    sentence = r"\[Errno \d+\] Connection refused; check the network, or give the path of a copy to the command"
    with pytest.raises(CheckpointError, match=f"cannot be downloaded: {sentence}"):
        resolve(f"http://127.0.0.1:{port}/edm.pkl")


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = []

    def file(repository: str, name: str, revision: str | None, tqdm_class: type) -> str:
        calls.append((repository, name, revision))
        return "file"

    def snapshot(repository: str, revision: str | None, allow_patterns: list[str], tqdm_class: type) -> str:
        calls.append((repository, *allow_patterns, revision))
        return "folder"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", calls.append)
    assert resolve("hf://owner/name/sub/edm.pkl@v1") == Path("file")
    assert resolve("owner/name") == Path("folder")
    assert resolve("hf://owner/name@v1") == Path("folder")
    assert calls == [
        "https://huggingface.co/owner/name/resolve/v1/sub/edm.pkl",  # or the client would try again for long
        ("owner/name", "sub/edm.pkl", "v1"),
        ("owner/name", "config.json", "model.safetensors", "README.md", None),
        ("owner/name", "config.json", "model.safetensors", "README.md", "v1"),
    ]
    with pytest.raises(CheckpointError, match="is not a repository"):
        resolve("hf://owner")


def test_the_hub_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments: object, **named: object) -> str:
        raise LocalEntryNotFoundError("it is not in the cache.\nAnd more lines.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubError, match=r"^owner/name cannot be downloaded from the Hub: it is not in the cache$"):
        resolve("owner/name")
