"""Adam with fewer states: torch's own bits where nothing is rounded, and no bias where the second moment is."""

import copy
import math

import pytest
import torch
from torch import nn

from edmdistill.draws import words
from edmdistill.recipes.schema import TrainingTable
from edmdistill.training import adam
from edmdistill.training.adam import LeanAdam, OffloadedAdam, chunks, round_at_random_
from edmdistill.training.optimizers import load_states, make_optimizer, plain_states, set_learning_rate


def training(**values):
    return TrainingTable(images=100, batch=10, lr=1e-2, log_every=1, snapshot_every=1, **values)


def pair(**values):
    torch.manual_seed(0)
    networks = nn.Linear(5, 3), nn.Linear(5, 3)
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [make_optimizer(networks[i].parameters(), training(**values), offload=bool(i)) for i in range(2)]
    assert [isinstance(optimizer, OffloadedAdam) for optimizer in optimizers] == [False, True]
    return networks, optimizers


def step(network, optimizer, number):
    torch.manual_seed(number)
    network(torch.randn(4, 5)).square().sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / (1 + number)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():  # as forced weight normalization does after a step
        network.weight.div_(network.weight.norm())


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adam_in_the_hosts_memory_is_adam(beta1):
    networks, optimizers = pair(betas=(beta1, 0.99))
    for number in range(5):
        for network, optimizer in zip(networks, optimizers, strict=True):
            step(network, optimizer, number)
        assert all(torch.equal(a, b) for a, b in zip(*(n.parameters() for n in networks), strict=True))
    one, two = (optimizer.state_dict()["state"] for optimizer in optimizers)
    assert one.keys() == two.keys() == {0, 1}
    for index, values in one.items():
        assert all(torch.equal(value, two[index][key]) for key, value in values.items())


@pytest.mark.parametrize("source", [0, 1])
def test_states_go_from_one_to_the_other(source):
    networks, optimizers = pair()
    for number in range(3):
        step(networks[source], optimizers[source], number)
    other = 1 - source
    networks[other].load_state_dict(networks[source].state_dict())
    state = copy.deepcopy(optimizers[source].state_dict()["state"])
    optimizers[other].load_state_dict({**optimizers[other].state_dict(), "state": state})
    for network, optimizer in zip(networks, optimizers, strict=True):
        step(network, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(*(n.parameters() for n in networks), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_momentum_adam_has_the_same_bits_and_half_of_the_states(dtype):
    """Of torch's own, from its states too."""
    torch.manual_seed(0)
    networks = [nn.Linear(37, 19, dtype=dtype) for _ in range(3)]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    table = training(betas=(0.0, 0.99))
    reference = torch.optim.Adam(networks[0].parameters(), lr=1e-2, betas=(0.0, 0.99), fused=True)
    ours, resumed = (make_optimizer(network.parameters(), table) for network in networks[1:])

    def steps(numbers, *pairs):
        for number in numbers:
            for network, optimizer in pairs:
                torch.manual_seed(number)
                network(torch.randn(4, 37, dtype=dtype)).square().sum().backward()
                set_learning_rate(optimizer, 1e-2 / (1 + number))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    steps(range(3), (networks[0], reference), (networks[1], ours))
    assert [{*state} for state in ours.state.values()] == [{"step", "exp_avg_sq"}] * 2
    load_states(resumed, copy.deepcopy(plain_states(reference)))
    networks[2].load_state_dict(networks[0].state_dict())
    steps(range(3, 6), (networks[0], reference), (networks[1], ours), (networks[2], resumed))
    for parameter, *others in zip(*(network.parameters() for network in networks), strict=True):
        assert all(torch.equal(parameter, other) for other in others)
    for state, other in zip(plain_states(ours).values(), plain_states(resumed).values(), strict=True):
        assert other.keys() == state.keys()
        assert all(torch.equal(value, other[key]) for key, value in state.items())


def test_parameters_without_a_gradient_stay():
    network = nn.Linear(2, 1)
    optimizer = make_optimizer(network.parameters(), training(), offload=True)
    bias = network.bias.clone()
    (network.weight.sum()).backward()
    optimizer.step()
    assert torch.equal(network.bias, bias)


# A second moment in bfloat16.

STATED = 0.0025
"""Relative error of the moment, root mean square, times sqrt(1 - beta2^2): what LeanAdam says of it."""


def neighbors(x):
    """The numbers of bfloat16 next to positive x, or x itself twice."""
    low = (x.view(torch.int32) & -(2**16)).view(torch.float32)
    high = ((x.view(torch.int32) + 2**16 - 1) & -(2**16)).view(torch.float32)
    return low, high


def test_rounding_goes_to_a_neighbor_as_often_as_x_is_near_it():
    """From subnormal numbers up; what bfloat16 has stays as it is."""
    x = torch.cat([torch.logspace(-40, 30, 50), torch.tensor([0.0, 1.0, 1.5, 2.0**-130])])
    low, high = neighbors(x)
    exact = x.bfloat16().float() == x
    trials = 2**14
    drawn = x.repeat_interleave(trials)
    round_at_random_(drawn, words(torch.tensor([3]), len(drawn) // 4)[0])
    drawn = drawn.view(len(x), trials)
    assert ((drawn == low[:, None]) | (drawn == high[:, None])).all()
    assert (drawn[exact] == x[exact, None]).all()
    probability = ((x.double() - low) / (high.double() - low)).nan_to_num()
    often = (drawn == high[:, None]).double().mean(1)
    assert (often - probability)[~exact].abs().max() < 5 * math.sqrt(0.25 / trials)
    odd = x[:7].clone()  # not a multiple of the four numbers of a word
    round_at_random_(odd, words(torch.tensor([3]), 2)[0])
    assert ((odd == low[:7]) | (odd == high[:7])).all()


@pytest.mark.parametrize(("beta1", "beta2", "square"), [(0.0, 0.99, 1.2), (0.9, 0.99, 0.8), (0.0, 0.999, 0.0)])
def test_the_moment_is_unbiased_where_rounding_to_nearest_stalls(beta1, beta2, square):
    """From v = 1, at a constant square of the gradient: v_t = g^2 + (1 - g^2) beta2^t."""
    count, steps = 2**11, 200
    parameter = nn.Parameter(torch.zeros(count))
    optimizer = make_optimizer([parameter], training(betas=(beta1, beta2)), second_moment="bf16")
    assert isinstance(optimizer, LeanAdam)
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(count), "exp_avg_sq": torch.ones(count)}
    load_states(optimizer, {0: state})
    nearest = torch.ones(count, dtype=torch.bfloat16)
    for _ in range(steps):
        parameter.grad = torch.full((count,), math.sqrt(square))
        optimizer.step()
        nearest = (beta2 * nearest.float() + (1 - beta2) * square).bfloat16()
    moment = optimizer.state[parameter]["exp_avg_sq"]
    assert moment.dtype == torch.bfloat16
    v, expected = moment.double(), square + (1 - square) * beta2**steps
    assert (nearest - 1).abs().max() < 0.01  # it has stalled, at once or after two steps
    assert abs(expected - 1) > 0.15
    assert abs(v.mean() - expected) < 5 * v.std() / math.sqrt(count)
    assert 0 < v.std() / expected < STATED / math.sqrt(1 - beta2**2)
    assert {*optimizer.state[parameter]} == {"step", "exp_avg_sq"} | ({"exp_avg"} if beta1 else set())


@pytest.mark.parametrize("beta2", [0.9, 0.99])
def test_errors_are_as_small_as_stated(beta2):
    """Of normal gradients: the roundings of different steps and numbers are independent, and do not add up."""
    torch.manual_seed(0)
    parameter, exact = nn.Parameter(torch.zeros(2**11)), torch.zeros(2**11, dtype=torch.float64)
    optimizer = make_optimizer([parameter], training(betas=(0.0, beta2)), second_moment="bf16")
    for _ in range(round(3 / (1 - beta2))):
        parameter.grad = torch.randn(2**11)
        exact = beta2 * exact + (1 - beta2) * parameter.grad.double().square()
        optimizer.step()
    error = optimizer.state[parameter]["exp_avg_sq"].double() / exact - 1
    assert 0.8 < error.std() * math.sqrt(1 - beta2**2) / STATED < 1.1


def test_roundings_differ_by_seed_chunk_and_step(monkeypatch):
    monkeypatch.setattr(adam, "CHUNK", 64)

    def moments(seed, steps=1):
        parameters = [nn.Parameter(torch.zeros(64)) for _ in range(2)]
        optimizer = make_optimizer(parameters, training(seed=seed, betas=(0.0, 0.99)), second_moment="bf16")
        load_states(
            optimizer, {i: {"step": torch.tensor(steps - 1.0), "exp_avg_sq": torch.zeros(64)} for i in range(2)}
        )
        for parameter in parameters:
            parameter.grad = torch.full((64,), 0.3)
        optimizer.step()
        return [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]

    one, chunk = moments(0)
    assert one.equal(moments(0)[0])
    assert not any(one.equal(other) for other in (chunk, moments(1)[0], moments(0, steps=2)[0]))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_rounded_moment_resumes_bit_for_bit(beta1, monkeypatch):
    """In chunks, and in another layout; torch's own states are taken too."""
    monkeypatch.setattr(adam, "CHUNK", 100)

    def made():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1), nn.Conv2d(4, 2, 3))
        network[0].weight.data = network[0].weight.data.contiguous(memory_format=torch.channels_last)
        return network, make_optimizer(network.parameters(), training(betas=(beta1, 0.99)), second_moment="bf16")

    def step(network, optimizer, number):
        torch.manual_seed(number)
        network(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    (network, optimizer), (other, resumed) = made(), made()
    assert [len(some) for some in chunks(list(network.parameters()))] == [1, 3, 2]  # the first has 135 numbers
    for number in range(3):
        step(network, optimizer, number)
    other.load_state_dict(network.state_dict())
    load_states(resumed, copy.deepcopy(plain_states(optimizer)))
    for number in range(3, 6):
        step(network, optimizer, number)
        step(other, resumed, number)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    for state, again in zip(plain_states(optimizer).values(), plain_states(resumed).values(), strict=True):
        assert all(torch.equal(value, again[key]) for key, value in state.items())
    float32 = make_optimizer(other.parameters(), training(betas=(beta1, 0.99)))
    load_states(float32, copy.deepcopy(plain_states(resumed)))
    assert {state["exp_avg_sq"].dtype for state in float32.state.values()} == {torch.float32}
    load_states(resumed, copy.deepcopy(plain_states(float32)))
    for state, again in zip(plain_states(optimizer).values(), plain_states(resumed).values(), strict=True):
        assert torch.equal(state["exp_avg_sq"], again["exp_avg_sq"])


def test_a_rounded_moment_moves_weights_almost_as_far():
    torch.manual_seed(0)
    networks = [nn.Linear(64, 64) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    begun = networks[0].weight.detach().clone()
    table = training(betas=(0.0, 0.99))
    optimizers = [
        make_optimizer(network.parameters(), table, second_moment=moment)
        for network, moment in zip(networks, ("fp32", "bf16"), strict=True)
    ]
    for number in range(50):
        for network, optimizer in zip(networks, optimizers, strict=True):
            torch.manual_seed(number)
            network(torch.randn(16, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    distance = (networks[1].weight - networks[0].weight).norm() / (networks[0].weight - begun).norm()
    assert 0 < distance < 0.02
