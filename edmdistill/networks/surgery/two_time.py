"""Gives a network of one time a second: a copy of the time embedding behind a gain that starts at 0.

At first the embedding of the second time is multiplied by 0, so the network's function does not change; the gain's
gradient is not 0, so it learns. CoSIM's auxiliary score reads (x_s; s, t), CTM's generator (x_t; t, s). The layers from
c_noise to the last linear map of the embedding are copied, and the result is added before the last nonlinearity. Labels
belong to the first time, also where they join these layers early (DDPM++).

Source: CoSIM, section 4.  Differs: the paper adds both embeddings without a gain, which would change the teacher's
function at step 0.
"""

from __future__ import annotations

import torch

from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.surgery.rebuild import rebuild


def add_second_time(flow: FlowNetwork, *, share: bool = False) -> FlowNetwork:
    """Returns a copy of the network that also reads a second time, whose gain is 0 at first.  share: see `rebuild`."""
    new = {f"second_time.{name}": tensor for name, tensor in flow.network.state_dict().items()}
    return rebuild(flow, new | {"second_time.gain": torch.zeros([])}, share=share, two_time=True)


def drop_second_time(flow: FlowNetwork, *, share: bool = False) -> FlowNetwork:
    """Returns a copy of the network that reads only the first time.  share: see `rebuild`."""
    return rebuild(flow, {}, share=share, two_time=False)
