"""An evaluation that is stopped goes on, and one that several processes share gives the number of one process."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from ranks import Rank, in_ranks
from tiny_generator import tiny_generator

from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.load import load_generator
from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.data.datasets import open_dataset
from edmdistill.embedded import EMBEDDED
from edmdistill.evaluation import images
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.results import Result
from edmdistill.evaluation.shards import Work
from edmdistill.sampling.spec import SamplerSpec

DATA = open_dataset("digits", split="test")
COUNT, BLOCK = 30, 8


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(images.BLOCKS, 16, BLOCK)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return load_generator(tiny_generator(tmp_path_factory.mktemp("model") / "generator"))


def measured(model: Generator, **options: Any) -> Result:
    return evaluate(
        model,
        DATA,
        protocol="pixels",
        metrics=["fd_pixels", "fd_digits", "class_accuracy"],
        sampler=SamplerSpec(nfe=1),
        **({"seeds": range(COUNT)} | options),
    )


@pytest.fixture(scope="module")
def whole(model: Generator) -> Result:
    return measured(model)


def count_draws(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Records the seeds that are drawn, and raises KeyboardInterrupt in place of the draw after `most`."""
    draw: Callable[..., Any] = images.generate_images
    drawn: list[int] = []

    def generate(model: Any, spec: Any, seeds: Sequence[int], *args: Any, **options: Any) -> Any:
        if len(drawn) >= most:
            raise KeyboardInterrupt
        drawn.extend(seeds)
        return draw(model, spec, seeds, *args, **options)

    monkeypatch.setattr(images, "generate_images", generate)
    return drawn


def test_it_goes_on_to_the_same_number(
    model: Generator, whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    for most in (8, 8, COUNT):
        with monkeypatch.context() as patch:
            seen.append(count_draws(patch, most))
            work = Work(tmp_path)
            if most < COUNT:
                with pytest.raises(KeyboardInterrupt):
                    measured(model, work=work)
                work.close()  # as the end of the process does
            else:
                result = measured(model, work=work)
    assert result == whole
    assert sorted(seed for part in seen for seed in part) == list(range(COUNT))
    assert all(seen)
    monkeypatch.setattr(images, "generate_images", pytest.fail)
    assert measured(model, work=work) == whole  # until the results of the command are written
    work.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [{"seeds": range(1, COUNT + 1)}, {"metrics": ["fd_pixels"]}, {"repeat": 2}])
def test_another_evaluation_does_not_go_on_with_it(model: Generator, tmp_path: Path, other: dict[str, Any]) -> None:
    work, options = Work(tmp_path), {"protocol": "digits", "sampler": SamplerSpec(nfe=1), "seeds": range(8)}
    evaluate(model, work=work, **options)
    assert evaluate(model, work=work, **(options | other)) == evaluate(model, **(options | other))


@pytest.mark.parametrize("world_size", [2, 5])
def test_processes_give_the_number_of_one(model: Generator, whole: Result, tmp_path: Path, world_size: int) -> None:
    def act(rank: Rank) -> Result:
        return measured(model, work=Work(tmp_path), processes=rank)

    assert in_ranks(world_size, act) == [whole] * world_size
    in_memory = in_ranks(world_size, lambda rank: measured(model, processes=rank))
    assert [result.metrics for result in in_memory] == [whole.metrics] * world_size
    assert in_memory[0] == whole


def test_references_do_not_go_on_with_one_another(tmp_path: Path) -> None:
    """Neither of other images, nor of other weights; but two commands may read one at once."""
    sets = [open_dataset("digits", split=split) for split in ("test", "train")]
    np.savez(tmp_path / "ours.npz", images=sets[1].images(range(20)).permute(0, 2, 3, 1).numpy())
    tensors, metadata = load_tensors(EMBEDDED["digits"].features)
    other = tmp_path / "other.safetensors"
    save_tensors(other, tensors | {"hidden.weight": tensors["hidden.weight"] / 2}, metadata)
    works = [Work(tmp_path / "work") for _ in range(2)]
    for data, weights, work in ((0, {}, 0), (1, {}, 0), (0, {"digits": other}, 0), (0, {"digits": other}, 1)):
        metric = "fd_digits" if work == 0 else "kd_digits"
        options = {"protocol": "pixels", "metrics": [metric], "weights": weights}
        found = evaluate(tmp_path / "ours.npz", sets[data], work=works[work], **options)
        assert found.metrics == pytest.approx(evaluate(tmp_path / "ours.npz", sets[data], **options).metrics, rel=1e-9)


def test_repetitions_have_consecutive_seeds_and_are_averaged(model: Generator) -> None:
    twice = measured(model, repeat=2)
    apart = [measured(model, seeds=range(at, at + COUNT)).metrics for at in (0, COUNT)]
    assert list(twice.repetitions) == [pytest.approx(metrics, rel=1e-9) for metrics in apart]
    assert twice.metrics == pytest.approx({name: (apart[0][name] + apart[1][name]) / 2 for name in apart[0]})
    assert (twice.protocol.n, twice.protocol.repeat, twice.protocol.seeds) == (COUNT, 2, f"0-{2 * COUNT - 1}")


def test_one_pass_draws_each_image_once_for_all_metrics(model: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = count_draws(monkeypatch, COUNT)
    result = measured(model)
    assert sorted(drawn) == list(range(COUNT))
    assert list(result.metrics) == [f"{name}@{COUNT}" for name in ("fd_pixels", "fd_digits", "class_accuracy")]
    assert list(result.protocol.weights) == ["pixels", "digits"]


def test_classes_are_drawn_from_the_seeds_where_the_protocol_says_so(
    model: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROTOCOLS, "pixels", replace(PROTOCOLS["pixels"], labels="drawn"))
    drawn, balanced = measured(model), measured(model, seeds=range(COUNT))
    assert drawn.protocol.labels == "drawn"
    assert drawn == balanced
