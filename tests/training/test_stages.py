"""A method of somebody's own in stages: each goes on from the one before, as progressive distillation does."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from edmdistill.checkpoints.load import load_flow
from edmdistill.draws import Draws
from edmdistill.errors import CheckpointError, EdmDistillError
from edmdistill.machine.engine import Machine
from edmdistill.methods import METHODS, MethodEntry
from edmdistill.methods.base import Batch, Loss, Method, NoiseRange, Role, Sampling, Turn
from edmdistill.publish.hub import build_package
from edmdistill.recipes.schema import Recipe
from edmdistill.schedules import generator_sigmas
from edmdistill.training.prepare import prepare
from edmdistill.training.session import train
from edmdistill.trigflow import ddim_step, diffuse, sigma_to_time


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    steps: int = 4


class Halving(Method[Options]):
    """One step of the generator is two of the teacher's."""

    Config = Options
    roles = {"teacher": Role(trained=False), "generator": Role(trained=True)}
    first_stages = ("diffusion", "halving")
    stages_have_steps = True

    @classmethod
    def sampling(cls, config: Options) -> Sampling:
        return Sampling(steps=config.steps, gamma=0.0)

    @classmethod
    def schedule(cls, config: Options, noise: NoiseRange) -> tuple[float, ...]:
        return tuple(generator_sigmas(2 * config.steps, noise.sigma_min, noise.sigma_max)[::2].tolist())

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("generator", self.loss),)

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        levels = generator_sigmas(2 * self.config.steps, self.noise.sigma_min, self.noise.sigma_max)
        sigma_data, grid = self.noise.sigma_data, torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
        first = 2 * (draws.uniform() * self.config.steps).long()
        t, between, s = (sigma_to_time(grid[first + i], sigma_data) for i in range(3))
        teacher, generator = self.networks["teacher"], self.networks["generator"]
        x_t = diffuse(batch.x0, draws.normal_like(batch.x0, sigma_data), t)
        with torch.no_grad():
            x = ddim_step(x_t, teacher(x_t, t, batch.labels), t, between, sigma_data)
            target = ddim_step(x, teacher(x, between, batch.labels), between, s, sigma_data)
        error = ddim_step(x_t, generator(x_t, t, batch.labels), t, s, sigma_data) - target
        return Loss(error.square().flatten(1).mean(1), t)


@pytest.fixture
def stage(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """stage(teacher, steps, run_dir): trains so few steps from a teacher, or from a run of more."""
    monkeypatch.setitem(METHODS, "halving", MethodEntry(f"{__name__}:Halving", "Halving: half of the steps."))

    def make(teacher: Path, steps: int, run_dir: Path) -> Path:
        tables = recipe("kd").tables()
        tables |= {"method": {"name": "halving", "steps": steps}, "sampling": {}}
        run = prepare(Recipe.from_tables(tables, "a test"), data="digits", teacher=teacher, machine=Machine("cpu"))
        train(run, run_dir, on_message=lambda sentence: None)
        return run_dir

    return make


def test_stages_follow_one_another(stage: Callable[..., Path], teacher: Path, tmp_path: Path) -> None:
    four = stage(teacher, 4, tmp_path / "four")
    two = stage(four, 2, tmp_path / "two")
    sigmas = [load_flow(run)[1].trained_sigmas for run in (four, two)]
    assert (len(sigmas[0]), sigmas[1]) == (4, pytest.approx(sigmas[0][::2]))
    card = build_package(two, "me/two").files["README.md"]
    assert isinstance(card, bytes)
    assert b"\n- Teacher: " in card


def test_a_stage_of_certain_steps_is_for_methods_that_take_it(
    stage: Callable[..., Path], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = stage(teacher, 4, tmp_path / "four")
    monkeypatch.setattr(Halving, "stages_have_steps", False)
    with pytest.raises(CheckpointError, match=r"trained for 4 steps and does not jump .* must: give one that does$"):
        stage(four, 2, tmp_path / "two")
    monkeypatch.setattr(Halving, "first_stages", ("ect",))
    with pytest.raises(CheckpointError, match=r"is a generator of halving, not a first stage: train one by ect$"):
        stage(four, 2, tmp_path / "two")
    with pytest.raises(CheckpointError, match="is a teacher, not a first stage"):
        stage(teacher, 2, tmp_path / "two")


def test_a_run_by_a_method_that_is_not_installed(
    stage: Callable[..., Path], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its generator needs nothing; what reads the run's recipe says what is missing."""
    four = stage(teacher, 4, tmp_path / "four")
    monkeypatch.delitem(METHODS, "halving")
    assert load_flow(four)[1].method == "halving"
    with pytest.raises(
        EdmDistillError, match=r"four: the run was trained by 'halving', a method that neither .*: install the package"
    ):
        build_package(four, "me/four")
