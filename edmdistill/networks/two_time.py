"""A second time for a network that knows one: the time embedding, duplicated behind a gain that starts at 0.

The network with the copy is the network without it, exactly, whatever the second time; and the gain's own gradient
is not zero, so it still learns. CoSIM's auxiliary score reads (x_s; s, t) and CTM's generator (x_t; t, s) by it.
What is copied is the path from c_noise to the last linear map of the time embedding; the copy's output is added
there, before the last nonlinearity. Labels, also where they enter that path early (DDPM++), go with the first time.

Source: CoSIM, section 4.  Differs: the paper sums both embeddings outright and leaves the start to them; the gain
keeps the teacher's function at step 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from edmdistill.networks.base import Network
from edmdistill.networks.preconditioning import FlowNetwork


class SecondTime(nn.Module):
    """Copies of the layers that embed the time, under the network's own names for them, and the gain."""

    def __init__(self, network: nn.Module, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, copy.deepcopy(network.get_submodule(name)))
        self.gain = nn.Parameter(torch.zeros([]))


def add_second_time(flow: FlowNetwork) -> FlowNetwork:
    """A copy of the network that reads a second time as well, and whose output does not change by a bit."""
    return _rebuild(flow, two_time=True)


def drop_second_time(flow: FlowNetwork) -> FlowNetwork:
    """A copy of the network that reads the first time alone."""
    return _rebuild(flow, two_time=False)


def _rebuild(flow: FlowNetwork, two_time: bool) -> FlowNetwork:
    old = flow.network
    make: Callable[..., Network] = type(old)
    with torch.device("meta"):  # names and shapes alone: no random number is drawn
        network = make(**old.arguments | {"two_time": two_time})
    state = old.state_dict()
    gain = next(old.parameters()).new_zeros(())
    for name in network.state_dict():  # what is new is a copy of the first time's, but the gain
        state.setdefault(name, state.get(name.removeprefix("second_time."), gain))
    network.load_state_dict({name: state[name].clone() for name in network.state_dict()}, assign=True)
    return FlowNetwork(network, flow.preconditioning, flow.compute_dtype).train(old.training)
