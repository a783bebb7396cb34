"""Small networks of every kind, with random weights in every layer."""

from collections.abc import Callable

import pytest
import torch

from edmdistill.networks import NETWORKS, Network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import PRECONDITIONINGS

SIZE = {"img_resolution": 8}
SONG = SIZE | {"in_channels": 3, "out_channels": 3, "model_channels": 8, "num_blocks": 1, "attn_resolutions": [4]}
ADM = SIZE | {"in_channels": 3, "out_channels": 3, "label_dim": 5, "model_channels": 32, "num_blocks": 1}
ADM |= {"channel_mult": [1, 4], "channel_mult_emb": 1, "attn_resolutions": [4]}
CASES = {
    "ddpmpp": ("song", SONG | {"channel_mult": [1, 2], "augment_dim": 9}, "edm"),
    "ddpmpp-vp": ("song", SONG | {"channel_mult": [1, 2]}, "vp"),
    "ncsnpp-ve": (
        "song",
        SONG
        | {"channel_mult": [1, 2], "label_dim": 5, "embedding_type": "fourier", "encoder_type": "residual"}
        | {"channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]},
        "ve",
    ),
    "song-skip": ("song", SONG | {"channel_mult": [1, 1], "encoder_type": "skip", "decoder_type": "skip"}, "edm"),
    "adm": ("adm", ADM, "edm"),
    "adm-iddpm": ("adm", ADM | {"out_channels": 6, "label_dim": 0}, "iddpm"),
    "edm2": (
        "edm2",
        SIZE
        | {"img_channels": 4, "label_dim": 5, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
        | {"attn_resolutions": [4], "channels_per_head": 8, "logvar_channels": 16, "clip_act": 2.5},
        "edm",
    ),
}


def random_flow(case: str, dtype: torch.dtype = torch.float32, **arguments: object) -> FlowNetwork:
    """The network of a case; layers that start at 0 do not here."""
    torch.manual_seed(0)
    kind, own, preconditioning = CASES[case]
    make: type[Network] = NETWORKS[kind]
    network = make(**{**own, **arguments})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return FlowNetwork(network, PRECONDITIONINGS[preconditioning]()).to(dtype).eval()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def make_flow() -> Callable[..., FlowNetwork]:
    """random_flow(case, dtype, **arguments), for tests that choose for themselves."""
    return random_flow


@pytest.fixture
def flow(case: str) -> FlowNetwork:
    """In float32."""
    return random_flow(case)


@pytest.fixture
def wide(case: str) -> FlowNetwork:
    """In float64."""
    return random_flow(case, torch.float64)
