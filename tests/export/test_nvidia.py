"""What NVIDIA's classes take: their names, their arguments, and what they cannot express."""

from pathlib import Path

import pytest
import torch
from golden_set import NETWORKS
from msgspec.structs import replace

from edmdistill.checkpoints.config import describe
from edmdistill.checkpoints.load import load_flow
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.errors import EdmDistillError
from edmdistill.export.folder import TARGETS, export
from edmdistill.export.nvidia import official, read
from edmdistill.networks import new_network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM, VP, ConsistencyBoundary
from edmdistill.networks.surgery.adapt import with_positional_time
from edmdistill.networks.surgery.rebuild import add_logvar, rebuild

RGB = "edm2-rgb-cond.pkl"


@pytest.mark.parametrize("name", NETWORKS)
def test_nvidias_names_and_arguments(golden: Path, tmp_path: Path, name: str):
    """What goes out is what the official pickle holds, tensor by tensor, and its class is called as it was there."""
    checkpoint = read_official(golden / name)
    flow, config = build_official(checkpoint, upcast=True)
    arguments, tensors = official(flow, config)
    assert tensors.keys() == checkpoint.tensors.keys()
    for key, tensor in checkpoint.tensors.items():
        rtol = 1e-5 if key == "u" else 0  # iDDPM's noise levels, which we make ourselves
        torch.testing.assert_close(tensors[key], tensor.float(), rtol=rtol, atol=0)
    assert arguments["class_name"].endswith(checkpoint.preconditioning_class)
    recorded = checkpoint.network_arguments | checkpoint.arguments
    ranges = {"sigma_min", "sigma_max"}  # unlimited there, and what training used here
    assert all(arguments[key] == value for key, value in recorded.items() if key in arguments.keys() - ranges)
    assert recorded.keys() - arguments.keys() <= {"in_channels", "out_channels"} | ranges
    assert arguments["use_fp16"] == checkpoint.attributes["use_fp16"]
    assert not arguments.keys() & {"in_channels", "out_channels"}
    assert [row.nfe for row in export(golden / name, "nvidia", tmp_path / "out")] == [1, 2]
    there, (here, _) = read(tmp_path / "out"), load_flow(golden / name)
    assert there.preconditioning == here.preconditioning
    for found, expected in zip(there.state_dict().values(), here.state_dict().values(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["edm-tiny-cond.pkl", RGB])
def test_heads_that_a_training_has_added_are_left_out(golden: Path, name: str):
    """EDM2's class has one head for log variances, and EDM's have none."""
    flow, config = load_flow(golden / name)
    more = add_logvar(flow, 0, heads=3)
    (arguments, tensors), (expected, originals) = (
        official(more, replace(config, **describe(more))),
        official(flow, config),
    )
    assert arguments == expected
    assert tensors.keys() == originals.keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in originals.items())


def test_a_head_that_their_class_has_is_added(golden: Path):
    """As for SiDA's generators, which have none."""
    flow, config = load_flow(golden / RGB)
    bare = rebuild(flow, {}, logvar_channels=0)
    arguments, tensors = official(bare, replace(config, **describe(bare)))
    expected = official(flow, config)[1]
    assert tensors.keys() == expected.keys()
    assert tensors["logvar_linear.weight"].shape == (1, arguments["logvar_channels"])
    assert torch.equal(tensors["unet.out_gain"], expected["unet.out_gain"])


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (EDM, {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.3}),
        (VP, {"beta_d": 10.0, "beta_min": 0.2, "M": 500}),
    ],
)
def test_numbers_of_the_preconditioning_are_arguments(golden: Path, kind: type, numbers: dict[str, float]):
    teacher, config = load_flow(golden / "edm-tiny-cond.pkl")
    flow = FlowNetwork(teacher.network, kind(**numbers))
    assert numbers.items() <= official(flow, replace(config, **describe(flow)))[0].items()


def test_what_has_no_place_is_refused(golden: Path, runs: Path):
    flow, config = load_flow(golden / RGB)
    with pytest.raises(EdmDistillError, match="this is a teacher"):
        TARGETS["diffusers"].readme(flow, config)
    adapted = with_positional_time(flow)
    with pytest.raises(EdmDistillError, match="no positional_time"):
        official(adapted, config)
    scaled = FlowNetwork(flow.network, EDM(c_noise_scale=250.0))
    with pytest.raises(EdmDistillError, match=r"read ln\(sigma\)/4"):
        official(scaled, config)
    boundary = FlowNetwork(flow.network, ConsistencyBoundary())
    with pytest.raises(EdmDistillError, match="no preconditioning of the kind consistency"):
        official(boundary, replace(config, **describe(boundary)))
    for name, argument in (("jumps", "two_time"), ("pixels", "guided")):
        with pytest.raises(EdmDistillError, match=f"no {argument}"):
            official(*load_flow(runs / name))
    small = {"model_channels": 32, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    for argument, value in (("adaptive_scale", False), ("group_channels", 1)):  # as OpenAI's networks are
        adm = FlowNetwork(new_network("adm", 8, 3, 0, **small | {argument: value}), EDM())
        with pytest.raises(EdmDistillError, match=f"no {argument}={value}"):
            official(adm, replace(config, **describe(adm)))
    flow, config = load_flow(runs / "latents")
    with pytest.raises(EdmDistillError, match=r"this network's VAE has them in \[-1, 1\]"):
        TARGETS["nvidia"].readme(flow, replace(config, encoder=config.encoder | {"range": "scm"}))
