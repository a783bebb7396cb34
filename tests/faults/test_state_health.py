"""States that were saved in illness: none of them is called good, and the newest healthy one is never removed."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edmdistill.checkpoints.layout import saved_states
from edmdistill.checkpoints.run_state import HealthProgress, IntervalProgress, Progress, read_progress
from edmdistill.data.order import indices
from edmdistill.errors import TrainingError
from edmdistill.training import monitors
from edmdistill.training.monitors import Health
from edmdistill.training.run import Run
from edmdistill.training.session import train
from edmdistill.training.state import State, newest_healthy, save_state

WELL, ILL = {"diversity": 0.8}, {"diversity": 0.1}


def save(folder: Path, images: int, health: HealthProgress, keep: int) -> None:
    progress = Progress(images=images, window=IntervalProgress(), health=health, sha256={})
    save_state(folder, State(progress, {"generator": {"a": torch.zeros(1)}}), keep)


@settings(max_examples=12)  # every state is waited for until the disk has it
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 3), st.sampled_from([1, 2]))
def test_the_newest_healthy_state_stays(
    tmp_path_factory: pytest.TempPathFactory, ill: list[bool], keep: int, lines: int
):
    """Lines and states that come together, or `lines` of them between two states."""
    folder, health, good = tmp_path_factory.mktemp("state"), Health(), 0
    for number, bad in enumerate(ill, 1):
        for line in range(lines):
            health.check((ILL if bad and line == 0 else WELL) | {"images": number * 8 - lines + 1 + line})
        save(folder, number * 8, health.begin_interval(), keep)
        good = good if bad else number * 8
        healthy = newest_healthy(folder, health.last_healthy)
        assert (0 if healthy is None else int(healthy.name)) == good
        newest = {8 * own for own in range(max(number - keep, 0) + 1, number + 1)}
        assert {int(path.name) for path in saved_states(folder)} == newest | ({good} if good else set())


def test_a_state_between_two_lines_waits_for_the_second(tmp_path: Path):
    """A line judges the rounds since the one before it, and so the states among them."""
    health = Health()
    health.check(WELL | {"images": 16})
    for images in (16, 24):
        save(tmp_path, images, health.begin_interval(), 9)
    health.check(ILL | {"images": 32})
    healthy = newest_healthy(tmp_path, health.last_healthy)
    assert healthy is not None
    assert healthy.name == "000000000016"
    save(tmp_path, 40, health.begin_interval(), 9)
    health.check(WELL | {"images": 48})
    save(tmp_path, 48, health.begin_interval(), 9)
    found = [read_progress(path).health.symptoms for path in saved_states(tmp_path)]
    assert found == [[], [], ["collapse"], []]


@pytest.mark.parametrize("cut", range(1, 6))
def test_patience_outlives_a_resume(cut: int):
    """Health that is saved and put back at any line raises the alarms of one that never was."""
    lines = [WELL, ILL, ILL, ILL, WELL, ILL, ILL]
    norms = [1.0, 1.0, 1.0, 1.0, 1.0, 90.0, 90.0]
    measured = [
        line | {"images": 8 * number, "grad_norm/generator": norm}
        for number, (line, norm) in enumerate(zip(lines, norms, strict=True))
    ]
    whole, first = Health(), Health()
    expected = [whole.check(line) for line in measured]
    found = [first.check(line) for line in measured[:cut]]
    second = Health(first.begin_interval())
    found += [second.check(line) for line in measured[cut:]]
    assert found == expected
    assert [{alarm.kind for alarm in alarms if alarm.begins} for alarms in found] == [
        *[set(), set(), {"collapse"}, set(), set(), set()],
        {"collapse", "runaway"},
    ]


def test_a_run_that_falls_ill_names_the_state_before(
    start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """keep = 1; the illness shows from 32 images on, and a resume in it stops at the next line."""
    monkeypatch.setattr(monitors, "LEAST_DIVERSITY", -1.0)
    monkeypatch.setattr(monitors, "MEAN_OFF", math.inf)
    monkeypatch.setattr(monitors, "STD_RATIOS", (-1.0, math.inf))
    options = {"images": 240, "log_every": 8, "snapshot_every": 8, "keep": 1}
    for begins in (32, 0):

        def on_round(images: int, measures: object, begins: int = begins) -> None:
            monkeypatch.setattr(monitors, "LEAST_DIVERSITY", math.inf if images >= begins else -1.0)

        with pytest.raises(TrainingError, match=r"the last good state is .*000000000024; try .* by --init .*24, or"):
            train(start("cosim", **options), tmp_path / "run", stop_on={"collapse"}, on_round=on_round, on_message=str)
        assert [path.name for path in saved_states(tmp_path / "run/state")] == ["000000000024", "000000000032"]


def test_broken_weights_of_the_teacher_are_the_teachers(start: Callable[..., Run], tmp_path: Path):
    run = start("sid", images=80)

    def poison(images: int, measures: object) -> None:
        with torch.no_grad():
            run.networks["teacher"].network.out_conv.weight.fill_(math.nan)

    with pytest.raises(TrainingError) as error:
        train(run, tmp_path / "run", on_round=poison)
    assert "first in the weights teacher.network.out_conv.weight" in str(error.value)
    assert str(error.value).endswith("give a teacher whose weights are finite, and a new --run-dir")


def test_broken_data_are_the_datas(start: Callable[..., Run], tmp_path: Path):
    run = start("cosim", images=80)
    read, broken = run.dataset.tensors, int(indices(0, 18, 1, len(run.dataset)))  # of the second round's first turn

    def poisoned(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x0, labels = read(wanted)
        x0[torch.as_tensor(wanted) == broken] = math.nan
        return x0, labels

    run.dataset.tensors = poisoned
    with pytest.raises(TrainingError) as error:
        train(run, tmp_path / "run", on_message=str)
    assert str(error.value).endswith(
        f"gave no finite number: the data hold NaN or infinity, first {run.dataset.files[broken]} of digits; "
        "give sound data and a new --run-dir"
    )
