"""Two processes against one: the same run, whole or sharded, in micro-batches or not."""

import json
import math
import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_by_two
from toy_runs import save_sources

from edmdistill.checkpoints.store import load_checkpoint
from edmdistill.errors import TrainingError
from edmdistill.kernels.linear import tf32_allowed
from edmdistill.machine import devices
from edmdistill.machine.engine import Engine, Machine, scale_gradients

SCRIPT = Path(__file__).parent / "spread.py"
SPREAD = runpy.run_path(str(SCRIPT))
# Of the batch of 8 a process has 4 rows, at once or in parts; whole networks by DDP, sharded ones by FSDP2.
WAYS = {
    "2 rounds: ddp-micro-batches, fsdp2-whole": ("2", "2", "4s"),
    "10 rounds: ddp-micro-batches, fsdp2-whole": ("10", "1", "4s"),
    "10 rounds: ddp-whole, fsdp2-micro-batches": ("10", "4", "1s"),
}
Losses = dict[str, list[dict[str, float]]]
Measured = Callable[[str], tuple[Losses, Losses]]


def some(way: str, *case: str) -> Any:
    """The parameters of a test; those of 10 rounds are for `make test-all`."""
    return pytest.param(way, *case, marks=pytest.mark.slow if WAYS[way][0] == "10" else ())


@pytest.fixture(scope="module")
def losses(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Of every round of every case, in one process and in two."""

    @cache
    def measured(way: str) -> tuple[Losses, Losses]:
        folder = tmp_path_factory.mktemp("losses")
        flow, config = load_checkpoint(teacher)
        save_sources(folder / "teacher", flow.double(), config)
        rounds, *shared = WAYS[way]
        one = SPREAD["measured"](folder / "teacher", rounds, "8")
        run_by_two(SCRIPT, folder / "teacher", folder / "two.json", rounds, *shared)
        return one, json.loads((folder / "two.json").read_text())

    return measured


@pytest.mark.parametrize("shared_by", [0, 1], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("way", "case"),
    [some(way, case) for way, (count, *_) in WAYS.items() for case in SPREAD["CASES" if count == "10" else "FEW"]],
)
def test_two_processes_train_as_one_does(losses: Measured, way: str, case: str, shared_by: int) -> None:
    """The losses of all turns over all rounds; one process takes the batch of 8 whole.

    In float64: in float32 Adam makes 1e-6 of the rounding, 1.4e-6 at worst in the generator's loss, a difference.
    """
    one, two = losses(way)
    whole, shared = one[f"{case} 8"], [run for name, run in two.items() if name.rpartition(" ")[0] == case][shared_by]
    assert len(whole) == len(shared) >= 2
    names = {name for name in whole[0] if name.startswith("loss/") and name.count("/") == 1}
    assert names
    assert {name.replace("loss", "grad_norm") for name in names} <= whole[0].keys()
    for before, after in zip(whole, shared, strict=True):
        # diversity is that of a micro-batch; the rest of the last round stands below
        for name in (before.keys() & after.keys()) - {"diversity"}:
            if not name.startswith(("apart/", "average/")):
                assert after[name] == pytest.approx(before[name], rel=1e-9, abs=1e-9), name
    # Every process has the same weights, a discriminator's too.
    assert all(gap < 1e-15 for name, gap in shared[-1].items() if name.startswith("apart/"))
    for name in ("average/half-life", "average/sigma-rel-0.100"):
        assert shared[-1][name] == pytest.approx(whole[-1][name], rel=1e-9), name


@pytest.mark.parametrize("way", [some(way) for way in WAYS])
def test_the_losses_move(losses: Measured, way: str) -> None:
    """What the comparison rests on: rounds differ by far more than it tolerates."""
    for case, rounds in losses(way)[0].items():
        name = next(name for name in rounds[0] if name.startswith("loss/"))
        assert max(measures[name] for measures in rounds) > 1.001 * min(measures[name] for measures in rounds), case


@pytest.mark.slow
def test_a_rounded_second_moment_is_sharded_and_resumes(teacher: Path, tmp_path: Path) -> None:
    run_by_two(SCRIPT.with_name("rounded_shards.py"), teacher, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["differ"], found["dtypes"]) == ([], ["torch.bfloat16"])
    assert 0 < found["distance"] < 0.02


@given(
    groups=st.integers(1, 300), world=st.integers(1, 9), size=st.none() | st.integers(1, 64), group=st.integers(1, 5)
)
def test_every_row_belongs_to_one_micro_batch_of_one_process(
    groups: int, world: int, size: int | None, group: int
) -> None:
    """And the rows of a group to the same."""
    engine, batch, shares = Engine(Machine(device="cpu", micro_batch=size)), groups * group, []
    for engine.rank in range(world):
        engine.world_size = world
        together = groups if size is None else size // group
        refusal = "too small for" if groups < world else "too small, because" if not together else None
        if not refusal and groups // world < math.ceil(math.ceil(groups / world) / together):
            refusal = "micro-batches on each of"
        if refusal:
            with pytest.raises(TrainingError, match=refusal):
                engine.micro_batches(batch, group)
            return
        shares.append(engine.micro_batches(batch, group))
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for piece in share for row in range(piece.start, piece.stop)]
    assert rows == list(range(batch))
    assert all(0 < piece.stop - piece.start <= (size or batch) for share in shares for piece in share)
    assert all(piece.start % group == piece.stop % group == 0 for share in shares for piece in share)


def test_shards_need_processes() -> None:
    with pytest.raises(TrainingError, match="add --processes"):
        Engine(Machine(device="cpu", shard=True))


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("fp16", False)])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_products_on_cuda_are_exact_unless_tf32_is_asked_for(device: str, precision: str, allowed: bool) -> None:
    """And no sum is rounded to float16."""
    products, engine = torch.backends.cuda.matmul, Engine(Machine(device="cpu"))
    engine.device = torch.device(device)
    default = products.allow_fp16_reduced_precision_reduction
    try:
        for before in (False, True):
            products.allow_fp16_reduced_precision_reduction = True
            with tf32_allowed(before):
                engine.set_products(precision)
                assert torch.backends.cudnn.allow_tf32 == (allowed if device == "cuda" else before)
            assert products.allow_fp16_reduced_precision_reduction == (device == "cpu")
    finally:
        products.allow_fp16_reduced_precision_reduction = default


def test_a_process_touches_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first tensor on `cuda` would take half a gigabyte of GPU 0 for each process of the machine."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = []

    def pick(name: str) -> None:
        asked.append(name)
        raise TrainingError("no GPU is here")

    monkeypatch.setattr(devices, "pick_device", pick)
    for device in ("cuda", None):
        with pytest.raises(TrainingError, match="no GPU"):
            Engine(Machine(device=device))
    assert asked == ["cuda:1", "cuda:1"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_gpu_run_saves_is_a_copy(device: str) -> None:
    """Offloaded averages and optimizers too, which are in the host's memory: files are written beside training."""
    engine, trained = Engine(Machine(device="cpu")), torch.ones(2)
    engine.device = torch.device(device)
    saved = engine.gather({"weight": trained})["weight"]
    assert (saved.data_ptr() == trained.data_ptr()) == (device == "cpu")
    assert torch.equal(saved, trained)


def test_gradients_are_scaled_in_place() -> None:
    layer = torch.nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    before = [parameter.grad.clone() for parameter in layer.parameters()]
    scale_gradients(layer.parameters(), 0.25)
    assert all(torch.equal(p.grad, g / 4) for p, g in zip(layer.parameters(), before, strict=True))
