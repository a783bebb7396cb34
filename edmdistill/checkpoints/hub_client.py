"""Downloads from the Hugging Face Hub by its client, whose refusals become one sentence each."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.layout import CARD, CONFIG, MODEL
from edmdistill.errors import CheckpointError, HubError
from edmdistill.progress import bar_class

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""owner/name, as the Hub writes it."""
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


def download_from_hub(text: str) -> Path:
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
        files = [CONFIG, MODEL, CARD]
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
    digest = sha256_file(blob)
    if digest != blob.name:
        path.unlink(missing_ok=True)
        blob.unlink()
        raise OSError(f"{path.name} came with the sha256 {digest}, but the Hub has {blob.name}; download it again")


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
