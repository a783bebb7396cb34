"""Downloads by http(s), kept in a cache: whole or not at all, whatever the server does."""

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
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit, urlunsplit

from edmdistill.atomic import atomic_write, unwritable
from edmdistill.errors import INTACT, CheckpointError, Damaged, public_address
from edmdistill.progress import progress_bar

SILENCE = 60.0
"""Seconds without data after which a server is given up."""
SLOWEST = 1024
"""Bytes per second; a server that is slower over SILENCE seconds is given up."""


def cache_folder() -> Path:
    """Returns the folder of downloads: $EDMDISTILL_CACHE, else edmdistill in the user's cache folder.

    Raises: CheckpointError: there is no home folder for it.
    """
    folder = os.environ.get("EDMDISTILL_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/edmdistill"
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"there is no home folder for the cache {folder}: set EDMDISTILL_CACHE") from error


def in_writable_folder(path: Path) -> Path:
    """Returns a path in the cache, whose folder it makes.  Raises: CheckpointError: nothing may be written there."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refusal = "it is read-only" if unwritable(path) else None
    except OSError as error:
        refusal = error.strerror
    if refusal is not None:
        raise CheckpointError(
            f"the cache {folder} cannot be written ({refusal}): set EDMDISTILL_CACHE to a folder that can"
        )
    return path


def cached(url: str) -> Path:
    """Returns the path in the cache that `download` gives the file at a URL, whether it is there or not."""
    # Each URL has its own folder, so that the file keeps its name, which says what it is.
    return cache_folder() / hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()[:16] / _file_name(url)


def download(url: str) -> Path:
    """Returns the file at an http(s) URL, from the cache if it is there.  A failed download leaves nothing.

    Raises: CheckpointError: it cannot be downloaded.
    """
    target = cached(url)
    if target.exists():
        return target
    with atomic_write(in_writable_folder(target)) as new:
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
                reason = "this is not a valid address"  # the error repeats it, and it may hold secrets
            elif isinstance(error, urllib.error.URLError):
                reason = f"{reason}; check the network, or give the path of a copy to the command that reads it"
            raise CheckpointError(f"{public_address(url)} cannot be downloaded: {reason}") from None
        if redirects.sha256 not in (None, digest):
            raise CheckpointError(
                f"{public_address(url)} came with the sha256 {digest}, but the Hub has {redirects.sha256}: "
                "download it again"
            )
    return target


def _file_name(url: str) -> str:
    """Returns the last name in a URL's path, made valid for every file system."""
    last = PurePosixPath(unquote(re.split("[?#;]", url)[0].rstrip("/"))).name
    name = re.sub(r"[^\w.+=-]", "_", last, flags=re.ASCII).strip(".")[-100:] or "download"
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name)  # on Windows
    return f"_{name}" if reserved else name


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and keeps the sha256 that the Hub states with a redirect."""

    sha256: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(("http://", "https://")):
            fp.close()
            raise urllib.error.URLError("the server redirects to an address that is not http or https")
        linked = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag") or "")
        self.sha256 = linked[1] if linked else self.sha256
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, redirects: _Redirects) -> Any:
    """Returns the response to a GET request.

    Raises: TimeoutError: it does not begin in time; OSError, HTTPException ...: it fails.
    """
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host, fragment="")))
    if at:  # not to be sent to wherever the server redirects
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

    # A server may send its headers a byte at a time, and every byte restarts the socket's own timeout.
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

    Raises: OSError, ValueError: it is truncated, too slow, or larger than the disk.
    """
    length = response.headers.get("Content-Length") or ""
    size = int(length) if re.fullmatch(r"\d{1,18}", length) else None
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


def remove_cached(path: Path) -> None:
    """Removes a file from a cache; of a link, as in the Hub's, what it leads to as well, which would be used again."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


@contextmanager
def downloaded(path: Path, again: str = "so give the same command again") -> Iterator[None]:
    """Wraps the reading of a file: one from a cache that cannot be read is removed, so that it is downloaded again.

    Args:
        again: how, as the end of a sentence.
    Raises: CheckpointError: that of the block, which then says that the file was removed.
    """
    try:
        yield
    except CheckpointError as error:
        from huggingface_hub import constants

        parents = path.absolute().parents
        if any(Path(folder).absolute() in parents for folder in (cache_folder(), constants.HF_HUB_CACHE)):
            remove_cached(path)
            fault = error.fault if isinstance(error, Damaged) else str(error).rstrip(".").removesuffix(f"; {INTACT}")
            raise Damaged(fault, f"it is removed from the cache, {again}") from error
        raise
