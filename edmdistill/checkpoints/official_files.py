"""The table of official files: feature networks by name, with their addresses and digests.

Each address is one that the official code itself downloads from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edmdistill.checkpoints.download import cached


@dataclass(frozen=True)
class OfficialFile:
    """A file that its authors publish.

    Attributes:
        name: as `edmdistill fetch` has it.
        kind: what it is: inception, dinov2.
        url: where it is downloaded from.
        licence: an SPDX identifier, in lower case.
        sha256: None = not known here.
        size: in bytes; None = not known here.
    """

    name: str
    kind: str
    url: str
    licence: str
    sha256: str | None = None
    size: int | None = None

    @property
    def cached(self) -> Path | None:
        """The downloaded file; None = it is not downloaded."""
        path = cached(self.url)
        return path if path.is_file() else None


OFFICIAL_FILES = (
    OfficialFile(
        "inception",
        "inception",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "cc-by-nc-4.0",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        95_607_719,
    ),
    OfficialFile(
        "inception-pytorch-fid",
        "inception",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "apache-2.0",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    OfficialFile(
        "dinov2",
        "dinov2",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "apache-2.0",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        1_217_586_395,
    ),
)


def official_files(kind: str) -> list[OfficialFile]:
    """Returns the official files of a kind."""
    return [file for file in OFFICIAL_FILES if file.kind == kind]
