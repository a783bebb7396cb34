"""Downloads: what is cut, slow, forged or unreadable is one sentence, and is not kept."""

import hashlib
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Hub, Repository
from huggingface_hub import constants

from edmdistill.checkpoints import download
from edmdistill.checkpoints.download import _file_name
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.source import resolve
from edmdistill.errors import CheckpointError, HubError

CONTENT = b"weights" * 1000
Answer = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    answer: Answer
    headers: list[dict[str, str]]
    closing: threading.Event

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.headers.append(dict(self.headers))
        self.server.answer(self)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "SILENCE", 0.3)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.headers, server.closing = [], threading.Event()
        server.handle_error = lambda request, address: None  # type: ignore[method-assign]  # clients that hang up
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def send(handler: BaseHTTPRequestHandler, content: bytes = CONTENT, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def trickle(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.closing.wait(0.02):  # type: ignore[attr-defined]
        handler.wfile.write(b"x")
        handler.wfile.flush()


def slow_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
    while not handler.server.closing.wait(0.02):  # type: ignore[attr-defined]
        handler.wfile.write(b"x")
        handler.wfile.flush()


def silent(handler: BaseHTTPRequestHandler) -> None:
    handler.server.closing.wait()  # type: ignore[attr-defined]


def silent_body(handler: BaseHTTPRequestHandler) -> None:
    send(handler, b"some", Content_Length="100")
    silent(handler)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (silent, "silent for 0.3 s"),
        (silent_body, "silent for 0.3 s"),
        (trickle, "sends less than 1,024 bytes/s"),
        (slow_headers, "silent for 0.3 s"),
        (lambda handler: send(handler, Content_Length=str(10**17)), "the disk of the cache has"),
        (lambda handler: send(handler, Content_Length=str(len(CONTENT) + 1)), "it ended after 7000 of 7001 bytes"),
        (lambda handler: send(handler, b"", 302, Location="file:///etc/passwd"), "302"),
        (lambda handler: send(handler, b"", 302, Location="ftp://127.0.0.1/x"), "not http or https"),
        (lambda handler: send(handler, b"", 302, Location="/again"), "302"),
        (lambda handler: send(handler, b"<html>", Content_Type="text/html"), "a web page"),
    ],
)
def test_bad_servers_end_in_one_sentence(web: Server, tmp_path: Path, answer: Answer, why: str) -> None:
    web.answer = answer  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=rf"^http://[^\n]*cannot be downloaded: [^\n]*{why}"):
        resolve(f"{web.url}/edm.pkl")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("length", ["", "-5", "many", "1e9", "9" * 19])
def test_lengths_that_are_none_are_passed_over(web: Server, length: str) -> None:
    web.answer = lambda handler: send(handler, Content_Length=length)  # type: ignore[method-assign]
    assert resolve(f"{web.url}/edm.pkl").read_bytes() == CONTENT


def test_a_password_goes_to_its_host_alone(web: Server) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        first = handler.path == "/edm.pkl"
        send(handler, b"" if first else CONTENT, 302 if first else 200, **({"Location": "/other"} if first else {}))

    web.answer = answer  # type: ignore[method-assign]
    assert resolve(web.url.replace("//", "//me:a%40b@") + "/edm.pkl").read_bytes() == CONTENT
    sent = [headers.get("Authorization") for headers in web.headers]
    assert b64decode(str(sent[0]).removeprefix("Basic ")) == b"me:a@b"
    assert sent[1:] == [None]


@pytest.mark.parametrize("right", [True, False])
def test_what_the_hub_says_of_a_file_is_compared(web: Server, tmp_path: Path, right: bool) -> None:
    """It says so with the first of its redirects."""
    digest = hashlib.sha256(CONTENT if right else b"").hexdigest()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/other":
            send(handler)
        elif handler.path == "/next":
            send(handler, b"", 302, Location=f"{web.url.replace('http', 'HTTP')}/other")
        else:
            send(handler, b"", 302, Location="/next", X_Linked_ETag=f'"{digest}"')

    web.answer = answer  # type: ignore[method-assign]
    url = f"{web.url.replace('//', '//me:secret@')}/edm.pkl?token=secret"
    if right:
        assert resolve(url).read_bytes() == CONTENT
    else:
        with pytest.raises(CheckpointError, match="but the Hub has") as caught:
            resolve(url)
        assert "secret" not in str(caught.value)
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_files_of_one_name_are_kept_apart(web: Server) -> None:
    web.answer = lambda handler: send(handler, handler.path.encode())  # type: ignore[method-assign]
    for path in ("/a/edm.pkl", "/b/edm.pkl", "/a/edm.pkl?version=2"):
        assert resolve(f"{web.url}{path}").read_bytes() == path.encode()
    assert len(web.headers) == 3


def test_a_damaged_download_is_not_kept(web: Server, golden: Path) -> None:
    good = (golden / "edm-tiny-cond.pkl").read_bytes()
    answers = iter((good[: len(good) // 2], good))
    web.answer = lambda handler: send(handler, next(answers))  # type: ignore[method-assign]
    path = resolve(f"{web.url}/edm.pkl")
    with pytest.raises(
        CheckpointError, match=r"ends too early.*removed from the cache, so give the same command again$"
    ):
        read_official(path)
    assert not path.exists()
    assert read_official(resolve(f"{web.url}/edm.pkl")).sha256 == hashlib.sha256(good).hexdigest()


def test_a_forged_download_is_not_kept_either(web: Server, bad: Path) -> None:
    """The file is gone, so the sentence does not also ask for an intact copy."""
    web.answer = lambda handler: send(handler, (bad / "bad-oob-tensor.pkl").read_bytes())  # type: ignore[method-assign]
    path = resolve(f"{web.url}/edm.pkl")
    with pytest.raises(CheckpointError, match="damaged or forged; it is removed from the cache, so give the same"):
        read_official(path)
    assert not path.exists()


def test_whole_files_are_kept_whatever_their_name(web: Server) -> None:
    web.answer = lambda handler: send(handler)  # type: ignore[method-assign]
    path = resolve(f"{web.url}/network-snapshot-1.200000-403968.pkl")
    with pytest.raises(CheckpointError, match="one-step generator of SiD"):
        read_official(path)
    assert path.exists()


def test_files_of_the_user_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "edm.pkl"
    path.write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match="ends too early"):
        read_official(path)
    assert path.exists()


def test_files_of_the_hub_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the Hub's client names a large file by the sha256 that the Hub says."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    for name, content in ((hashlib.sha256(CONTENT).hexdigest(), CONTENT), ("0" * 64, CONTENT), ("0" * 40, CONTENT)):
        blob, link = tmp_path / name, tmp_path / f"edm{name[:4]}{len(name)}.pkl"
        blob.write_bytes(content)
        link.symlink_to(blob)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, link=link, **__: str(link))
        if name == "0" * 64:
            with pytest.raises(HubError, match=r"came with the sha256 .*download it again"):
                resolve("hf://owner/name/edm.pkl")
            assert not blob.exists()
        else:
            assert resolve("hf://owner/name/edm.pkl") == link


def test_the_cache_is_where_its_variables_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable, expected in (
        (None, tmp_path / ".cache" / "edmdistill"),
        ("XDG_CACHE_HOME", tmp_path / "cache" / "edmdistill"),
        ("EDMDISTILL_CACHE", tmp_path / "cache"),
    ):
        if variable is not None:
            monkeypatch.setenv(variable, "~/cache")
        else:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
            monkeypatch.delenv("EDMDISTILL_CACHE")
        assert download.cache_folder() == expected


def test_a_cache_on_a_read_only_disk_is_one_sentence(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "unwritable", lambda path: path.parent)
    with pytest.raises(
        CheckpointError, match=r"^the cache \S+ cannot be written \(it is read-only\): set EDMDISTILL_CACHE"
    ):
        resolve(f"{web.url}/edm.pkl")
    assert web.headers == []


@pytest.mark.parametrize("path", ["a b.pkl", "caf\u00e9.pkl"])
def test_what_is_wrong_with_an_address_is_said_without_its_secrets(web: Server, path: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be downloaded: this is not a valid address$") as caught:
        resolve(f"{web.url}/{path}?token=secret")
    assert "secret" not in str(caught.value)


def test_where_the_hub_cannot_be_reached_nothing_is_tried_again(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    with pytest.raises(HubError, match="the Hub cannot be reached"):
        resolve("hf://me/teacher/edm.pkl")
    assert not waited


def test_the_hubs_bars_are_ours(
    server: Hub, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edmdistill.progress._quiet", True)
    server.repositories["me/teacher"] = repository = Repository(private=False)
    repository.commit("main", {"edm.pkl": CONTENT})
    assert resolve("hf://me/teacher/edm.pkl").read_bytes() == CONTENT
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://h/a/edm-cifar10.pkl?x=1#y", "edm-cifar10.pkl"),
        ("https://h/a%00b.pkl", "a_b.pkl"),
        ("https://h/caf\u00e9.pkl", "caf_.pkl"),
        ("https://h/..", "download"),
        ("https://h/%2e%2e", "download"),
        ("https://h/a/%2Fetc%2Fpasswd", "passwd"),
        ("https://h/..%5Cx.pkl", "_x.pkl"),
        ("https://h/NUL.pkl", "_NUL.pkl"),
        ("https://h/com1", "_com1"),
        ("https://h/a%1b%5b2J.pkl", "a__2J.pkl"),
        ("https://h/", "h"),
        ("https://h/" + "x" * 500 + ".pkl", "x" * 96 + ".pkl"),
    ],
)
def test_names_that_any_file_system_takes(url: str, name: str) -> None:
    assert _file_name(url) == name
