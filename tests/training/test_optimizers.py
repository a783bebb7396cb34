import copy
import shutil

import pytest
import torch
from torch import nn

from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.recipes.schema import TrainingTable
from edmdistill.training.optimizers import load_states, make_optimizer, plain_states, set_learning_rate, state_bytes
from edmdistill.training.session import train


def training(**values):
    return TrainingTable(images=100, batch=10, lr=1e-2, log_every=1, snapshot_every=1, **values)


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
    codes = sum(tensor.nbytes for name, tensor in states[0].items() if name.endswith("codes"))
    assert codes == state_bytes(training(optimizer="adam8bit")) * networks[0].weight.numel()
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
        ("adam", Machine("cpu", shard=True, offload=("ema",)), "--offload does not work with --shard"),
        ("adam8bit", Machine("cpu", shard=True), "the states of adam8bit cannot be sharded"),
        (
            "radam",
            Machine("cpu", second_moment="bf16"),
            "--second-moment bf16 has no effect: it is for adam, and the r",
        ),
    ],
)
def test_what_does_not_go_together(start, optimizer, machine, sentence):
    with pytest.raises(TrainingError, match=sentence):
        start("sid", machine, optimizer=optimizer)


@pytest.mark.parametrize(
    ("machine", "training"),
    [
        (Machine("cpu"), {"optimizer": "radam"}),
        (Machine("cpu", second_moment="bf16", offload=("optimizer",)), {"betas": [0.9, 0.99]}),
    ],
)
def test_another_optimizer_trains_and_resumes(machine, training, start, tmp_path):
    run = start("sid", machine, **training, images=48, snapshot_every=24)
    assert train(run, tmp_path / "run", on_message=lambda sentence: None).finished
    shutil.rmtree(tmp_path / "run/state/000000000048")
    resumed = start("sid", machine, **training, images=48, snapshot_every=24)
    assert train(resumed, tmp_path / "run", on_message=lambda sentence: None).finished
    for name, tensor in run.state()["generator"].items():
        assert torch.equal(resumed.state()["generator"][name], tensor)


KINDS = [
    ("adam", (0.0, 0.99), "fp32"),
    ("adam", (0.0, 0.99), "bf16"),
    ("adam", (0.9, 0.95), "fp32"),
    ("adam", (0.9, 0.95), "bf16"),
    ("radam", (0.9, 0.95), "fp32"),
]


@pytest.mark.parametrize(("optimizer", "betas", "second_moment"), KINDS)
def test_an_optimizer_has_its_options_and_keeps_the_bytes_that_are_planned(optimizer, betas, second_moment):
    table = training(optimizer=optimizer, betas=betas, eps=1e-5)
    weight = nn.Parameter(torch.ones(64, 64))
    made = make_optimizer([weight], table, second_moment=second_moment)
    group = made.param_groups[0]
    assert (group["betas"], group["eps"], float(group["lr"])) == (betas, 1e-5, pytest.approx(1e-2))
    set_learning_rate(made, 0.25)
    assert float(group["lr"]) == 0.25
    weight.square().sum().backward()
    made.step()
    moments = [tensor for tensor in plain_states(made)[0].values() if tensor.shape == weight.shape]
    assert sum(tensor.nbytes for tensor in moments) == state_bytes(table, second_moment) * weight.numel()


def test_a_learning_rate_in_a_tensor_is_changed_in_place():
    """A compiled step, as torchao's, reads that tensor."""
    rate = torch.tensor(1.0)
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=rate)
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.25
