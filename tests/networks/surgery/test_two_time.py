"""The second time: nothing changes when it is added, and all of it can be learned."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.surgery.two_time import add_second_time, drop_second_time

S = torch.tensor([0.1, 0.9, 1.4], dtype=torch.float64)
T = torch.tensor([1.5, 0.9, 1.5], dtype=torch.float64)


def point(flow: FlowNetwork) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(1)
    x = torch.randn(3, flow.img_channels, flow.img_resolution, flow.img_resolution, dtype=flow.dtype)
    return x, torch.arange(3) if flow.label_dim else None


@torch.no_grad()
def test_the_output_is_the_same_to_the_bit(flow: FlowNetwork) -> None:
    x, labels = point(flow)
    two = add_second_time(flow)
    assert two.two_time
    assert not flow.two_time
    assert torch.equal(two(x, S, labels, T), flow(x, S, labels))
    assert torch.equal(two(x, S, labels), flow(x, S, labels))
    assert torch.equal(Denoiser(two)(x, T, labels), Denoiser(flow)(x, T, labels))


def test_the_gain_learns_from_the_first_step_and_the_copy_from_the_second(flow: FlowNetwork) -> None:
    x, labels = point(flow)
    two = add_second_time(flow)
    gain = two.network.get_parameter("second_time.gain")
    two(x, S, labels, T).square().sum().backward()
    assert gain.grad is not None
    assert gain.grad.abs() > 0
    gain.data += 0.1
    before = two(x, S, labels, T)
    before.square().sum().backward()
    for name, parameter in two.network.get_submodule("second_time").named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert not torch.equal(before, two(x, S, labels, S))


@torch.no_grad()
def test_dropping_undoes_adding(flow: FlowNetwork) -> None:
    rng = torch.get_rng_state()
    again = drop_second_time(add_second_time(flow))
    assert torch.equal(torch.get_rng_state(), rng)
    assert again.network.arguments == flow.network.arguments
    assert again.preconditioning == flow.preconditioning
    assert again.network.training == flow.network.training
    state = flow.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.data_ptr() != state[name].data_ptr()


@torch.no_grad()
def test_both_are_copies_where_there_is_nothing_to_do(flow: FlowNetwork) -> None:
    two = add_second_time(flow)
    two.network.get_parameter("second_time.gain").fill_(0.3)
    x, labels = point(flow)
    assert torch.equal(add_second_time(two)(x, S, labels, T), two(x, S, labels, T))
    assert torch.equal(drop_second_time(flow)(x, S, labels), flow(x, S, labels))


def test_what_a_copy_shares(make_flow: Callable[..., FlowNetwork]) -> None:
    """No memory with the original, nor its second time with its first; shared weights alone are the original's."""
    flow = make_flow("adm")
    flow.compute_dtype, flow.label_dropout = torch.bfloat16, 0.25
    own = {tensor.data_ptr() for tensor in flow.state_dict().values()}
    for training in (True, False):
        two, shared = (add_second_time(flow.train(training), share=share) for share in (False, True))
        for copy in (two, shared, drop_second_time(two)):
            assert (copy.compute_dtype, copy.label_dropout) == (torch.bfloat16, 0.25)
            assert (copy.training, copy.network.training) == (training, training)
    pointers = [tensor.data_ptr() for copy in (two, drop_second_time(two)) for tensor in copy.state_dict().values()]
    assert len({*pointers, *own}) == len(pointers) + len(own)
    shared_from = drop_second_time(shared, share=True).state_dict()
    for name, tensor in shared.state_dict().items():
        assert (tensor.data_ptr() in own) == ("second_time" not in name), name
        assert name not in shared_from or shared_from[name].data_ptr() == tensor.data_ptr()


def test_tangent_along_the_second_time(wide: FlowNetwork) -> None:
    x, labels = point(wide)
    two = add_second_time(wide)
    h = 2e-8  # VP's condition is 999 t', whose cosines turn fast
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        two.network.get_parameter("second_time.gain").fill_(0.3)
        t = torch.tensor([1.3, 1.0, 1.5], dtype=torch.float64)
        _, found = torch.func.jvp(lambda t: two(x, S, labels, t), (t,), (torch.ones_like(t),))
        difference = (two(x, S, labels, t + h) - two(x, S, labels, t - h)) / (2 * h)
    assert (found - difference).abs().max() <= 1e-5 * difference.abs().max()


def test_a_network_of_one_time_takes_no_second(make_flow: Callable[..., FlowNetwork]) -> None:
    flow = make_flow("edm2")
    x, labels = point(flow)
    with pytest.raises(ValueError, match="takes one time, but two were given"):
        flow(x, S, labels, T)
