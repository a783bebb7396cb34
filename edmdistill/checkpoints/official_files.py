"""Official files by name: teachers, references, feature networks, the VAE.

assets/official-files.toml is the table; a file is downloaded once into the cache, and checked by its sha256.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from edmdistill.atomic import atomic_write, sha256_file
from edmdistill.checkpoints.download import cached, download, remove_cached
from edmdistill.checkpoints.hub_client import cached_from_hub, download_from_hub
from edmdistill.checkpoints.layout import VAE_FILES
from edmdistill.errors import CheckpointError, did_you_mean

TABLE = Path(__file__).parents[1] / "assets" / "official-files.toml"
HUB = "hf://"


@dataclass(frozen=True)
class OfficialFile:
    """A file that its authors publish.

    Attributes:
        kind: teacher, reference, inception, dinov2 or vae.
        about: what it is.
        url: where it is downloaded from; hf://owner/name is a repository of the Hub.
        licence: an identifier of the Hub, or a name.
        page: the public page that names it.
        sha256: None = not known here; the digest of the first download is then kept beside the file.
        size: in bytes; None = not known here.
    """

    name: str
    kind: str
    about: str
    url: str
    licence: str
    page: str
    sha256: str | None = None
    size: int | None = None

    @property
    def cached(self) -> Path | None:
        """The downloaded file, or the folder of a repository; None = it is not downloaded."""
        if self.url.startswith(HUB):
            return cached_from_hub(self.url.removeprefix(HUB), VAE_FILES)
        path = cached(self.url)
        return path if path.is_file() else None


@dataclass(frozen=True)
class Preset:
    """Networks that belong together, as EDM2's generate_images.py names them, and the result that it states.

    Attributes:
        net, guide: names of teachers; guide None = not guided.
        guidance: the weight of guidance.
        metric, value: the result: fid or fd_dinov2.
    """

    net: str
    metric: str
    value: float
    guide: str | None = None
    guidance: float = 1.0


@dataclass(frozen=True)
class Fetched:
    """A file in the cache.

    Attributes:
        path: of the file, or of the folder of a repository.
        sha256: of the file that holds the weights or the numbers.
        new: whether it was downloaded just now.
    """

    file: OfficialFile
    path: Path
    sha256: str
    new: bool

    def __str__(self) -> str:
        known = "the published file" if self.file.sha256 else "no published digest is known, so this one is kept"
        return f"{self.file.name}: {self.path} (sha256 {self.sha256}: {known}; licence {self.file.licence})"


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


@cache
def official_files() -> dict[str, OfficialFile]:
    """Returns all official files by name."""
    files = {}
    for group in _table()["group"]:
        stems = (group.get("prefix", "") + file.rpartition(".")[0] for file in group["files"])
        for name, file in zip(group.get("names") or stems, group["files"], strict=True):
            shared = _table()["facts"].get(name, {})
            fields = {key: group[key] for key in ("kind", "about", "licence", "page")}
            files[name] = OfficialFile(name=name, url=group["url"] + file, **fields, **shared)
    return files


@cache
def presets() -> dict[str, Preset]:
    """Returns EDM2's presets by name."""
    by_name = {}
    for name, preset in _table()["presets"].items():
        metric = next(metric for metric in ("fid", "fd_dinov2") if metric in preset)
        networks = {key: preset[key] for key in ("net", "guide", "guidance") if key in preset}
        by_name[name] = Preset(metric=metric, value=preset[metric], **networks)
    return by_name


def published_result(name: str) -> dict[str, float]:
    """Returns what EDM's example.py states of a network: fid, nfe; empty where it states nothing."""
    return dict(_table()["results"].get(name, {}))


def files_of(kind: str) -> list[OfficialFile]:
    """Returns the official files of a kind, the preferred one first."""
    return [file for file in official_files().values() if file.kind == kind]


def find_official(name: str) -> list[OfficialFile]:
    """Returns the files of a name: of a file, or of a preset, whose guide comes second.

    Raises: CheckpointError: there is no such file.
    """
    if preset := presets().get(name):
        return [official_files()[one] for one in (preset.net, preset.guide) if one]
    if name not in official_files():
        known = [*official_files(), *presets()]
        raise CheckpointError(
            f"there is no official file {name!r}: {did_you_mean(name, known, more='edmdistill fetch list')}"
        )
    return [official_files()[name]]


def is_official(name: str) -> bool:
    """Returns whether an official file or a preset has this name."""
    return name in official_files() or name in presets()


def find_fetched(name: str) -> Path:
    """Returns an official file in the cache, downloaded first if need be.

    Raises: CheckpointError: there is no such file, it cannot be downloaded, or it is a network and its guide, which are
        two. HubError: the Hub refuses.
    """
    file, *guide = find_official(name)
    if guide:
        options = f"--guide {guide[0].name} --guidance {presets()[name].guidance:g}"
        raise CheckpointError(f"{name} is a network with its guide: give {file.name}, and {options} to sample it")
    return file.cached or fetch(file).path


def fetch(file: OfficialFile) -> Fetched:
    """Returns a file from the cache, downloaded first if need be, after a check of its sha256.

    Raises: CheckpointError: it cannot be downloaded, or is another than the official file, or than it was at first; it
        is then removed.  HubError: the Hub refuses.
    """
    new = file.cached is None
    if file.url.startswith(HUB):
        path = file.cached or download_from_hub(file.url.removeprefix(HUB), VAE_FILES)
        weights = path / VAE_FILES[1]
    else:
        path = weights = download(file.url)
    digest, record = sha256_file(weights), weights.with_name(f"{weights.name}.sha256")
    expected = file.sha256 or (record.read_text().strip() if record.is_file() else None)
    if expected not in (None, digest):
        remove_cached(weights)
        what = "the official file has" if file.sha256 else "it had when it was first downloaded"
        changed = "" if file.sha256 else f", or delete {record} first if its publisher has changed it"
        raise CheckpointError(
            f"{weights} has the sha256 {digest}, not the {expected} that {what}: it is removed; run "
            f"`edmdistill fetch {file.name}` again{changed}"
        )
    if expected is None:
        with atomic_write(record) as unfinished:
            unfinished.write_text(f"{digest}\n")
    return Fetched(file, path, digest, new)


def documents() -> dict[str, Any]:
    """Returns all files and presets, for JSON."""
    files = [asdict(file) | {"cached": str(file.cached) if file.cached else None} for file in official_files().values()]
    return {"files": files, "presets": {name: asdict(preset) for name, preset in presets().items()}}


def to_text() -> str:
    """Returns a list of all files and presets: name, size, licence, and whether the cache has it."""
    lines = []
    width = max(map(len, [*official_files(), *presets()]))
    for about, group in groupby(official_files().values(), key=lambda file: file.about):
        files = list(group)
        lines.append(f"{about} ({files[0].kind}, {files[0].licence}, {files[0].page}):")
        for file in files:
            size = f"{file.size / 2**20:,.0f} MiB" if file.size else ""
            lines.append(f"  {file.name:<{width}}  {size:>10}  {'in the cache' if file.cached else ''}".rstrip())
    lines.append("Presets of EDM2, each a network with its guide, and NVIDIA's result:")
    for name, preset in presets().items():
        guide = f", guided {preset.guidance:g} by {preset.guide}" if preset.guide else ""
        lines.append(f"  {name:<{width}}  {preset.metric} {preset.value:g}: {preset.net}{guide}")
    return "\n".join([*lines, _table()["snapshots"]])
