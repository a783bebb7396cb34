"""Checkpoints as a user names them: a path, a URL, an official file, a repository of the Hub, all resolved to a path.

Only what the user names by a URL, a Hub id or the name of an official file is downloaded.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from edmdistill.atomic import expanded, require_no_pipe, sha256_file
from edmdistill.checkpoints.download import download
from edmdistill.checkpoints.hub_client import REPOSITORY, download_from_hub
from edmdistill.checkpoints.layout import CONFIG, MODEL, checkpoint_in, is_state
from edmdistill.checkpoints.nvidia import OfficialCheckpoint, read_official
from edmdistill.checkpoints.official_files import find_fetched, is_official, official_files, presets
from edmdistill.embedded import EMBEDDED
from edmdistill.errors import CheckpointError, public_address, without_secrets


@dataclass(frozen=True)
class Source:
    """A checkpoint that a user names, resolved once; what is read or hashed of it is kept here.

    Attributes:
        text: as the user named it.
        path: the local file or folder.
    """

    text: str
    path: Path

    def __str__(self) -> str:
        return self.text

    @property
    def exact(self) -> str:
        """Its name for the record: of what came from the Hub with the commit, because a branch moves on."""
        named = re.fullmatch(r"((?:hf://)?[^@?#:]+)(@[^@?#]*)?", self.text)
        commit = re.search(r"/snapshots/([0-9a-f]{40})(?=/|$)", self.path.as_posix())
        return f"{named[1]}@{commit[1]}" if named and commit and not Path(self.text).exists() else self.text

    @cached_property
    def is_archive(self) -> bool:
        """Returns whether the file is an archive of torch.save, as OpenAI's files are and NVIDIA's never are."""
        return zipfile.is_zipfile(self.path)

    @cached_property
    def official(self) -> OfficialCheckpoint:
        """The content of NVIDIA's pickle.  Raises: CheckpointError: it is another file, or damaged."""
        return read_official(self.path)

    @cached_property
    def sha256(self) -> str:
        """The digest of the file that holds the weights.  Raises: CheckpointError, OSError: it cannot be read."""
        path = self.path
        if is_state(path):
            generator = path / "generator.safetensors"
            return sha256_file(generator if generator.exists() else path / "teacher.safetensors")
        if path.is_dir():
            return sha256_file(checkpoint_in(path) / MODEL)
        return sha256_file(path) if self.is_archive else self.official.sha256


def open_source(source: str | Path | Source) -> Source:
    """Returns the checkpoint that a user names, downloaded first if need be; see `resolve`.

    Raises: CheckpointError: no such path or URL.  HubError: the Hub has no such thing, or cannot be reached.
    """
    return source if isinstance(source, Source) else Source(str(source), resolve(source))


def resolve(source: str | Path) -> Path:
    """Returns the local file or folder that `source` names, downloaded first if need be.

    Args:
        source: a path; http(s)://...; hf://owner/name/file@revision (a file of the Hub); owner/name or
            owner/name@revision, with hf:// or without (a checkpoint of ours on the Hub); a key of EMBEDDED, digits or
            tiles, whose teachers come with the package; the name of an official file, as in `edmdistill fetch list`. An
            existing path takes precedence; a revision is a branch, a tag or a commit.
    Raises: CheckpointError: no such path or URL.  HubError: the Hub has no such thing, or cannot be reached.
    """
    text = str(source)
    scheme = _scheme(text)
    if scheme in ("http", "https"):
        return download(text)
    if scheme == "hf":
        return download_from_hub(text[len("hf://") :])
    if scheme:
        raise CheckpointError(f"{public_address(text)} cannot be downloaded: use an http, https or hf address")
    path = expanded(source)
    for file in (path, path / CONFIG, path / MODEL):
        require_no_pipe(file)
    if path.exists():
        return path
    if text in EMBEDDED:
        return EMBEDDED[text].teacher
    if is_official(text):
        return find_fetched(text)
    # `teachers/edm2-s` with a folder `teachers` is a typing error, not a repository.
    if isinstance(source, str) and REPOSITORY.fullmatch(text.partition("@")[0]) and not path.parent.is_dir():
        return download_from_hub(text)
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else "give a path, a URL or a Hub repository owner/name."
    if not near and (official := get_close_matches(text, [*official_files(), *presets()], n=1, cutoff=0.8)):
        hint = f"did you mean the official file {official[0]}?"
    raise CheckpointError(f"{path} does not exist: {hint}")


def _scheme(text: str) -> str:
    """Returns the scheme of an address, in lower case; empty for a path."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+(?=:/)", text)
    return scheme[0].lower() if scheme else ""


def source_name(source: str | Path | Source) -> str:
    """Returns the name in provenance: scheme, host and path of a URL, a Hub id, or the last name in a path."""
    text = str(source)
    if _scheme(text):
        return public_address(text)
    path = expanded(text)
    if not path.exists() and text in EMBEDDED:
        return EMBEDDED[text].teacher.name
    return path.resolve().name if path.exists() else text


def file_digest(source: str | Path) -> str:
    """Returns the sha256 of a file, or `source` itself, without secrets, where it names no file."""
    path = Path(source)
    return sha256_file(path) if path.is_file() else without_secrets(str(source))


def repository_of(source: str) -> str | None:
    """Returns owner/name of the Hub's repository that provenance names; None if the source is elsewhere."""
    where = source.removeprefix("hf://").partition("@")[0]
    if source.startswith("hf://"):
        where = "/".join(where.split("/")[:2])
    return where if REPOSITORY.fullmatch(where) else None
