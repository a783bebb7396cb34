"""Protocols: everything that moves a metric besides the images. Two results compare only where these are equal."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from edmdistill.checkpoints.official_files import find_fetched, is_official
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.embedded import EMBEDDED
from edmdistill.errors import DatasetError, EdmDistillError, did_you_mean
from edmdistill.evaluation.images import LabelSource
from edmdistill.evaluation.references import ReferenceStatistics, is_statistics, open_statistics


class Reference(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The real images, by file name. The measurement adds their number, and the sha256 of their size and pixels."""

    source: str
    split: str = "train"
    n: int | None = None
    sha256: str | None = None
    kept: int | UnsetType = UNSET
    """The number of images whose features metrics such as precision compare with, where they are fewer than n."""


class Likelihood(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a likelihood is computed, see evaluation.likelihood."""

    probes: int
    tolerance: float
    """The solver's tolerance, relative and absolute."""
    sigma_min: float
    sigma_max: float
    rho: float = 7.0
    """The solver's time is sigma^(1/rho)."""
    solver: Literal["rk45"] = "rk45"
    steps: Literal["by image"] = "by image"
    divergence: Literal["Rademacher, fixed"] = "Rademacher, fixed"
    prior: Literal["N(0, sigma_max^2)"] = "N(0, sigma_max^2)"
    dequantisation: Literal["uniform, centred"] = "uniform, centred"


class Protocol(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A standard, as in PROTOCOLS; in a result, the standard with the number of images and all hashes filled in.

    A field that is None does not affect the measurement.
    """

    name: str
    metrics: tuple[str, ...]
    """See metrics.find_metric."""
    features: str | None
    """The feature space of metrics that name none; a key of FEATURE_SPACES."""
    weights: dict[str, str | None] = {}
    """The feature spaces that were used, and the sha256 of their weights."""
    reference: Reference | None = None
    """In a standard, None allows any."""
    n: int = 50_000
    seeds: str | None = "0-49999"
    """None: unknown, or nothing is sampled."""
    repeat: int = 1
    """The metrics are means over so many times n images, of consecutive seeds."""
    labels: LabelSource = "drawn"
    """See Images.label_source."""
    uint8: str | None = "clip(127.5 x + 128, 0, 255), cut"
    """How a network's pixels are rounded; latents are decoded."""
    decoder: str | None = None
    """The sha256 of the VAE that decoded latents."""
    covariance: Literal["unbiased"] | None = "unbiased"
    """Divided by n - 1, as numpy.cov does."""
    likelihood: Likelihood | UnsetType = UNSET
    """Absent unless a likelihood is computed."""

    def sha256(self) -> str:
        """Returns the hash of every field above: equal for results that may be compared."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        *(
            Protocol(
                name=name,
                metrics=(f"fd_{name}", "class_accuracy"),
                features=name,
                reference=Reference(source=name),
                n=5000,
                seeds="0-4999",
                labels="balanced",
            )
            for name in EMBEDDED
        ),
        Protocol(name="pixels", metrics=("fd_pixels",), features="pixels", n=5000, seeds="0-4999", labels="balanced"),
        Protocol(name="edm", metrics=("fid",), features="inception"),
        Protocol(name="edm2", metrics=("fid", "fd_dinov2"), features="inception"),
        Protocol(
            name="adm",
            metrics=("fid", "is", "precision_inception", "recall_inception"),
            features="inception",
        ),
        Protocol(name="cosim", metrics=("fid", "fd_dinov2"), features="inception"),
    )
}
"""The standards by name.

| protocol | metrics | reference | as in |
|---|---|---|---|
| edm | FID | the training set, or EDM's .npz of it | NVlabs/edm, generate.py and fid.py |
| edm2 | FID, FD-DINOv2 | the training set, or EDM2's .pkl of it | NVlabs/edm2, calculate_metrics.py |
| adm | FID, IS, precision, recall | ADM's reference batch, .npz | openai/guided-diffusion, evaluator.py |
| cosim | FID, FD-DINOv2 | the training set | CoSIM, section 5 |

All of them measure 50,000 images of seeds 0-49999; the class of an image is drawn from its seed's stream, after the
noise. Guidance is part of the sampler, and in the results. Features are those of `inception` (NVIDIA's translation of
FID's network, and TensorFlow's resizing) and `dinov2` (torch's antialiased bicubic resizing), for gray images too.

Differs: EDM and EDM2 draw noise and classes on the GPU, from streams that give other numbers than ours, which are the
    same on all devices. EDM publishes the minimum of three measurements, of seeds 0-49999, 50000-99999 and
    100000-149999. ADM uses TensorFlow and half-precision distances, and draws from one stream.
"""

REFERENCES = {
    "edm": "the training set, or EDM's statistics of it (.npz)",
    "edm2": "the training set, or EDM2's statistics of it (.pkl)",
    "adm": "ADM's reference batch (.npz)",
    "cosim": "the training set",
}
"""The references of a protocol's publications, for errors."""


def get_protocol(name: str) -> Protocol:
    """Returns the standard of that name.  Raises EdmDistillError if there is none."""
    if name not in PROTOCOLS:
        raise EdmDistillError(f"there is no protocol {name!r}; {did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def open_reference(
    reference: Dataset | ReferenceStatistics | str | Path | None, standard: Protocol
) -> Dataset | ReferenceStatistics:
    """Returns the real images to measure against, or the statistics of them.

    Args:
        reference: a data set, or statistics; or a source for open_dataset or open_statistics, or the name of an
            official reference, as in `edmdistill fetch list`; None: the standard's own.
    Raises: DatasetError: it cannot be opened, is not the one that the standard asks for, or none was named.
    """
    fixed = standard.reference
    if reference is None:
        if fixed is None:
            usual = REFERENCES.get(standard.name, "a data set")
            raise DatasetError(f"the protocol {standard.name} measures against {usual}: name it with --ref")
        return open_dataset(fixed.source, split=fixed.split)
    if isinstance(reference, str | Path):
        if is_official(str(reference)) and not Path(reference).exists():
            reference = find_fetched(str(reference))
        reference = open_statistics(reference) if is_statistics(reference) else open_dataset(reference)
    if isinstance(reference, Dataset):
        reference.require_pixels()
    described = describe_reference(reference)
    if fixed is not None and (described.source, described.split) != (fixed.source, fixed.split):
        raise DatasetError(
            f"the protocol {standard.name} measures against {fixed.source} ({fixed.split}), but the reference is "
            f"{described.source} ({described.split}); leave it out, or choose another protocol"
        )
    return reference


def describe_reference(reference: Dataset | ReferenceStatistics) -> Reference:
    """Returns the record of a reference; that of a data set without the sha256 of its pixels."""
    if isinstance(reference, Dataset):
        return Reference(source=Path(reference.name).name, split=reference.split, n=len(reference))
    about = reference.about
    if about is not None:
        return Reference(source=about.source, split=about.split, n=about.n, sha256=about.sha256)
    return Reference(source=reference.path.name, n=reference.n, sha256=reference.sha256)
