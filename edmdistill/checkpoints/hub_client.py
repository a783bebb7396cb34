"""Downloads from the Hugging Face Hub by its client, whose errors become one sentence each."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.download import remove_cached
from edmdistill.checkpoints.layout import CARD, CONFIG, MODEL
from edmdistill.errors import CheckpointError, HubError, HubUnreachable
from edmdistill.progress import bar_class

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""owner/name of a repository on the Hub."""
TIMEOUT = 120.0
"""Seconds without an answer after which the Hub counts as unreachable."""
REASONS = {
    401: "you are not logged in to the Hub; log in with `hf auth login`, or set HF_TOKEN to a valid token",
    403: "your token does not allow it; create one with the right permissions at https://huggingface.co/settings/tokens",
    404: "there is no such repository, or it is private; check the name, or log in with `hf auth login`",
    409: "another change is in progress there; try again in a minute",
    412: "someone else has changed it in the meantime; run the same command again",
    413: "the Hub does not accept files of that size",
    429: "you have sent too many requests to the Hub; wait a while",
}
"""The meaning of the Hub's status codes to a user."""

FULL = errno.ENOSPC, errno.EDQUOT
UNWRITABLE = errno.EROFS, errno.EACCES, errno.EPERM
COPY = ", or give the path of a copy to the command that reads it"
"""What else helps where the Hub cannot be reached."""


def cached_from_hub(text: str, files: Sequence[str]) -> Path | None:
    """Returns the folder of these files of a repository, owner/name@revision, if the cache has all of them."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = text.partition("@")
    try:
        paths = [try_to_load_from_cache(repository, file, revision=revision or None) for file in files]
    except HFValidationError:  # a name that the Hub does not take, such as owner/a--b
        return None
    return Path(paths[0]).parent if all(isinstance(path, str) for path in paths) else None  # type: ignore[arg-type]


def download_from_hub(text: str, files: Sequence[str] = (CONFIG, MODEL, CARD)) -> Path:
    """Returns a file (owner/name/file@revision) or the folder of a repository (owner/name@revision) of the Hub.

    Args:
        files: of a repository; by default, a checkpoint of ours.
    Raises: CheckpointError: the text names no repository.  HubError: the Hub refuses.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download

    text = re.sub(r"^[^/]*@|[?#].*", "", text)  # a user or a token: the client has its own
    where, _, revision = text.partition("@")
    owner, _, rest = where.partition("/")
    name, _, file = rest.partition("/")
    repository = f"{owner}/{name}"
    if not REPOSITORY.fullmatch(repository):
        raise CheckpointError(f"hf://{text} is not a repository of the Hub: write hf://owner/name/file@revision")
    with hub_calls(f"{text} cannot be downloaded from the Hub", instead=COPY):
        begun, bar = time.time(), bar_class()
        if file:
            if cached_from_hub(f"{repository}@{revision}", [file]) is None:
                # Where the Hub cannot be reached, this fails at once; the download would try for 24 seconds.
                get_hf_file_metadata(hf_hub_url(repository, file, revision=revision or None))
            path = Path(hf_hub_download(repository, file, revision=revision or None, tqdm_class=bar))
            _require_whole(path, begun)
            return path
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=list(files), tqdm_class=bar)
        path = Path(folder)
        for name in files:
            _require_whole(path / name, begun)
        return path


def _require_whole(path: Path, begun: float) -> None:
    """Checks a file that the Hub's client has just written against its sha256, which is its name in the cache.

    Raises: OSError: they differ; the file is removed.
    """
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name) or blob.stat().st_mtime < begun - 1:
        return
    digest = sha256_file(blob)
    if digest != blob.name:
        remove_cached(path)
        raise OSError(f"{path.name} came with the sha256 {digest}, but the Hub has {blob.name}; download it again")


@contextmanager
def hub_calls(what: str, *, instead: str = "", temporary: bool = False) -> Iterator[None]:
    """Wraps calls of the Hub's client: they time out, and what they raise becomes one sentence.

    Args:
        what: the beginning of the sentence.
        instead: its end where the Hub cannot be reached: another way out.
        temporary: files go to a temporary folder, and not to the Hub's cache.
    Raises: HubError: a call fails.  HubUnreachable: the Hub does not answer, or not as it should.
    """
    from huggingface_hub import get_session
    from huggingface_hub.errors import EntryNotFoundError

    def limit_time(request: Any) -> None:
        limits = request.extensions["timeout"]
        request.extensions["timeout"] = {part: limit or TIMEOUT for part, limit in limits.items()}

    session = get_session()
    before = session.event_hooks
    session.event_hooks = before | {"request": [*before["request"], limit_time]}  # the client's own default is no limit
    try:
        yield
    except (_http_error(), EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        reason = _reason(error, instead)
        if isinstance(error, OSError) and error.errno in (*FULL, *UNWRITABLE):
            reason = _refused(error.errno, temporary)
        raise (HubUnreachable if _unreachable(error) else HubError)(f"{what}: {reason}") from error
    finally:
        session.event_hooks = before


def _reason(error: BaseException, instead: str = "") -> str:
    """Returns why a call of the Hub's client failed, and what to do; instead: as for `hub_calls`."""
    from huggingface_hub import errors

    lines = str(error).strip().splitlines() or [type(error).__name__]
    first, cause = lines[0].rstrip("."), error.__cause__  # the Hub's own text runs over many lines
    match error:
        case errors.OfflineModeIsEnabled():
            return f"HF_HUB_OFFLINE is set; unset it{instead}"
        case errors.LocalEntryNotFoundError():
            return f"there is no copy of it here, and {_reason(cause, instead)}" if cause else first
        case errors.EntryNotFoundError():
            return "it has no such file; check the file's name"
        case errors.RevisionNotFoundError():
            return "it has no such revision; give a branch, a tag or a commit of it"
        case errors.GatedRepoError():
            return "access to it is gated; request it on its page"
        case errors.HfHubHTTPError():
            status, answer = error.response.status_code, (error.server_message or "").strip().splitlines()
            if isinstance(error, errors.RepositoryNotFoundError):
                status = 404  # the Hub says 401 to those who are not logged in
            reason = REASONS.get(status, first)
            if status >= 500:
                reason = f"the Hub has an internal error ({status}); run the same command again later"
            return f"{reason} (the Hub says: {answer[0].rstrip('.')})" if answer else reason
        case RuntimeError() if cause is not None:  # from the thread that uploads a file
            return _reason(cause, instead)
    if isinstance(error, _http_error()):
        return f"the Hub cannot be reached ({first}); check the network and run the same command again{instead}"
    return " ".join(lines).rstrip(".")


def _unreachable(error: BaseException) -> bool:
    """Returns whether an error of the Hub's client says nothing of the request, which another time may succeed."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return bool(error.response.status_code >= 500)
    return isinstance(error, (errors.OfflineModeIsEnabled, _http_error()))


def _refused(number: int, temporary: bool) -> str:
    """Returns why nothing can be written where files go, and what to do.  number: the system's error"""
    from huggingface_hub import constants

    folder, variable = (tempfile.gettempdir(), "TMPDIR") if temporary else (constants.HF_HUB_CACHE, "HF_HOME")
    what = "temporary folder" if temporary else "cache"
    fix = "free some of its disk, or set" if number in FULL else "set"
    other = "a folder on another" if number in FULL else "a folder that can be"
    return f"its {what} {folder} cannot be written ({os.strerror(number)}); {fix} {variable} to {other}"


def _http_error() -> type[Exception]:
    """Returns the base class of the client's own errors: httpx's or httpx2's, by its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast(type[Exception], HfHubHTTPError.__bases__[0])
