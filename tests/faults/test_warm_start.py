"""--init: a new run that begins with a generator's weights, and says so."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edmdistill.checkpoints.load import load_flow
from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.recipes.schema import Recipe
from edmdistill.training.prepare import prepare
from edmdistill.training.run import Run
from edmdistill.training.session import train


@pytest.fixture(scope="module")
def first(start: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sid, whose auxiliary score reads one time."""
    folder = tmp_path_factory.mktemp("first") / "run"
    train(start("sid", images=16), folder, on_message=str)
    return folder


@pytest.fixture
def begin(recipe: Callable[..., Recipe], teacher: Path) -> Callable[..., Run]:
    def make(method: str, init: Path, source: Path | None = teacher, **training: object) -> Run:
        return prepare(recipe(method, **training), data="digits", teacher=source, machine=Machine("cpu"), init=init)

    return make


def same(network: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    own = network.state_dict()
    return all(torch.equal(own[name], tensor) for name, tensor in tensors.items() if name in own)


def test_it_begins_where_the_other_ended(first: Path, begin: Callable[..., Run], start: Callable[..., Run], tmp_path):
    run = begin("sid", first)
    average, config = load_flow(first)
    assert same(run.networks["generator"], average.state_dict())
    assert same(run.ema.network, average.state_dict())
    assert not same(run.networks["teacher"], average.state_dict())
    trained = start("sid", images=16)
    train(trained, first, on_message=str)
    assert same(run.networks["auxiliary"], trained.networks["auxiliary"].state_dict())
    assert run.notes == (
        f"The generator starts as {first}, of sid after 16 images, and the auxiliary score as the one that was "
        "trained with it.",
    )
    train(run, tmp_path / "run", on_message=str)
    provenance = json.loads((tmp_path / "run/generator/config.json").read_text())["provenance"]
    assert provenance["init"] == run.identity["init_sha256"]
    assert provenance["parent"] == run.identity["teacher_sha256"] != provenance["init"]
    assert config.provenance.init is None
    with pytest.raises(TrainingError) as error:
        train(start("sid"), tmp_path / "run")
    assert "init_sha256: " in str(error.value)


def test_another_methods_generator_and_its_second_time(first: Path, begin: Callable[..., Run]):
    average, _ = load_flow(first)
    for method in ("cosim", "ctm", "dmd2", "scd"):
        run = begin(method, first)
        product = run.networks["generator"]
        assert same(product, average.state_dict())
        assert product.two_time == (method == "ctm")
        if method == "ctm":
            assert same(run.networks["target"], product.state_dict())
        if method == "cosim":  # its auxiliary score reads two times
            assert run.notes[0].endswith("; the auxiliary score starts as the teacher.")
        if method == "dmd2":  # its head is new
            assert run.notes[0].endswith("and the auxiliary score as the one that was trained with it.")
            assert not same(run.networks["auxiliary"], run.networks["teacher"].state_dict())
            assert run.networks["auxiliary"].network.head is not None


def test_a_method_without_a_teacher_needs_none(first: Path, begin: Callable[..., Run]):
    assert same(begin("sct", first, None).networks["generator"], load_flow(first)[0].state_dict())


def test_a_states_raw_weights(first: Path, begin: Callable[..., Run]):
    state = first / "state/000000000016"
    assert same(begin("sid", state).networks["generator"], load_flow(state)[0].state_dict())


def test_what_it_cannot_begin_with(
    first: Path, teacher: Path, begin: Callable[..., Run], start: Callable[..., Run], tmp_path: Path
):
    with pytest.raises(TrainingError, match="is a teacher, not a generator: pass it as TEACHER"):
        begin("sid", teacher)
    with pytest.raises(TrainingError, match="diffusion trains a teacher and starts from TEACHER: leave --init out"):
        begin("diffusion", first, None)
    train(start("ctm", images=8), tmp_path / "ctm", on_message=str)
    with pytest.raises(TrainingError, match="of ctm, which reads two times, but sid's generator reads one"):
        begin("sid", tmp_path / "ctm")
    assert same(begin("ctm", tmp_path / "ctm").networks["generator"], load_flow(tmp_path / "ctm")[0].state_dict())
