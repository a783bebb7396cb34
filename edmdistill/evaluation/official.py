"""Checks of `edmdistill fetch --verify`, and the published results that official files can reproduce."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from edmdistill.checkpoints.official import load_official
from edmdistill.checkpoints.official_files import (
    OfficialFile,
    fetch,
    files_of,
    find_official,
    official_files,
    presets,
    published_result,
)
from edmdistill.checkpoints.vae import read_vae
from edmdistill.errors import CheckpointError
from edmdistill.evaluation.references import open_statistics
from edmdistill.features.spaces import load_features

_PLACES = "each tensor by its name and shape"
AGREEMENT = 1e-4
"""Largest difference of the features that two official files of one network give, relative to the largest."""


def verify_official(name: str) -> list[str]:
    """Returns what was checked of an official file or a preset, and how to reproduce its published result.

    Raises: CheckpointError: it does not hold what it should.
    """
    checked = [sentence for file in find_official(name) for sentence in _CHECKS[file.kind](file)]
    return checked + _how_to_reproduce(name)


def _check_teacher(file: OfficialFile) -> list[str]:
    flow, config = load_official(fetch(file).path)
    count = sum(parameter.numel() for parameter in flow.parameters())
    return [f"{file.name}: {count:,} parameters of {config.network.kind}, all finite, {_PLACES}"]


def _check_features(file: OfficialFile) -> list[str]:
    """Compares the features of an image with those of the network's other official files that the cache has."""
    path = fetch(file).path
    features = load_features(file.kind, path)(_picture())
    if not features.isfinite().all():
        raise CheckpointError(f"{path} gives features that are not finite: it is damaged; remove it and fetch it again")
    lines = [f"{file.name}: {features.shape[1]} features of a picture, all finite; each tensor has its name and shape"]
    if path.suffix == ".pt":
        lines.append(f"{file.name}: our network gives the features of the script in the file, within {AGREEMENT:g}")
    for other in files_of(file.kind):
        if other != file and other.cached is not None:
            theirs = load_features(file.kind, other.cached)(_picture())
            difference = float((features - theirs).abs().max() / theirs.abs().max())
            if not difference < AGREEMENT:
                raise CheckpointError(
                    f"{path} and {other.cached} hold the weights of one network, but their features differ by "
                    f"{difference:.1e} of the largest: remove both, and fetch them again"
                )
            lines.append(f"{file.name}: its features agree with those of {other.name} within {difference:.1e}")
    return lines


def _picture() -> Tensor:
    """Returns the image by which files are compared: waves of other lengths in each channel.  uint8 [1,3,64,64]"""
    x = torch.linspace(0, 1, 64, dtype=torch.float64)
    waves = [(torch.sin(k * torch.pi * x)[:, None] * torch.cos(2 * k * torch.pi * x) + 1) / 2 for k in (2, 3, 5)]
    return (torch.stack(waves)[None] * 255).round().to(torch.uint8)


def _check_vae(file: OfficialFile) -> list[str]:
    vae = read_vae(str(fetch(file).path))
    image = vae.decode(torch.zeros(1, vae.channels, 4, 4))
    if not image.isfinite().all():
        raise CheckpointError(f"{vae.folder} decodes zeros to what is not finite: remove it, and fetch it again")
    return [f"{file.name}: the image of zeros is finite, {_PLACES}"]


def _check_reference(file: OfficialFile) -> list[str]:
    statistics = open_statistics(fetch(file).path)
    spaces = " and ".join(f"{len(one.gaussian.mean)} features of {name}" for name, one in statistics.spaces.items())
    return [f"{file.name}: mean and covariance of {spaces}, all finite, symmetric and positive semidefinite"]


_CHECKS = {
    "teacher": _check_teacher,
    "inception": _check_features,
    "dinov2": _check_features,
    "vae": _check_vae,
    "reference": _check_reference,
}


def _how_to_reproduce(name: str) -> list[str]:
    """Returns the command that measures a published result, and the result."""
    reference = _reference_of(name)
    if reference is None:
        return []
    if preset := presets().get(name):
        guide = f" --guide {preset.guide} --guidance {preset.guidance:g}" if preset.guide else ""
        command = f"edmdistill eval {preset.net}{guide} --protocol edm2 --metrics {preset.metric}"
        result = f"{preset.metric} {preset.value:g}"
    elif published := published_result(name):
        command = f"edmdistill eval {name} --protocol edm --metrics fid --nfe {published['nfe']:g}"
        result = f"fid {published['fid']:g}, the smallest of three"
    else:
        return []
    return [f"{name}: NVIDIA states {result}; to measure it: {command} --ref {reference}"]


def _reference_of(name: str) -> str | None:
    """Returns the name of the reference for a teacher or a preset: that of the data set in its name."""
    stem = re.match(r"(edm|edm2)-(cifar10-32x32|ffhq-64x64|afhqv2-64x64|imagenet-64x64|img64|img512)\b", name)
    reference = f"ref-{stem[1]}-{stem[2]}" if stem else ""
    return reference if reference in official_files() else None
