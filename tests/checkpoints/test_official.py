"""What an official file says of its network, as ours."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edmdistill.checkpoints.nvidia import OfficialCheckpoint, read_official
from edmdistill.checkpoints.official import build_official, edm_arguments, load_official, outline_official
from edmdistill.embedded import EMBEDDED
from edmdistill.errors import CheckpointError


@pytest.fixture
def official(golden: Path) -> OfficialCheckpoint:
    return read_official(golden / "edm-tiny-cond.pkl")


def test_noise_levels_are_the_attributes_the_arguments_or_the_defaults(official: OfficialCheckpoint) -> None:
    """In this order, as the official code computes with them; 0 and infinity are no limits."""
    plain = {name: value for name, value in official.arguments.items() if not name.startswith("sigma_")}
    unlimited = {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.6}
    for class_name, arguments, attributes, expected in (
        ("EDMPrecond", {}, {}, (0.002, 80.0, 0.5)),
        ("EDMPrecond", {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.4}, {}, (0.01, 50.0, 0.4)),
        ("EDMPrecond", {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.4}, unlimited, (0.002, 80.0, 0.6)),
        ("ECMPrecond", {}, {}, (0.003, 80.0, 0.5)),
        ("ECMPrecond", {"sigma_min": 0.01}, {}, (0.01, 80.0, 0.5)),
    ):
        changed = replace(
            official, preconditioning_class=class_name, arguments=plain | arguments, attributes=attributes
        )
        flow = outline_official(changed)
        assert (flow.sigma_min, flow.sigma_max, flow.sigma_data) == expected


@pytest.mark.parametrize("change", [lambda u: u[:-1], lambda u: u * 1.1, lambda u: u[:0]], ids=["cut", "other", "none"])
def test_iddpms_noise_levels_are_those_of_its_arguments(golden: Path, change: Callable[[Tensor], Tensor]) -> None:
    official = read_official(golden / "iddpm-adm-uncond.pkl.gz")
    build_official(official, tensors=official.tensors)
    with pytest.raises(CheckpointError, match="holds other noise levels than its arguments give"):
        build_official(official, tensors=official.tensors | {"u": change(official.tensors["u"])})


def test_arguments_of_ours_are_not_theirs(official: OfficialCheckpoint) -> None:
    for name in ("two_time", "guided"):
        changed = replace(official, network_arguments=official.network_arguments | {name: True})
        with pytest.raises(CheckpointError, match=f"was made with the argument {name}, which SongUNet does not have"):
            outline_official(changed)
    with pytest.raises(CheckpointError, match="was made with the argument logvar_channels"):
        outline_official(replace(official, arguments=official.arguments | {"logvar_channels": 128}))


def test_teachers_that_ship_have_their_own_licence_and_names() -> None:
    for embedded in EMBEDDED.values():
        config = load_official(embedded.teacher)[1]
        assert (config.provenance.licence, config.label_names) == ("apache-2.0", embedded.label_names)


def test_a_vae_is_kept_without_the_size_of_its_batches(golden: Path) -> None:
    official = read_official(golden / "edm2-latent-cond.pkl")
    assert official.encoder is not None
    encoder = build_official(official)[1].encoder
    others = {"class_name", "arguments", "batch_size"}
    assert encoder == {"kind": "StabilityVAEEncoder"} | {
        name: value for name, value in official.encoder.items() if name not in others
    }


@pytest.mark.parametrize("name", ["edm-adm-multihead.pkl.gz", "edm-tiny-cond.pkl", "vp-ddpmpp-uncond.pkl.gz"])
def test_arguments_by_names_and_shapes(golden: Path, name: str) -> None:
    """Those of the file itself, where it states them, but for the dropout, which leaves no trace in the weights."""
    official = read_official(golden / name)
    shapes = {key.removeprefix("model."): torch.empty(t.shape, device="meta") for key, t in official.stored.items()}
    found = edm_arguments(shapes, "adm" if "adm" in name else "song")
    stated = {"augment_dim": 0, "label_dim": 0} | official.network_arguments | {"dropout": 0.0}
    assert found == {key: stated.get(key, value) for key, value in found.items()}
