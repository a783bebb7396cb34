import copy
import shutil

import pytest
import torch
from torch import nn

from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.recipes.schema import TrainingTable
from edmdistill.training.optimizers import load_states, make_optimizer, plain_states, set_learning_rate
from edmdistill.training.session import train


def training(**values):
    return TrainingTable(images=100, batch=10, lr=1e-2, log_every=1, snapshot_every=1, **values)


def pair(**values):
    torch.manual_seed(0)
    networks = nn.Linear(5, 3), nn.Linear(5, 3)
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [make_optimizer(networks[i].parameters(), training(**values), offload=bool(i)) for i in range(2)]
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


def test_without_momentum_adam_has_the_same_bits_and_half_of_the_states():
    """Of torch's own, from its states too."""
    torch.manual_seed(0)
    networks = [nn.Linear(37, 19) for _ in range(3)]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    table = training(betas=(0.0, 0.99))
    reference = torch.optim.Adam(networks[0].parameters(), lr=1e-2, betas=(0.0, 0.99), fused=True)
    ours, resumed = (make_optimizer(network.parameters(), table) for network in networks[1:])

    def steps(numbers, *pairs):
        for number in numbers:
            for network, optimizer in pairs:
                torch.manual_seed(number)
                network(torch.randn(4, 37)).square().sum().backward()
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


@pytest.mark.slow  # torchao compiles its step
@pytest.mark.filterwarnings("ignore")  # torch's and torchao's own, while they compile
def test_eight_bit_states_go_into_a_file_and_back():
    torch.manual_seed(0)
    networks = nn.Linear(128, 64), nn.Linear(128, 64)
    optimizers = [make_optimizer(network.parameters(), training(optimizer="adam8bit")) for network in networks]

    def step(index, number):
        torch.manual_seed(number)
        networks[index](torch.randn(4, 128)).square().sum().backward()
        set_learning_rate(optimizers[index], 1e-2 / (1 + number))
        optimizers[index].step()
        optimizers[index].zero_grad()

    for number in range(3):
        step(0, number)
    states = plain_states(optimizers[0])
    assert states[0]["exp_avg:codes"].dtype == states[0]["exp_avg_sq:codes"].dtype == torch.uint8
    assert all(type(tensor) is torch.Tensor for state in states.values() for tensor in state.values())
    networks[1].load_state_dict(networks[0].state_dict())
    load_states(optimizers[1], copy.deepcopy(states))
    for number in range(3, 5):
        step(0, number)
        step(1, number)
    assert all(torch.equal(a, b) for a, b in zip(*(n.parameters() for n in networks), strict=True))


@pytest.mark.parametrize(
    ("optimizer", "machine", "sentence"),
    [
        ("radam", Machine("cpu", offload=("optimizer",)), "--offload optimizer is for adam, but the recipe uses radam"),
        ("adam8bit", Machine("cpu", shard=True), "the states of adam8bit cannot be sharded"),
    ],
)
def test_what_does_not_go_together(start, optimizer, machine, sentence):
    with pytest.raises(TrainingError, match=sentence):
        start("sid", machine, optimizer=optimizer)


def test_radam_trains_and_resumes(start, tmp_path):
    run = start("sid", optimizer="radam", images=48, snapshot_every=24)
    assert train(run, tmp_path / "run", on_message=lambda sentence: None).finished
    shutil.rmtree(tmp_path / "run/state/000000000048")
    resumed = start("sid", optimizer="radam", images=48, snapshot_every=24)
    assert train(resumed, tmp_path / "run", on_message=lambda sentence: None).finished
    for name, tensor in run.state()["generator"].items():
        assert torch.equal(resumed.state()["generator"][name], tensor)
