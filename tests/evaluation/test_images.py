"""Blocks of images: what they take of a GPU's memory."""

import pytest
import torch

from edmdistill.evaluation.images import block_size
from edmdistill.networks import new_network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.published import PUBLISHED
from edmdistill.planning.ledger import Ledger, fused_attention

ADM_256 = "adm", (256, 3, 1000), {"model_channels": 256, "channel_mult": [1, 1, 2, 2, 4, 4], "num_blocks": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "picture", "half", "single"),
    [
        (PUBLISHED["ddpmpp-cifar10"], 32, 0.7, 1.4),
        (PUBLISHED["adm-imagenet64"], 64, 0.7, 1.4),
        (PUBLISHED["edm2-img64-xl"], 64, 1.3, 2.5),
        (PUBLISHED["edm2-img512-xxl"], 512, 0.7, 0.9),
        (ADM_256, 256, 2.4, 4.8),
    ],
    ids=["ddpmpp", "adm-64", "edm2-64", "edm2-512", "adm-256"],
)
def test_a_block_takes_the_memory_that_docs_state(network, picture: int, half: float, single: float) -> None:
    """In GB, in float16 and float32, of one pass, beside the weights."""
    kind, (side, channels, classes), arguments = network
    with torch.device("meta"), torch.no_grad(), fused_attention():
        flow = FlowNetwork(new_network(kind, side, channels, classes, **arguments), EDM()).eval().requires_grad_(False)
        x, labels = torch.empty(block_size(picture), channels, side, side), torch.empty(block_size(picture), classes)
        for dtype, expected in ((torch.float16, half), (torch.float32, single)):
            flow.compute_dtype = dtype
            with Ledger() as ledger:
                flow(x, torch.empty(len(x)), labels if classes else None)
            assert max(ledger.live) / 1e9 == pytest.approx(expected, abs=0.06)
