"""Every option of `train` and `plan`, and --compile, arrives where it acts, and nothing else changes."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_generator import tiny_generator

from edmdistill import assets
from edmdistill.cli import main
from edmdistill.cli import train as module
from edmdistill.errors import EdmDistillError
from edmdistill.machine.engine import Machine
from edmdistill.networks.preconditioning import VE
from edmdistill.planning.fit import Fitted

TEACHER = str(Path(assets.__file__).with_name("digits-teacher.pkl"))
MACHINE = {
    "--micro-batch": ("4", {"micro_batch": 4}),
    "--shard": (None, {"shard": True}),
    "--offload": ("ema,optimizer", {"offload": ("ema", "optimizer")}),
    "--checkpoint-activations": (None, {"checkpointing": True}),
    "--loss-pieces": ("3", {"loss_pieces": 3}),
    "--second-moment": ("bf16", {"second_moment": "bf16"}),
    "--compile": ("default", {"compile": "default"}),
}
TRAIN = MACHINE | {
    "--device": ("cpu", {"device": "cpu"}),
    "--workers": ("2", {"workers": 2}),
    "--log-with": ("wandb,tensorboard", {"log_with": ("wandb", "tensorboard")}),
}
SOURCES = {
    "--guide": ("the guide", {"guide": "the guide"}),
    "--init": ("a run", {"init": "a run"}),
    "--vae": ("some/vae", {"vae": "some/vae"}),
    "--force-guidance": (None, {"force_guidance": True}),
}


def words(option: str, value: str | None) -> list[str]:
    return [option] if value is None else [option, value]


def enough(*_: object, **__: object) -> None:
    raise EdmDistillError("enough")


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    return result


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Gets what `train` prepares its run by, and ends the command there."""
    given: dict[str, Any] = {}

    def prepare(recipe: object, **options: Any) -> None:
        given.update(options, recipe=recipe)
        enough()

    monkeypatch.setattr("edmdistill.training.prepare.prepare", prepare)
    return given


def train(*more: str) -> Result:
    return invoke("train", "sid", "t", "--data", "d", "--recipe", "sid/digits", "--run-dir", "nowhere/run", *more)


@pytest.mark.parametrize("option", [None, *TRAIN])
def test_train_uses_the_machine_as_it_is_told(option: str | None, prepared: dict[str, Any]) -> None:
    value, fields = (None, {}) if option is None else TRAIN[option]
    train(*([] if option is None else words(option, value)))
    assert prepared["machine"] == Machine(workers=None)._replace(**fields)


@pytest.mark.parametrize("option", [None, *SOURCES])
def test_train_prepares_what_it_is_told(option: str | None, prepared: dict[str, Any]) -> None:
    value, fields = (None, {}) if option is None else SOURCES[option]
    train(*([] if option is None else words(option, value)), "--set", "training.batch=16")
    others = {"guide": None, "init": None, "vae": None, "force_guidance": False}
    assert prepared["recipe"].training.batch == 16
    assert {name: prepared[name] for name in ("data", "teacher", *others)} == {
        "data": "d",
        "teacher": "t",
        **others,
        **fields,
    }


@pytest.mark.parametrize(
    ("micro_batch", "sentence"),
    [
        ("auto", "enough"),
        ("0", "0 is not a number of images"),
        ("-1", "-1 is not a"),
        ("two", "two is not a number of"),
    ],
)
def test_a_micro_batch_is_a_number_or_auto(micro_batch: str, sentence: str, prepared: dict[str, Any]) -> None:
    assert sentence in train("--micro-batch", micro_batch).stderr
    assert prepared == {} or prepared["machine"].micro_batch == "auto"


def test_fit_chooses_by_what_is_trained(prepared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And its sentence comes before the run's own."""
    asked: dict[str, Any] = {}

    def fit_run(recipe: Any, machine: Machine, memory: float, tell: object, **options: Any) -> Fitted:
        asked.update(options, batch=recipe.training.batch, memory=memory)
        return Fitted(machine._replace(micro_batch=8), memory, 10**6, 1.0)

    monkeypatch.setattr("edmdistill.planning.fit.fit_run", fit_run)
    monkeypatch.setattr("edmdistill.machine.launch.process_rank", lambda: (0, 3))
    train("--fit", "2GB", "--guide", "g", "--init", "i", "--device", "cpu", "--set", "training.batch=16")
    sources = {"data": "d", "teacher": "t", "guide": "g", "init": "i"}
    assert asked == sources | {"processes": 3, "batch": 16, "memory": 2e9}
    assert prepared["machine"].micro_batch == 8


@pytest.mark.parametrize(
    ("nfe", "vae", "command"),
    [
        ((1, 2, 4), None, "--nfe 2 --seeds 0-63 --vae 'of the/teacher' --out"),
        ((1, 4), "my vae", "--nfe 1 --seeds 0-63 --vae 'my vae' --out"),
    ],
)
def test_a_run_is_trained_and_drawn_from_as_it_is_told(
    nfe: tuple[int, ...], vae: str | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    outcome = SimpleNamespace(finished=True, images=8)
    monkeypatch.setattr("edmdistill.training.session.train", lambda run, where, **more: given.update(more) or outcome)
    monkeypatch.setattr("edmdistill.checkpoints.encoder.vae_words", lambda encoder: ["--vae", "of the/teacher"])
    traced: list[object] = []
    monkeypatch.setattr(
        "edmdistill.training.profiling.traced", lambda *given: traced.extend(given[1:3]) or nullcontext(lambda: None)
    )
    said: list[str] = []
    monkeypatch.setattr(module, "say", said.append)
    run = SimpleNamespace(
        engine=SimpleNamespace(is_main=True),
        recipe=SimpleNamespace(sampling=SimpleNamespace(nfe=nfe), training=SimpleNamespace(images=8)),
        method=SimpleNamespace(product="generator"),
        config=SimpleNamespace(encoder=None),
        vae=vae,
    )
    where = tmp_path / "the run"
    module._train(run, "what", where, "text", ("collapse",), False, 3)  # type: ignore[arg-type]
    assert (given["recipe_text"], given["stop_on"], traced) == ("text", ("collapse",), [where, 3])
    assert said[0] == f"The generator of 8 images is in {where / 'generator'}. To draw from it:"
    assert said[1] == f"  edmdistill sample '{where}' {command} '{where / 'images'}'"
    outcome.finished = False
    with pytest.raises(SystemExit) as ended:
        module._train(run, "what", where, "text", (), False, None)  # type: ignore[arg-type]
    assert ended.value.code == 130
    assert said[2:] == ["Interrupted after 8 images and saved; the same command goes on from there."]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets the request of `plan` and whether alternatives are asked for, and ends the command there."""
    given: list[Any] = []
    monkeypatch.setattr(
        "edmdistill.planning.document.plan_document",
        lambda request, show, alternatives: given.extend((request, alternatives)) or enough(),
    )
    return given


@pytest.mark.parametrize(
    "option", [None, *(option for option in MACHINE if option not in ("--shard", "--micro-batch"))]
)
def test_plan_uses_the_machine_as_train_does(option: str | None, planned: list[Any]) -> None:
    value, fields = (None, {}) if option is None else MACHINE[option]
    invoke("plan", "sid/digits", TEACHER, "--gpu", "h100", *([] if option is None else words(option, value)))
    request, alternatives = planned
    assert request.machine == Machine()._replace(**fields)
    assert (request.processes, request.micro_batch, request.guide, alternatives) == (1, None, None, False)
    assert (list(request.gpus), request.utilization, request.flow.img_resolution) == (["h100"], 0.35, 8)


def test_plan_takes_all_that_remains(planned: list[Any]) -> None:
    more = ["--processes", "2", "--shard", "--micro-batch", "8", "--utilization", "0.5", "--all"]
    gpus, sets = ["--gpu", "l40s", "--gpu", "a100-40"], ["--set", "training.batch=16", "--set", "method.guidance=[1,2]"]
    guided = ["--set", "method.guide=network", "--guide", "edm2-img512-xs"]
    invoke("plan", "scd/digits", TEACHER, *more, *gpus, *sets, *guided)
    request, alternatives = planned
    assert (request.machine, request.processes, request.micro_batch) == (Machine(shard=True), 2, 8)
    assert (request.utilization, list(request.gpus), alternatives) == (0.5, ["l40s", "a100-40"], True)
    assert (request.recipe.training.batch, request.guide.img_resolution) == (16, 64)


def test_plan_shards_over_several_processes() -> None:
    assert "--shard needs several processes: add --processes N." in invoke("plan", "x", "--shard").stderr


def test_plan_says_what_fit_chooses_beside_json(planned: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On stderr, so that the document stays one."""

    def fit_request(request: Any, memory: float, show: object) -> tuple[Any, Fitted]:
        fitted = Fitted(Machine(checkpointing=True, micro_batch=5), memory, 10**8, 1.0)
        return request._replace(machine=fitted.machine, micro_batch=5), fitted

    monkeypatch.setattr("edmdistill.planning.fit.fit_request", fit_request)
    arguments = ["plan", "sid/digits", TEACHER, "--gpu", "h100", "--fit", "1GB"]
    sentence = "--fit chooses --checkpoint-activations --micro-batch 5, by plan 0.1 of 1 GB.\n"
    assert invoke(*arguments).stdout == sentence
    result = invoke(*arguments, "--json")
    assert (result.stdout, sentence in result.stderr) == ("", True)
    assert (planned[0].machine.checkpointing, planned[0].micro_batch) == (True, 5)


@pytest.mark.parametrize(
    "line",
    [
        "sample SOURCE --nfe 1 --out a",
        "eval SOURCE --nfe 1 --protocol digits",
        "sweep SOURCE --nfe 1 --protocol digits",
    ],
    ids=["sample", "eval", "sweep"],
)
def test_networks_are_compiled_before_they_are_sampled(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edmdistill.machine.compile.require_compiler", lambda mode, device: None)
    monkeypatch.setattr(
        "edmdistill.machine.compile.compile_for_sampling",
        lambda mode, model, *specs: given.extend((mode, model, *specs)) or enough(),
    )
    source = str(tiny_generator(tmp_path / "generator"))
    invoke(*line.replace("SOURCE", source).split(), "--device", "cpu", "--compile", "default")
    mode, model, spec = given
    assert (mode, model.label_dim, spec.nfe) == ("default", 10, 1)


@pytest.mark.parametrize(
    "line", ["sample SOURCE --out a", "eval SOURCE --protocol digits", "sweep SOURCE --protocol digits"]
)
def test_noise_levels_are_those_of_the_network(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(tiny_generator(tmp_path / "generator", preconditioning=VE()))
    for level in ("101", "100,.01"):
        refused = invoke(*line.replace("SOURCE", source).split(), "--device", "cpu", "--t", level)
        assert "is out of range; this network takes 0.02 to 100" in refused.stderr
