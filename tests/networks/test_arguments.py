"""What constructors refuse before the first layer is built."""

from typing import Any

import pytest
import torch

from edmdistill.networks import NETWORKS
from edmdistill.networks.arguments import check_arguments

SONG: dict[str, Any] = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "num_blocks": 1}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "resolution": ({"img_resolution": 12}, "img_resolution is 12, which cannot be halved 3 times, as the 4 levels of"),
    "odd taps": ({"resample_filter": [1, 3, 1]}, r"resample_filter is \[1.0, 3.0, 1.0\], but must be an even number"),
    "taps of sum 0": ({"resample_filter": [1, -1]}, "but must be an even number of taps with a nonzero sum"),
    "one tap": ({"resample_filter": [1]}, "resample_filter"),
    "dropout": ({"dropout": 1.0}, "dropout must be below 1"),
    "multiplier": ({"channel_mult": [1, 0]}, "channel_mult.* must be at least 1"),
    "half a block": ({"num_blocks": 1.5}, "num_blocks"),
    "encoder": ({"encoder_type": "skipped"}, "encoder_type.*'skipped', where standard or skip or residual is needed"),
    "split times": ({"split_times": True}, "split_times is for two times: set two_time too"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_makes_no_network_is_refused(why: str) -> None:
    change, sentence = REFUSED[why]
    with pytest.raises(ValueError, match=sentence), torch.device("meta"):
        NETWORKS["song"](**SONG | change)


def test_heads_of_attention_share_the_channels() -> None:
    """ADM's have 64 each, and as many more as are left."""
    adm = {"channel_mult": [1], "attn_resolutions": [8], "model_channels": 160}
    with torch.device("meta"):
        NETWORKS["adm"](**SONG | adm)
        with pytest.raises(ValueError, match="224 channels cannot be split among 3 heads of attention"):
            NETWORKS["adm"](**SONG | adm | {"model_channels": 224})


@pytest.mark.parametrize("change", [{"img_resolution": 24}, {"resample_filter": [-1, -3, -3, -1]}], ids=str)
def test_what_makes_one_is_not(change: dict[str, Any]) -> None:
    with torch.device("meta"):
        NETWORKS["song"](**SONG | change)


def test_arguments_are_all_known_and_none_is_missing() -> None:
    """A file's may be either."""
    check_arguments(NETWORKS["song"], SONG)
    with pytest.raises(ValueError, match="width"):
        check_arguments(NETWORKS["song"], SONG | {"width": 3})
    with pytest.raises(ValueError, match="in_channels"):
        check_arguments(NETWORKS["song"], {name: value for name, value in SONG.items() if name != "in_channels"})
