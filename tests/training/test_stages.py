"""Progressive distillation in stages, each of which goes on from the one before."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edmdistill.checkpoints.load import load_flow
from edmdistill.errors import CheckpointError, EdmDistillError, TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.methods import METHODS
from edmdistill.methods.pd import PD
from edmdistill.publish.hub import build_package
from edmdistill.recipes.schema import Recipe
from edmdistill.training.prepare import prepare
from edmdistill.training.session import train


@pytest.fixture
def stage(recipe: Callable[..., Recipe]) -> Callable[..., Path]:
    """stage(teacher, run_dir, force_guidance, options): a run from a teacher, or from the run of the stage before."""

    def make(teacher: Path, run_dir: Path, force_guidance: bool = False, **options: object) -> Path:
        tables = recipe("pd").tables() | {"method": {"name": "pd"} | options, "sampling": {}}
        run = prepare(
            Recipe.from_tables(tables, "a test"),
            data="digits",
            teacher=teacher,
            machine=Machine("cpu"),
            force_guidance=force_guidance,
        )
        train(run, run_dir, on_message=lambda sentence: None)
        return run_dir

    return make


def test_stages_follow_one_another(stage: Callable[..., Path], teacher: Path, tmp_path: Path) -> None:
    four = stage(teacher, tmp_path / "four", steps=4)
    two = stage(four, tmp_path / "two", steps=2)
    configs = [load_flow(run)[1] for run in (four, two)]
    sigmas = [config.trained_sigmas for config in configs]
    assert (len(sigmas[0]), sigmas[1]) == (4, pytest.approx(sigmas[0][::2]))
    assert [config.sampling.gamma for config in configs] == [0, 0]
    card = build_package(two, "me/two").files["README.md"]
    assert isinstance(card, bytes)
    assert b"\n- Teacher: " in card


def test_a_stage_of_other_steps_is_refused_with_the_fix(
    stage: Callable[..., Path], teacher: Path, tmp_path: Path
) -> None:
    four = stage(teacher, tmp_path / "four", steps=4)
    with pytest.raises(
        TrainingError, match=r"it has 4 steps, and method.steps = 4 takes one of 8: set method.steps=2$"
    ):
        stage(four, tmp_path / "again", steps=4)
    one = stage(stage(four, tmp_path / "two", steps=2), tmp_path / "one", steps=1)
    with pytest.raises(
        TrainingError, match=r"this stage: it has 1 step, an odd number, which cannot be halved: give one of 8$"
    ):
        stage(one, tmp_path / "again", steps=4)


def test_the_first_stage_alone_is_guided(stage: Callable[..., Path], teacher: Path, tmp_path: Path) -> None:
    four = stage(teacher, tmp_path / "four", force_guidance=True, steps=4, guidance=[2.0, 2.0])
    with pytest.raises(TrainingError, match=r"has learned guidance, and pd would guide it again: leave out"):
        stage(four, tmp_path / "again", steps=2, guidance=[2.0, 2.0])
    guidance = load_flow(stage(four, tmp_path / "two", steps=2))[1].guidance
    assert guidance is not None
    assert guidance.range == (2, 2)


def test_a_stage_of_certain_steps_is_for_methods_that_take_it(
    stage: Callable[..., Path], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = stage(teacher, tmp_path / "four", steps=4)
    monkeypatch.setattr(PD, "stages_have_steps", False)
    with pytest.raises(CheckpointError, match=r"trained for 4 steps and does not jump .* must: give one that does$"):
        stage(four, tmp_path / "two", steps=2)
    monkeypatch.setattr(PD, "first_stages", ("ect",))
    with pytest.raises(CheckpointError, match=r"is a generator of pd, not a first stage: train one by ect$"):
        stage(four, tmp_path / "two", steps=2)
    with pytest.raises(CheckpointError, match="is a teacher, not a first stage"):
        stage(teacher, tmp_path / "two", steps=2)


def test_a_run_by_a_method_that_is_not_installed(
    stage: Callable[..., Path], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its generator needs nothing; what reads the run's recipe says what is missing."""
    four = stage(teacher, tmp_path / "four", steps=4)
    for name in reversed(list(METHODS)):  # what is put back comes last, and the order is that of --help
        monkeypatch.delitem(METHODS, name)
    assert load_flow(four)[1].method == "pd"
    with pytest.raises(
        EdmDistillError, match=r"four: the run was trained by 'pd', a method that neither .*: install the package"
    ):
        build_package(four, "me/four")
