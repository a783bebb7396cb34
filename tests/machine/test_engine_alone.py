"""What one process decides by itself: its device, its data workers, and what the others' failure means."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from edmdistill.errors import PeerFailed, TrainingError
from edmdistill.machine import engine as module
from edmdistill.machine.engine import Engine, Machine, load_full_state, scale_gradients, shard_like


@pytest.fixture
def engine() -> Engine:
    return Engine(Machine(device="cpu"))


@pytest.mark.parametrize(
    ("device", "asked", "cores", "here", "workers"),
    [
        ("cpu", None, 64, None, 0),
        ("cpu", 3, 64, None, 3),
        ("cuda", 0, 64, None, 0),
        ("cuda", None, 64, None, 4),
        ("cuda", None, 3, None, 2),
        ("cuda", None, 1, None, 0),
        ("cuda", None, 12, "4", 2),
        ("cuda", None, 4, "8", 0),
        ("cuda", 6, 4, "8", 6),
    ],
)
def test_data_workers_leave_a_core_to_every_process(
    device: str, asked: int | None, cores: int, here: str | None, workers: int, engine: Engine, monkeypatch
) -> None:
    """Of this machine's processes, not of all."""
    engine.device, engine.machine, engine.world_size = torch.device(device), Machine(workers=asked), 1
    monkeypatch.setattr(module, "cores", lambda: cores)
    if here is not None:
        engine.world_size = 100
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert engine.workers == workers


def in_processes(monkeypatch: pytest.MonkeyPatch, name: str, peer_to_peer: bool = True) -> None:
    """Two processes, this one on a GPU of that name."""
    monkeypatch.setattr(module, "process_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(module, "check_cuda_p2p_ib_support", lambda: peer_to_peer)
    state = SimpleNamespace(process_index=1, num_processes=2, device=torch.device("cuda:1"))
    monkeypatch.setattr(module, "PartialState", lambda *, cpu, timeout: state)


def test_a_single_gpu_is_not_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    in_processes(monkeypatch, "NVIDIA H100 80GB HBM3")
    with pytest.raises(TrainingError, match="--device cuda:0 is a single GPU, but each of 2 processes uses its own"):
        Engine(Machine("cuda:0"))
    engine = Engine(Machine("cuda"))
    assert (engine.rank, engine.world_size, engine.is_main) == (1, 2, False)
    assert engine.device == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("name", "peer_to_peer", "disabled"),
    [
        ("NVIDIA GeForce RTX 4090", False, True),
        ("NVIDIA GeForce RTX 4090", True, False),
        ("NVIDIA H100 80GB HBM3", False, False),
    ],
)
def test_cards_without_copies_between_them_do_without(
    name: str, peer_to_peer: bool, disabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE":
        monkeypatch.setenv(variable, "0")
    in_processes(monkeypatch, name, peer_to_peer)
    Engine(Machine("cuda"))
    assert (os.environ["NCCL_P2P_DISABLE"], os.environ["NCCL_IB_DISABLE"]) == (str(int(disabled)),) * 2


def test_processes_wait_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run on the CPU does not join those on GPUs."""
    asked: list[tuple[bool, float]] = []

    def state(*, cpu: bool, timeout: object) -> SimpleNamespace:
        asked.append((cpu, timeout.total_seconds()))
        return SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))

    monkeypatch.setattr(module, "PartialState", state)
    Engine(Machine("cpu"))
    assert asked == [(True, 7200)]


@pytest.mark.parametrize(
    ("processes", "error", "lost"),
    [
        (2, dist.DistBackendError("NCCL communicator was aborted"), True),
        (2, RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer"), True),
        (2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (1, dist.DistBackendError("NCCL communicator was aborted"), False),
    ],
)
def test_the_loss_of_another_process_is_told_from_a_fault(
    processes: int, error: RuntimeError, lost: bool, engine: Engine
) -> None:
    engine.world_size = processes
    assert engine.is_peer_loss(error) == lost


def test_what_fails_on_the_main_process_ends_all(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.on_main(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        engine.on_main(lambda: 1 // 0)
    engine.rank, asked = 1, []
    for failed in False, True:
        monkeypatch.setattr(engine, "any_process", lambda flag, failed=failed: asked.append(flag) or failed)
        if failed:
            with pytest.raises(PeerFailed, match="the main process failed"):
                engine.on_main(lambda: pytest.fail("called"))
        else:
            assert engine.on_main(lambda: pytest.fail("called")) is None
    assert asked == [False, False]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_main_processs_number_is_every_ones(rank: int, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a sum, to which the others add nothing."""
    engine.rank, engine.world_size = rank, 2
    others = 0 if rank == 0 else 7
    monkeypatch.setattr(engine, "all_reduce", lambda tensor: tensor + others)
    assert engine.broadcast(7 if rank == 0 else 5) == 7


def test_micro_batches_are_checked_before_the_first_round(engine: Engine) -> None:
    engine.machine = Machine("cpu", micro_batch=3)
    engine.check_micro_batches(12, 3)
    with pytest.raises(TrainingError, match=r"--micro-batch 3 is too small, because .* in groups of 4"):
        engine.check_micro_batches(12, 4)
    engine.machine = Machine("cpu", micro_batch="auto")
    with pytest.raises(TrainingError, match="--micro-batch auto needs a GPU"):
        engine.check_micro_batches(12, 4)
    engine.device = torch.device("cuda")
    engine.check_micro_batches(12, 4)


def test_weights_are_normalized_once_a_turn_where_they_may_be_kept() -> None:
    kept = [Machine(), Machine(offload=("ema", "teacher", "optimizer")), Machine(loss_pieces=4)]
    computed_again = [Machine(shard=True), Machine(checkpointing=True), Machine(shard=True, checkpointing=True)]
    assert [machine.shares_weights for machine in (*kept, *computed_again)] == [True] * 3 + [False] * 3


def test_ddp_is_for_what_is_trained_and_waits_for_the_last_pass(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []

    @contextmanager
    def no_sync(wrapper: object) -> Iterator[None]:
        entered.append("no_sync")
        yield

    engine.world_size, network = 2, nn.Linear(1, 1)
    assert engine.wrap(network, trained=False).wrapper is network
    monkeypatch.setattr(module.DistributedDataParallel, "no_sync", no_sync)
    wrapped = module.RoleModule(network, object.__new__(module.DistributedDataParallel))
    for last in False, True:
        with engine.accumulate(module.RoleModule(network, network), last=last):
            assert entered == []
        with engine.accumulate(wrapped, last=last):
            assert entered == ([] if last else ["no_sync"])
        entered.clear()


def test_the_main_process_alone_has_the_weights(engine: Engine) -> None:
    network = nn.Linear(2, 2)
    assert engine.full_state(network).keys() == {"weight", "bias"}
    engine.rank = 1
    assert engine.full_state(network) == {}


def test_what_has_no_gradient_is_not_scaled() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.grad = torch.ones(2)
    for factor, found in ((1, 1.0), (3, 3.0)):
        scale_gradients(layer.parameters(), factor)
        assert (layer.weight.grad, layer.bias.grad.tolist()) == (None, [found] * 2)


def transposed(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(float(rows * columns)).view(columns, rows).t()


def test_weights_take_the_layout_of_the_network() -> None:
    """Not its dtype; what does not fit is left to load_state_dict, which names it."""
    target, whole = torch.zeros(2, 3, dtype=torch.float16).t(), transposed(3, 2).contiguous()
    like = shard_like(whole, target)
    assert (like.stride(), like.dtype) == (target.stride(), torch.float32)
    assert torch.equal(like, whole)
    assert shard_like(whole, torch.zeros(5)) is whole
    layer = nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    load_full_state(layer, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    refused: list[tuple[dict[str, torch.Tensor], str]] = [
        (state | {"more": torch.ones(1)}, "more"),
        (state | {"bias": torch.ones(3)}, "size mismatch for bias"),
    ]
    for other, message in refused:
        with pytest.raises(RuntimeError, match=message):
            load_full_state(layer, other)


@pytest.mark.parametrize(("training", "gradients"), [(True, True), (True, False), (False, True)])
def test_ddps_wrapper_is_for_passes_that_learn(training: bool, gradients: bool) -> None:
    network, wrapper = nn.Linear(1, 1).train(training), nn.Identity()
    with torch.set_grad_enabled(gradients):
        out = module.RoleModule(network, wrapper)(x := torch.ones(1))
    assert (out is x) is (training and gradients)
