"""Tuned schedules of a generator: what is measured is eval's, and only what was confirmed is stored and used."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace
from tiny_generator import tiny_generator

from edmdistill.checkpoints.config import CheckpointConfig, read_config, write_config
from edmdistill.checkpoints.documents import markdown
from edmdistill.checkpoints.load import load_generator
from edmdistill.checkpoints.tuning import Tuning
from edmdistill.errors import CheckpointError, EdmDistillError, NotFiniteError
from edmdistill.evaluation import tune as module
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.protocol import Protocol, Reference
from edmdistill.evaluation.results import Result
from edmdistill.evaluation.tune import (
    describe_tuning,
    find_generator,
    find_measure,
    store_tunings,
    tune_schedule,
    tune_schedules,
    tuning_json,
)
from edmdistill.publish.card import card
from edmdistill.sampling.generate import sample
from edmdistill.sampling.spec import SamplerRecord, SamplerSpec
from edmdistill.sampling.tune import FIRST_SEED, TuningPlan
from edmdistill.trigflow import time_to_sigma

PLAN = TuningPlan(n=10)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generator(tmp_path_factory.mktemp("made") / "generator")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "generator")


def toy(value: Callable[[list[float], int], float], metric: str = "fd_digits@10") -> Callable[..., Result]:
    """An evaluation whose metric is a function of the noise levels and the first seed."""

    def measure(*, sampler: SamplerSpec, seeds: range, on_progress: Callable[[int], object]) -> Result:
        on_progress(len(seeds))
        sigmas = time_to_sigma(torch.tensor(sampler.times, dtype=torch.float64), 0.5).tolist()
        return Result(
            metrics={metric: value(sigmas, seeds.start)},
            protocol=Protocol(name="digits", metrics=(metric,), features="digits", reference=Reference(source="a")),
            protocol_sha256="0",
            sampler=SamplerRecord(solver="gamma", nfe=len(sigmas), gamma=1.0, sigmas=tuple(sigmas)),
            provenance={"source_sha256": "1"},
        )

    return measure


def nearer_to_ten(sigmas: list[float], seed: int) -> float:
    return (sigmas[-1] - 10.06) ** 2 + seed % 3 * 0.01


def test_the_winner_is_stored_with_its_numbers_and_used(folder: Path) -> None:
    before = read_config(folder)
    (tuning,) = tune_schedules(toy(nearer_to_ten), folder, [2], PLAN).values()
    assert tuning.confirmed
    assert tuning.sigmas == (80.0, 10.06)
    assert store_tunings(folder, {2: tuning})
    after = read_config(folder)
    assert after.sampling.sigmas == {"1": (80.0,), "2": (80.0, 10.06)}
    assert after.tunings == {"2": tuning}
    assert replace(after, sampling=before.sampling, tunings={}) == before
    assert tuning.images == 10 * (tuning.schedules + 6)
    assert tuning.gain == pytest.approx(fmean(tuning.before_values) - fmean(tuning.values))
    assert len(tuning.values) == 3

    generator = load_generator(folder)
    labels = torch.zeros(2, dtype=torch.int64)
    used, given = (
        sample(generator, seeds=range(2), labels=labels, **how)
        for how in ({"nfe": 2}, {"times": generator.schedule(2)})
    )
    assert torch.equal(used, given)
    assert time_to_sigma(generator.schedule(2), 0.5).tolist() == pytest.approx([80.0, 10.06])
    text = card(after, "me/it")
    assert "| 2 | 80 10.06 |" in text
    assert f"2: {markdown(tuning.words)}, protocol digits; before, they were 80 2.515" in text


@pytest.mark.parametrize("worse", [-1, 0])
def test_what_held_out_seeds_do_not_confirm_is_not_stored(folder: Path, worse: int) -> None:
    """The search's own seeds prefer it: on others it is worse, or the same."""

    def value(sigmas: list[float], seed: int) -> float:
        return nearer_to_ten(sigmas, 0) * (1 if seed == FIRST_SEED else worse)

    before = (folder / "config.json").read_bytes()
    tunings = tune_schedules(toy(value), folder, [2], PLAN)
    assert not tunings[2].confirmed
    assert not store_tunings(folder, tunings)
    assert (folder / "config.json").read_bytes() == before
    assert "80 2.515 stays, for 80 10.06 is not better by more than the spread; fd_digits@10" in describe_tuning(
        2, tunings[2]
    )


def test_a_metric_may_be_better_where_it_is_higher(folder: Path) -> None:
    measure = toy(lambda sigmas, seed: 1 - nearer_to_ten(sigmas, seed) / 1e4, "class_accuracy@10")
    tuning = tune_schedules(measure, folder, [2], PLAN)[2]
    assert tuning.sigmas == (80.0, 10.06)
    assert fmean(tuning.values) > fmean(tuning.before_values) > 0


def test_a_stored_schedule_is_what_has_to_be_beaten(folder: Path) -> None:
    tunings = tune_schedules(toy(nearer_to_ten), folder, [2], PLAN)
    store_tunings(folder, tunings)
    again = tune_schedules(toy(nearer_to_ten), folder, [2], PLAN)[2]
    assert again.before == again.sigmas == tunings[2].sigmas
    assert describe_tuning(2, again).startswith("2 NFE: 80 10.06 stays; none was better in ")
    assert not store_tunings(folder, {2: again})


def test_levels_that_overflow_are_not_chosen(folder: Path) -> None:
    def value(sigmas: list[float], seed: int) -> float:
        if sigmas[-1] > 4:
            raise NotFiniteError("a sample is NaN")
        return nearer_to_ten(sigmas, seed)

    assert tune_schedules(toy(value), folder, [2], PLAN)[2].sigmas == (80.0, 3.557)

    def never(sigmas: list[float], seed: int) -> float:
        raise NotFiniteError("a sample is NaN")

    with pytest.raises(NotFiniteError):
        tune_schedules(toy(never), folder, [2], PLAN)


def test_on_several_processes_what_overflows_ends_the_search(folder: Path) -> None:
    """Each draws some of the images: on the others they are finite."""

    def overflows(sigmas: list[float], seed: int) -> float:
        if sigmas[-1] > 5:
            raise NotFiniteError("a sample is NaN")
        return 1.0

    assert not tune_schedules(toy(overflows), folder, [2], PLAN)[2].confirmed
    with pytest.raises(NotFiniteError):
        tune_schedules(toy(overflows), folder, [2], PLAN, SimpleNamespace(rank=0, world_size=2))


def test_a_confirmation_that_overflows_ends_the_search(folder: Path) -> None:
    def held_out(sigmas: list[float], seed: int) -> float:
        if seed != FIRST_SEED:
            raise NotFiniteError("a sample is NaN")
        return nearer_to_ten(sigmas, seed)

    with pytest.raises(NotFiniteError):
        tune_schedules(toy(held_out), folder, [2], PLAN)


def test_tunings_of_other_numbers_of_steps_stay_and_are_told(folder: Path) -> None:
    def quarter(**asked: Any) -> Result:
        result = toy(nearer_to_ten)(**asked)
        return replace(result, sampler=replace(result.sampler, gamma=0.25))

    two, three = (tune_schedules(quarter, folder, [nfe], PLAN)[nfe] for nfe in (2, 3))
    assert two.gamma == three.gamma == 0.25
    assert store_tunings(folder, {2: two})
    assert store_tunings(folder, {3: three})
    assert read_config(folder).tunings == {"2": two, "3": three}
    told = json.loads(tuning_json("it", {2: two, 4: replace(two, gain=0.0)}))["schedules"]
    assert [told[nfe]["confirmed"] for nfe in ("2", "4")] == [True, False]


def test_what_cannot_be_stored_is_said_before_it_is_searched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "unwritable", lambda path: path)
    with pytest.raises(
        EdmDistillError, match=r"this user may not write in .*config\.json: copy the checkpoint, or add --dr"
    ):
        find_generator(folder)
    assert find_generator(folder, stored=False) == folder


def test_a_number_of_steps_is_tuned_once(folder: Path) -> None:
    measured: list[int] = []
    tunings = tune_schedules(
        toy(lambda sigmas, seed: measured.append(seed) or nearer_to_ten(sigmas, seed)), folder, [1, 1], PLAN
    )
    assert [*tunings] == [1]
    assert len(measured) == tunings[1].images // PLAN.n


def test_a_value_is_evals(folder: Path) -> None:
    """The schedule in use is measured as `eval` does: with the same numbers on the same seeds."""
    model, common = load_generator(folder), {"protocol": "digits", "metrics": ["fd_digits"]}
    measure: Any = partial(evaluate, model, **common)
    tuning = tune_schedule(measure, read_config(folder), 2, TuningPlan(n=10, sets=2, images=140))
    assert tuning.values
    direct = evaluate(model, **common, sampler=SamplerSpec(nfe=2), seeds=range(FIRST_SEED + 10, FIRST_SEED + 20))
    assert tuning.before_values[0] == direct.metrics["fd_digits@10"]
    assert (tuning.metric, tuning.protocol, tuning.gamma) == ("fd_digits@10", "digits", 1.0)
    assert (tuning.search_seeds, tuning.held_out_seeds) == ("10000000-10000009", "10000010-10000029")
    assert direct.protocol.reference is not None
    assert tuning.reference == direct.protocol.reference.sha256


def test_a_schedule_carries_how_it_was_measured_as_a_result_does(folder: Path) -> None:
    model = load_generator(folder, dtype=torch.bfloat16)
    measure: Any = partial(evaluate, model, protocol="digits", metrics=["fd_digits"])
    tuning = tune_schedule(measure, read_config(folder), 2, TuningPlan(n=10, sets=2, images=140))
    store_tunings(folder, {2: replace(tuning, gain=1.0, spread=0.0)})
    stored, result = read_config(folder).tunings["2"], measure(sampler=SamplerSpec(nfe=2), seeds=range(10))
    assert result.sampler is not None
    assert (stored.dtype, stored.guidance) == ("bfloat16", 1.0) == (result.sampler.dtype, result.sampler.guidance)
    assert stored.weights == result.protocol.weights != {}
    assert stored.decoder == result.protocol.decoder
    for name in ("edmdistill", "revision", "torch", "device"):
        assert getattr(stored, name) == result.provenance[name]
    assert stored.words.endswith(" held-out seeds, in bfloat16")


def test_a_metric_names_its_protocol() -> None:
    assert find_measure("fd_digits", None) == ("fd_digits", "digits")
    assert find_measure("fid", None) == ("fid", "edm")
    assert find_measure("fd_dinov2", None) == ("fd_dinov2", "edm2")
    assert find_measure(None, "digits") == ("fd_digits", "digits")
    assert find_measure("kid", "edm2") == ("kid", "edm2")
    for metric in (None, "kid"):
        with pytest.raises(EdmDistillError, match="add --protocol"):
            find_measure(metric, None)


def test_a_run_keeps_it_in_its_generator(folder: Path, tmp_path: Path) -> None:
    assert find_generator(tmp_path) == folder
    with pytest.raises(EdmDistillError, match="no folder here"):
        find_generator("me/it")
    write_config(folder, replace(read_config(folder), stage="teacher"))
    with pytest.raises(EdmDistillError, match="is a teacher, and schedules are tuned of generators"):
        find_generator(folder)


def test_an_untrusted_record_is_checked(folder: Path) -> None:
    tuning = msgspec.to_builtins(tune_schedules(toy(nearer_to_ten), folder, [2], PLAN)[2])
    fields = msgspec.to_builtins(read_config(folder))
    for wrong in ({"values": [1.0]}, {"values": [1.0], "before_values": [1.0]}, {"sigmas": [-1.0]}, {"more": 1}):
        document = fields | {"tunings": {"2": tuning | wrong}}
        (folder / "config.json").write_bytes(msgspec.json.encode(document))
        with pytest.raises(CheckpointError, match="is not a checkpoint's configuration: tunings"):
            read_config(folder)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(tuning | {"n": -1}, Tuning)
    assert msgspec.convert(fields, CheckpointConfig).tunings == {}
