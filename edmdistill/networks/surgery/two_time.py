"""A second time for a network that knows one: the time embedding, duplicated behind a gain that starts at 0.

The network with the copy computes what the network without it does, whatever the second time: what is added is 0. The
gain's own gradient is not, so it still learns. CoSIM's auxiliary score reads (x_s; s, t), CTM's generator (x_t; t, s).
What is copied is the path from c_noise to the last linear map of the time embedding; the copy's output is added
there, before the last nonlinearity. Labels, also where they enter that path early (DDPM++), go with the first time.

Source: CoSIM, section 4.  Differs: the paper sums both embeddings outright and leaves the start to them; the gain
keeps the teacher's function at step 0.
"""

from __future__ import annotations

import torch

from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.surgery.rebuild import rebuild


def add_second_time(flow: FlowNetwork) -> FlowNetwork:
    """Returns a copy of the network that also reads a second time; zeros are all that this adds to it."""
    new = {f"second_time.{name}": tensor for name, tensor in flow.network.state_dict().items()}
    return rebuild(flow, new | {"second_time.gain": torch.zeros([])}, two_time=True)


def drop_second_time(flow: FlowNetwork) -> FlowNetwork:
    """A copy of the network that reads the first time alone."""
    return rebuild(flow, {}, two_time=False)
