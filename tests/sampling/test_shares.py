"""A batch that threads of one core each share: the same pictures, errors and Ctrl-C, and where it is shared at all."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_rounded, depth
from torch import Tensor
from waiting import LIMIT

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.generator import Generator
from edmdistill.networks import new_network
from edmdistill.networks.base import Conditioning
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.sampling import generate
from edmdistill.sampling.generate import _threads, sample
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.sampling.trajectory import ReferenceGuidance
from edmdistill.threads import ahead

SEEDS = range(100, 108)
NETWORKS: dict[str, dict[str, Any]] = {
    "edm2": {"channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": []},
    "song": {"channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
    "adm": {"channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]) -> None:
    """Has small networks drawn by threads, as large ones are."""
    monkeypatch.setattr(generate, "LEAST_CHANNELS", 16)
    monkeypatch.setattr(generate, "LEAST_SIDE", 8)
    set_threads(2)


@pytest.fixture
def drawn_by(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int, int]]:
    """Of every share that is drawn: whether the main thread did, its cores, and the number of images."""
    found, whole = [], generate._first_draws

    def first_draws(model: Any, rng: Any) -> Any:
        main = threading.current_thread() is threading.main_thread()
        found.append((main, torch.get_num_threads(), len(rng.streams)))
        return whole(model, rng)

    monkeypatch.setattr(generate, "_first_draws", first_draws)
    return found


def flow(kind: str = "song", channels: int = 16, side: int = 8, *, frozen: bool = True) -> FlowNetwork:
    torch.manual_seed(0)
    network = new_network(kind, side, 3, 10, model_channels=channels, **NETWORKS[kind])
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 0:
                parameter.fill_(0.5)
            elif kind != "edm2" and name.endswith("weight"):
                parameter.normal_(std=0.05)
    network.fold(sample=frozen)
    return FlowNetwork(network, EDM()).eval().requires_grad_(False)


def teacher(*arguments: Any, **options: Any) -> Denoiser:
    return Denoiser(flow(*arguments, **options))


def generator() -> Generator:
    network = flow()
    config = CheckpointConfig(stage="generator", provenance=Provenance(source="a test"), **describe(network))
    return Generator(network, config)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_pictures_are_those_of_one_thread(kind: str, drawn_by: list[Any]) -> None:
    model, done = teacher(kind), list[int]()
    shared = sample(model, 3, seeds=SEEDS, batch=8, on_progress=done.append)
    assert sorted(drawn_by) == [(False, 1, 4)] * 2
    assert (done, torch.get_num_threads()) == ([8], 2)
    drawn_by.clear()
    torch.set_num_threads(1)
    alone = sample(model, 3, seeds=SEEDS, batch=8)
    assert drawn_by == [(True, 1, 8)]
    assert_rounded(shared, alone, 3 * depth(model))


def test_labels_and_noise_go_with_their_seeds(drawn_by: list[Any]) -> None:
    model, labels = generator(), [3, 1, 4, 1, 5, 9, 2, 6]
    shared = sample(model, 3, seeds=SEEDS, labels=labels)
    assert len(drawn_by) == 2
    torch.set_num_threads(1)
    alone = [sample(model, 3, seeds=[seed], labels=label) for seed, label in zip(SEEDS, labels, strict=True)]
    assert_rounded(shared, torch.cat(alone), 3 * depth(model))


def test_every_batch_is_shared_and_uneven_ones_are_not(drawn_by: list[Any]) -> None:
    done: list[int] = []
    sample(teacher(), 1, seeds=range(13), batch=8, on_progress=done.append)
    assert sorted(drawn_by) == [(False, 1, 4), (False, 1, 4), (True, 2, 5)]
    assert done == [8, 5]
    drawn_by.clear()
    sample(teacher(), 1, seeds=range(7))
    assert sorted(drawn_by) == [(False, 1, 3), (False, 1, 4)]


REFERENCE = ReferenceGuidance(image=torch.zeros(3, 8, 8), features=lambda x: x, correctors=0)
CALLERS: dict[str, tuple[dict[str, Any], int, SamplerSpec]] = {
    "channels": ({"channels": 8}, 8, SamplerSpec()),
    "size": ({"side": 4}, 8, SamplerSpec()),
    "weights that may change": ({"frozen": False}, 8, SamplerSpec()),
    "one image": ({}, 1, SamplerSpec()),
    "five images": ({}, 5, SamplerSpec()),
    "a reference": ({}, 8, SamplerSpec(reference=REFERENCE)),
}


@pytest.mark.parametrize("why", CALLERS)
def test_where_the_caller_draws_with_all_cores(why: str) -> None:
    options, batch, spec = CALLERS[why]
    assert _threads(teacher(), SamplerSpec(), 8) == 2
    assert _threads(teacher(**options), spec, batch) == 0


@pytest.mark.parametrize("way", ["float64", "bfloat16", "meta", "autocast", "compiled", "one core", "many cores"])
def test_where_threads_would_gain_nothing_or_must_not_be(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = teacher()
    if way == "bfloat16":
        model.flow.compute_dtype = torch.bfloat16
    elif way == "compiled":
        model.flow.network.compiled = True
    elif way in ("float64", "meta"):
        model.to(**{"dtype": torch.float64} if way == "float64" else {"device": "meta"})
    elif way == "one core":
        torch.set_num_threads(1)
    elif way == "many cores":
        monkeypatch.setattr(generate, "MOST_CORES", 1)
    with torch.autocast("cpu", enabled=way == "autocast"):
        assert _threads(model, SamplerSpec(), 8) == 0


def test_a_thread_that_has_its_share_of_the_cores_shares_nothing_out() -> None:
    def act(model: Denoiser) -> tuple[int, int]:
        return torch.get_num_threads(), _threads(model, SamplerSpec(), 8)

    assert list(ahead(act, [teacher()], 1, share_cores=True)) == [(2, 0)]


class Endless:
    """A network that computes for ever, but on class 0: there it fails, or presses Ctrl-C.  ended: what ended them."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.began, self.ended = fails, threading.Barrier(2), list[str]()

    def __call__(self, x: Tensor, condition: Conditioning) -> tuple[Tensor, ...]:
        try:
            self.began.wait(LIMIT)
            if condition.labels[0, 0] and self.fails:
                raise ValueError("the network fails")
            if condition.labels[0, 0]:
                os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000 * LIMIT):
                time.sleep(0.001)
            raise AssertionError("nothing ended it")
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise


@pytest.mark.parametrize(("fails", "error"), [(True, ValueError), (False, KeyboardInterrupt)])
def test_an_error_and_ctrl_c_come_out_and_end_all_threads(
    fails: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, network, before = teacher(), Endless(fails), set(threading.enumerate())
    monkeypatch.setattr(model.flow, "raw", network)
    with pytest.raises(error):
        sample(model, 1, seeds=SEEDS, labels=[0] * 4 + [1] * 4)  # a failure comes out after the shares before it
    assert sorted(network.ended) == ["SystemExit", "ValueError" if fails else "SystemExit"]
    assert set(threading.enumerate()) <= before
    assert torch.get_num_threads() == 2
