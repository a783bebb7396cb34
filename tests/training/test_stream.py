"""The stream of training data: the same from any position and with any workers, whatever becomes of these."""

import errno
import io
import itertools
import json
import multiprocessing
import os
import signal
import sys
import zipfile
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forked
from PIL import Image
from waiting import dead, wait_until

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.encoder import LatentEncoder
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.data import datasets
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.data.latents import draw_latents, latent_noise
from edmdistill.data.order import indices
from edmdistill.errors import DatasetError, TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.machine.signals import REQUESTS
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.training.prepare import prepare
from edmdistill.training.session import train
from edmdistill.training.stream import AHEAD, Stream

COUNT = 9
STATISTICS = LatentEncoder("StabilityVAEEncoder", scale=(0.5, 2.0, 1.0, 0.25), bias=(0.1, 0.0, -0.1, 1.0))


def write_set(path: Path, suffix: str) -> Path:
    """Nine images of 8x8 pixels, or their latents of 4 channels, in three classes."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(COUNT):
            out = io.BytesIO()
            if suffix == "png":
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "png")
            else:
                np.save(out, rng.random((8, 8, 8), dtype=np.float32))
            archive.writestr(f"{i}.{suffix}", out.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": [[f"{i}.{suffix}", i % 3] for i in range(COUNT)]}))
    return path


@pytest.fixture(autouse=True)
def too_large_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)


@pytest.fixture
def images(tmp_path: Path) -> Dataset:
    return open_dataset(write_set(tmp_path / "images.zip", "png"), xflip=True)


@pytest.fixture
def latents(tmp_path: Path) -> Dataset:
    return open_dataset(write_set(tmp_path / "latents.zip", "npy"))


def stream(data: Dataset, workers: int = 0, device: str = "cpu") -> Stream:
    statistics = STATISTICS if data.latent else None
    return Stream(data, seed=5, labels=True, scaling=statistics, workers=workers, device=torch.device(device))


def endless() -> Iterator[tuple[int, int]]:
    return ((start, start + 4) for start in itertools.count(0, 4))


@pytest.mark.parametrize("which", ["images", "latents"])
def test_whoever_reads_reads_the_same(which: str, request: pytest.FixtureRequest) -> None:
    """Some epochs at once, in uneven batches, by workers, and on from the middle."""
    data = request.getfixturevalue(which)
    whole = stream(data).read(0, 80)
    uneven = [(0, 1), (1, 3), (3, 10), (10, 35), (35, 36), (36, 60), (60, 80)]
    with stream(data, workers=2) as two:
        for reader, first in itertools.product([stream(data), two], [0, 4]):
            parts = list(reader.batches(iter(uneven[first:])))
            assert torch.equal(torch.cat([part.x0 for part in parts]), whole.x0[uneven[first][0] :])
            assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels[uneven[first][0] :])


def test_no_visit_of_latents_is_like_another(latents: Dataset) -> None:
    x0 = stream(latents).read(0, 3 * COUNT).x0
    assert len(x0.flatten(1).unique(dim=0)) == 3 * COUNT
    moments = latents.tensors(indices(5, 11, 2, COUNT))[0]
    assert torch.equal(x0[11:13], draw_latents(moments, latent_noise(5, 11, 13, 4, 8, 8), STATISTICS))


def test_requests_are_taken_as_they_are_needed(images: Dataset) -> None:
    taken = []
    with stream(images, workers=2) as two:
        batches = two.batches(request for request in endless() if taken.append(request) is None)
        for count in range(1, 10):
            next(batches)
            assert len(taken) <= count + 2 * AHEAD
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_member_is_one_sentence(workers: int, tmp_path: Path) -> None:
    path = write_set(tmp_path / "images.zip", "png")
    raw = bytearray(path.read_bytes())
    at = raw.index(b"7.png") + 40
    raw[at : at + 8] = bytes(8)
    path.write_bytes(raw)
    with (
        stream(open_dataset(path), workers=workers) as broken,
        pytest.raises(DatasetError, match=r"^\S+images\.zip: 7\.png is not a readable image \(Bad CRC-32 .*remove it$"),
    ):
        list(broken.batches([(0, COUNT)]))


def test_a_killed_worker_is_one_sentence(images: Dataset) -> None:
    with stream(images, workers=1) as one:
        batches = one.batches(endless())
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(TrainingError, match=r"^a data worker died, .*--workers 0 .*resumes from the last state$"):
            list(batches)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("edmdistill.training.stream.ProcessPoolExecutor.__init__", OSError(errno.EROFS, "Read-only file system")),
        ("edmdistill.training.stream.forkserver.ensure_running", BlockingIOError(errno.EAGAIN, "Try again")),
        ("edmdistill.training.stream.ProcessPoolExecutor.submit", BrokenPipeError(errno.EPIPE, "Broken pipe")),
        ("edmdistill.training.stream.ProcessPoolExecutor.submit", EOFError("unexpected EOF")),
    ],
    ids=["no /dev/shm", "no server", "the server has ended", "no fork"],
)
def test_a_worker_that_cannot_be_started_is_one_sentence(
    images: Dataset, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    def refuse(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(name, refuse)
    sentence = r"^a data worker cannot be started \(.*\): use fewer --workers, or "
    with pytest.raises(TrainingError, match=sentence), stream(images, workers=1) as one:
        next(one.batches(endless()))


def test_workers_leave_signals_to_the_main_process(images: Dataset) -> None:
    with stream(images, workers=2) as two:
        batches = two.batches(endless())
        next(batches)
        workers = multiprocessing.active_children()
        for worker, number in itertools.product(workers, REQUESTS):
            os.kill(worker.pid, number)
        for start in range(4, 200, 4):
            assert torch.equal(next(batches).x0, stream(images).read(start, start + 4).x0)
        assert multiprocessing.active_children() == workers


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_a_killed_run(tmp_path: Path) -> None:
    program = """if __name__ == "__main__":
        import multiprocessing, time, torch
        from edmdistill.data.datasets import open_dataset
        from edmdistill.training.stream import Stream
        with Stream(open_dataset("digits"), seed=0, labels=True, workers=2, device=torch.device("cpu")) as stream:
            list(stream.batches([(0, 8)] * 9))
            print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
            time.sleep(3600)
    """
    (tmp_path / "program.py").write_text(program)
    run = Forked(tmp_path / "program.py")
    wait_until(lambda: run.poll() is not None or run.said().endswith("\n"))
    workers = [int(worker) for worker in run.said().split()]
    run.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    wait_until(lambda: all(map(dead, workers)))


def test_workers_import_nothing_from_the_working_directory(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    forkserver._forkserver._stop()
    with stream(images, workers=1) as one:
        assert len(next(one.batches([(0, 2)])).x0) == 2
    assert "PYTHONSAFEPATH" not in os.environ


def test_a_run_does_not_depend_on_its_workers(recipe, teacher, tmp_path: Path) -> None:
    """Interrupted and resumed with workers = never interrupted, without any."""

    def run(workers: int):
        machine = Machine("cpu", workers=workers, micro_batch=3)
        return prepare(recipe("cosim", images=80, log_every=8), data="digits", teacher=teacher, machine=machine)

    def interrupt(images, measures):
        if images == 3 * 8:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    train(run(0), tmp_path / "0")
    assert train(run(2), tmp_path / "2", on_round=interrupt) == (False, 24)
    assert not multiprocessing.active_children()
    assert train(run(2), tmp_path / "2").finished
    one, other = (measured(tmp_path / name) for name in "02")
    assert one == other
    assert len(one) == 10


def measured(run_dir: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "memory")} for line in lines]


def test_latents_are_for_latent_teachers(recipe, teacher, latents: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = FlowNetwork(UNet(8, 4, 3, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]), EDM())
    encoder = {"kind": "StabilityVAEEncoder", "scale": STATISTICS.scale, "bias": STATISTICS.bias}
    config = CheckpointConfig(
        stage="teacher", provenance=Provenance(source="a test"), encoder=encoder, **describe(flow)
    )
    save_checkpoint(tmp_path / "latent", flow, config)

    def start(data: str, teacher: Path):
        return prepare(recipe("sid", seed=5), data=data, teacher=teacher, machine=Machine("cpu"))

    run = start(latents.name, tmp_path / "latent")
    assert torch.equal(run.stream().read(3, 20).x0, stream(latents).read(3, 20).x0)
    images = r"are images of 8x8 with 1 channel and 10 classes, but the network takes latents of 8x8 with 4 channels"
    with pytest.raises(DatasetError, match=images):
        start("digits", tmp_path / "latent")
    with pytest.raises(DatasetError, match=r"are latents of 8x8 with 4 channels .* takes images of 8x8 with 1 channel"):
        start(latents.name, teacher)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_on_the_gpu_as_they_were(workers: int, latents: Dataset) -> None:
    requests = [(start, start + 8) for start in range(0, 800, 8)]
    with stream(latents, workers, "cuda") as there:
        for batch, request in zip(there.batches(requests), requests, strict=True):
            assert batch.x0.is_cuda
            assert torch.equal(batch.x0.cpu(), stream(latents).read(*request).x0)
