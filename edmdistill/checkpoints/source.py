"""Where a checkpoint comes from: a path, a URL, a file on the Hub or a repository of the Hub, all turned into a path.

The network is used for what the user names as being there, and for nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import queue
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit, urlunsplit

from edmdistill.atomic import atomic_write
from edmdistill.errors import CheckpointError, HubError, public_address
from edmdistill.progress import bar_class, progress_bar

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""owner/name, as the Hub writes it."""
SHIPPED = {"digits": Path(__file__).parent.parent / "assets" / "digits-teacher.pkl"}
"""Checkpoints that come with the package, by a word; a file or folder of that name comes before."""
PATIENCE = 120.0
"""Seconds of silence after which the Hub counts as out of reach."""
SILENCE = 60.0
"""Seconds after which a server that sends nothing is given up."""
SLOWEST = 1024
"""Bytes per second; a server that sends less over SILENCE is given up."""
REASONS = {
    401: "the Hub does not know you; log in by `hf auth login`, or set HF_TOKEN to a valid token",
    403: "your token does not allow it; take one with the right to, from https://huggingface.co/settings/tokens",
    404: "there is no such repository, or it is private and you may not see it; look at the name, and log in",
    409: "something else is going on there; try again in a minute",
    412: "somebody else has changed it in the meantime; give the same command again",
    413: "the Hub takes nothing of that size",
    429: "the Hub has had too many requests from you; wait a while",
}
"""What the Hub's refusals mean to a user."""


def resolve(source: str | Path) -> Path:
    """The local file or folder that `source` names, downloaded first where it is not here.

    Args:
        source: a path; http(s)://...; hf://owner/name/file@revision (a file of the Hub); owner/name or
            owner/name@revision, with hf:// or without (a checkpoint of ours on the Hub); digits, the teacher that comes
            with the package. A path that exists comes before these; a revision is a branch, a tag or a commit.
    Raises: CheckpointError: no such path or URL.  HubError: the Hub has no such thing, or cannot be reached.
    """
    text = str(source)
    scheme = _scheme(text)
    if scheme in ("http", "https"):
        return _download(text)
    if scheme == "hf":
        return _hub(text[len("hf://") :])
    if scheme:
        raise CheckpointError(f"{public_address(text)} cannot be downloaded: give an address of http, https or hf.")
    try:
        path = Path(source).expanduser()
        exists, parts = path.exists(), [path, path / "config.json", path / "model.safetensors"]
        regular = not any(part.exists() and not (part.is_file() or part.is_dir()) for part in parts)
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{text[:200]} cannot be a path: {reason}.") from error
    if exists and not regular:
        raise CheckpointError(f"{path} is or holds a pipe or a device: write what it holds to a file, and give that.")
    if exists:
        return path
    if text in SHIPPED:
        return SHIPPED[text]
    # `teachers/edm2-s` with a folder `teachers` is a slip of the pen, not a repository.
    if isinstance(source, str) and REPOSITORY.fullmatch(text.partition("@")[0]) and not path.parent.is_dir():
        return _hub(text)
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else "give a path, a URL or a Hub repository owner/name."
    raise CheckpointError(f"{path} does not exist: {hint}")


def _scheme(text: str) -> str:
    """Of an address, in small letters; empty for a path."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+(?=:/)", text)
    return scheme[0].lower() if scheme else ""


def name_of(source: str | Path) -> str:
    """What provenance says of a source: scheme, host and path of a URL, a Hub id whole, of a path the last name."""
    text = str(source)
    if _scheme(text):
        return public_address(text)
    path = Path(source).expanduser()
    if not path.exists() and text in SHIPPED:
        return SHIPPED[text].name
    return path.resolve().name if path.exists() else text


def _cache() -> Path:
    """The folder of downloads: $EDMDISTILL_CACHE, else edmdistill in the user's cache folder."""
    own = os.environ.get("EDMDISTILL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "edmdistill"


def _download(url: str) -> Path:
    """The file at an http(s) URL, kept for the next time.  A download that breaks leaves nothing."""
    # A folder for each URL keeps the file's own name, which says what it is (and .pkl or .pt).
    target = _cache() / hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()[:16] / _file_name(url)
    if target.exists():
        return target
    with atomic_write(target) as new:
        redirects = _Redirects()
        try:
            with _open(url, redirects) as response, new.open("wb") as file:
                if response.headers.get_content_type() == "text/html":
                    raise ValueError("it is a web page, not a file")
                digest = _save(response, file, target.name)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason: object = getattr(error, "reason", None) or error
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                reason = f"the server says {error.code} {error.reason}"
            elif isinstance(reason, TimeoutError):
                reason = f"the server is silent for {SILENCE:g} s; try again later"
            elif isinstance(error, http.client.InvalidURL | UnicodeError):
                reason = "this is no address"  # the error repeats it, with what may be secret
            raise CheckpointError(f"{public_address(url)} cannot be downloaded: {reason}.") from None
        if redirects.sha256 not in (None, digest):
            raise CheckpointError(
                f"{public_address(url)} came with the sha256 {digest}, but the Hub has {redirects.sha256}: "
                "download it again."
            )
    return target


def _file_name(url: str) -> str:
    """The last name in a URL's path, as any file system takes it."""
    last = PurePosixPath(unquote(re.split("[?#;]", url)[0].rstrip("/"))).name
    name = re.sub(r"[^\w.+=-]", "_", last, flags=re.ASCII).strip(".")[-100:] or "download"
    return f"_{name}" if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name) else name  # of Windows


class _Redirects(urllib.request.HTTPRedirectHandler):
    """EmaOf to http and https alone, and notes what the Hub says of a large file before it sends on to it."""

    sha256: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(("http://", "https://")):
            fp.close()
            raise urllib.error.URLError("the server sends on to an address that is not http or https")
        linked = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag") or "")
        self.sha256 = linked[1] if linked else self.sha256
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, redirects: _Redirects) -> Any:
    """The response to a GET, which begins within SILENCE."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host, fragment="")))
    if at:  # not to be sent to wherever the server sends on to
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    opener = urllib.request.build_opener(redirects)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    given_up = threading.Event()

    def answer() -> None:
        try:
            response = opener.open(request, timeout=SILENCE)
        except BaseException as error:  # raised again below
            response = error
        if given_up.is_set():
            getattr(response, "close", lambda: None)()
        else:
            answers.put(response)

    # A server may send its headers a letter at a time, and each letter begins the socket's own patience anew.
    threading.Thread(target=answer, daemon=True).start()
    try:
        response = answers.get(timeout=2 * SILENCE)
    except queue.Empty:
        given_up.set()
        raise TimeoutError from None
    if isinstance(response, BaseException):
        raise response
    return response


def _save(response: Any, file: BinaryIO, name: str) -> str:
    """Writes a response's body, and returns its sha256.

    Raises: OSError, ValueError: it is cut short, too slow, or larger than the disk.
    """
    said = response.headers.get("Content-Length") or ""
    size = int(said) if re.fullmatch(r"\d{1,18}", said) else None
    free = shutil.disk_usage(Path(file.name).parent).free
    if size is not None and size > free:
        raise OSError(f"it has {size:,} bytes, and the disk of the cache has {free:,} free; set EDMDISTILL_CACHE")
    digest = hashlib.sha256()
    count, since = 0, time.monotonic()
    with progress_bar(total=size, desc=name, unit="B", unit_scale=True) as bar:
        while chunk := response.read1(1 << 20):
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
            count += len(chunk)
            now = time.monotonic()
            if now - since > SILENCE:
                if count < SLOWEST * (now - since):
                    raise OSError(f"the server sends less than {SLOWEST:,} bytes/s; try again later")
                count, since = 0, now
    if size is not None and file.tell() != size:
        raise OSError(f"it ended after {file.tell()} of {size} bytes")
    return digest.hexdigest()


@contextmanager
def downloaded(path: Path) -> Iterator[None]:
    """Reads what may be a download: if it cannot be read, it is removed, so that it is downloaded again.

    Raises: CheckpointError: from the block, with what became of the file.
    """
    try:
        yield
    except CheckpointError as error:
        from huggingface_hub import constants

        place = path.absolute()
        if any(Path(folder).absolute() in place.parents for folder in (_cache(), constants.HF_HUB_CACHE)):
            blob = path.resolve()
            path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            raise CheckpointError(f"{str(error).rstrip('.')}; it is removed from the cache.") from error
        raise


def _hub(text: str) -> Path:
    """A file (owner/name/file@revision) or a checkpoint of ours (owner/name@revision) from the Hugging Face Hub."""
    from huggingface_hub import hf_hub_download, snapshot_download

    text = re.sub(r"^[^/]*@|[?#].*", "", text)  # a user or a token: the client has its own
    where, _, revision = text.partition("@")
    owner, _, rest = where.partition("/")
    name, _, file = rest.partition("/")
    repository = f"{owner}/{name}"
    if not REPOSITORY.fullmatch(repository):
        raise CheckpointError(f"hf://{text} names no repository of the Hub: write hf://owner/name/file@revision.")
    with hub_calls(f"{text} cannot be had from the Hub"):
        begun, bar = time.time(), bar_class()
        if file:
            path = Path(hf_hub_download(repository, file, revision=revision or None, tqdm_class=bar))
            _require_whole(path, begun)
            return path
        files = ["config.json", "model.safetensors", "README.md"]
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=files, tqdm_class=bar)
        path = Path(folder)
        for name in files:
            _require_whole(path / name, begun)
        return path


def _require_whole(path: Path, begun: float) -> None:
    """Compares a file that the Hub's client has just written with its sha256, by which its cache names large files.

    Raises: OSError: it is another; it is removed.
    """
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name) or blob.stat().st_mtime < begun - 1:
        return
    with blob.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != blob.name:
        path.unlink(missing_ok=True)
        blob.unlink()
        raise OSError(f"{path.name} came with the sha256 {digest}, but the Hub has {blob.name}; download it again")


def repository_of(source: str) -> str | None:
    """owner/name of the Hub where a source is, as provenance tells of it; None if it is elsewhere."""
    where = source.removeprefix("hf://").partition("@")[0]
    if source.startswith("hf://"):
        where = "/".join(where.split("/")[:2])
    return where if REPOSITORY.fullmatch(where) else None


@contextmanager
def hub_calls(what: str) -> Iterator[None]:
    """Calls of the Hub's client: they do not wait for ever, and what they raise becomes one sentence.

    Args:
        what: how the sentence begins.
    Raises: HubError.
    """
    from huggingface_hub import get_session
    from huggingface_hub.errors import EntryNotFoundError

    def impatient(request: Any) -> None:
        limits = request.extensions["timeout"]
        request.extensions["timeout"] = {part: limit or PATIENCE for part, limit in limits.items()}

    session = get_session()
    before = session.event_hooks
    session.event_hooks = before | {"request": [*before["request"], impatient]}  # the client's own default is for ever
    try:
        yield
    except (_http_error(), EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{what}: {_reason(error)}.") from error
    finally:
        session.event_hooks = before


def _reason(error: BaseException) -> str:
    """Why a call of the Hub's client failed, and what to do."""
    from huggingface_hub import errors

    lines = str(error).strip().splitlines() or [type(error).__name__]
    first, cause = lines[0].rstrip("."), error.__cause__  # the Hub's own text runs over many lines
    match error:
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set; unset it"
        case errors.LocalEntryNotFoundError():
            return f"{_reason(cause)}, and there is no copy of it here" if cause else first
        case errors.RevisionNotFoundError():
            return "it has no such revision; name a branch, a tag or a commit of it"
        case errors.GatedRepoError():
            return "its owners want to be asked first; ask them on its page"
        case errors.HfHubHTTPError():
            status, said = error.response.status_code, (error.server_message or "").strip().splitlines()
            reason = REASONS.get(status, first)
            if status >= 500:
                reason = f"the Hub has a fault of its own ({status}); give the same command again later"
            return f"{reason} (the Hub says: {said[0].rstrip('.')})" if said else reason
        case RuntimeError() if cause is not None:  # of the thread that sends a file
            return _reason(cause)
    if isinstance(error, _http_error()):
        return f"the Hub cannot be reached ({first}); look at the network, and give the same command again"
    return " ".join(lines).rstrip(".")


def _http_error() -> type[Exception]:
    """The base of what the Hub's client raises by itself: httpx's or httpx2's, by its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast(type[Exception], HfHubHTTPError.__bases__[0])
