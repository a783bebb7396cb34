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
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from tqdm import tqdm

from edmdistill.checkpoints.aside import aside
from edmdistill.errors import CheckpointError, HubError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""owner/name, as the Hub writes it."""


def resolve(source: str | Path) -> Path:
    """The local file or folder that `source` names, downloaded first where it is not here.

    Args:
        source: a path; http(s)://...; hf://owner/name/file@revision (a file of the Hub); owner/name or
            hf://owner/name@revision (a checkpoint of ours on the Hub). A path that exists comes before a repository.
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
    # `teachers/edm2-s` with a folder `teachers` is a slip of the pen, not a repository.
    if isinstance(source, str) and REPOSITORY.fullmatch(text) and not path.parent.is_dir():
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
    with aside(target) as new:
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
    from huggingface_hub.errors import EntryNotFoundError

    where, _, revision = text.partition("@")
    owner, _, rest = where.partition("/")
    name, _, file = rest.partition("/")
    repository = f"{owner}/{name}"
    if not REPOSITORY.fullmatch(repository):
        raise CheckpointError(f"hf://{text} names no repository of the Hub: write hf://owner/name/file@revision.")
    try:
        if file:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        files = ["config.json", "model.safetensors", "README.md"]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except (OSError, ValueError, EntryNotFoundError) as error:
        # The Hub's own text runs over many lines; its first says what is wrong.
        raise HubError(f"{text} cannot be had from the Hub: {str(error).strip().splitlines()[0]}") from error
