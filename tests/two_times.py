"""A second time that makes another network of one."""

import torch

from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.surgery.two_time import add_second_time


def with_second_time(flow: FlowNetwork) -> FlowNetwork:
    """A copy that another second time makes another network."""
    two = add_second_time(flow)
    for parameter in two.network.second_time.parameters():
        torch.nn.init.normal_(parameter) if parameter.ndim else torch.nn.init.ones_(parameter)
    return two
