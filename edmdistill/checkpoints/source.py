"""Where a checkpoint comes from: a path, a URL, a file on the Hub or a repository of the Hub, all turned into a path.

The network is used for what the user names as being there, and for nothing else.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import unquote

from tqdm import tqdm

from edmdistill.atomic import atomic_write
from edmdistill.errors import CheckpointError, HubError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""owner/name, as the Hub writes it."""
SHIPPED = {"digits": Path(__file__).parent.parent / "assets" / "digits-teacher.pkl"}
"""Checkpoints that come with the package, by a word; a file or folder of that name comes before."""
PATIENCE = 120.0
"""Seconds of silence after which the Hub counts as out of reach."""
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
    if text.startswith(("http://", "https://")):
        return _download(text)
    if text.startswith("hf://"):
        return _hub(text.removeprefix("hf://"))
    path = Path(source).expanduser()
    if path.exists():
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


def name_of(source: str | Path) -> str:
    """What provenance says of a source: a URL or a Hub id whole, of a path the last name only."""
    text = str(source)
    if text.startswith(("http://", "https://", "hf://")):
        return text
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
    name = PurePosixPath(unquote(url.partition("?")[0])).name.strip(".") or "download"
    # A folder for each URL keeps the file's own name, which says what it is (and .pkl or .pt).
    target = _cache() / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    if target.exists():
        return target
    with atomic_write(target) as new:
        try:
            with urllib.request.urlopen(url, timeout=60) as response, new.open("wb") as file:
                if response.headers.get_content_type() == "text/html":
                    raise ValueError("it is a web page, not a file")
                size = int(response.headers.get("Content-Length") or 0)
                with tqdm(total=size or None, desc=name, unit="B", unit_scale=True, disable=None) as bar:
                    while chunk := response.read(1 << 20):
                        file.write(chunk)
                        bar.update(len(chunk))
                if size and file.tell() != size:
                    raise OSError(f"it ended after {file.tell()} of {size} bytes")
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                reason = f"the server says {error.code} {error.reason}"
            raise CheckpointError(f"{url} cannot be downloaded: {reason}.") from error
    return target


def _hub(text: str) -> Path:
    """A file (owner/name/file@revision) or a checkpoint of ours (owner/name@revision) from the Hugging Face Hub."""
    from huggingface_hub import hf_hub_download, snapshot_download

    where, _, revision = text.partition("@")
    owner, _, rest = where.partition("/")
    name, _, file = rest.partition("/")
    repository = f"{owner}/{name}"
    if not REPOSITORY.fullmatch(repository):
        raise CheckpointError(f"hf://{text} names no repository of the Hub: write hf://owner/name/file@revision.")
    with hub_calls(f"{text} cannot be had from the Hub"):
        if file:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        files = ["config.json", "model.safetensors", "README.md"]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))


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
