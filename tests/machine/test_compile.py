"""Compiled blocks against plain ones. Quick tests compile nothing; slow ones take a C++ compiler and some minutes."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import compiled_runs
import pytest
import torch
from compiled_runs import both
from processes import run_by_two
from tiny_generator import tiny_generator
from torch import Tensor
from toy_runs import save_sources

from edmdistill.checkpoints.load import load_model
from edmdistill.checkpoints.store import load_checkpoint
from edmdistill.cli.types import COMPILE, SECOND_MOMENTS
from edmdistill.errors import EdmDistillError
from edmdistill.machine import compile as compiling
from edmdistill.machine.engine import Machine, SecondMoment
from edmdistill.networks.base import Conditioning
from edmdistill.recipes.schema import CompileMode, Recipe
from edmdistill.sampling.generate import generate_images
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.training.loop import rounds
from edmdistill.training.prepare import prepare
from edmdistill.training.run import Run
from edmdistill.training.session import train

CPU = torch.device("cpu")
quiet = pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles


def test_modes_are_those_of_the_command_line() -> None:
    assert get_args(CompileMode) == COMPILE
    assert get_args(SecondMoment) == SECOND_MOMENTS


def test_off_leaves_networks_alone(start: Callable[..., Run]) -> None:
    run = start("cosim")
    assert run.engine.machine.compile == "off"
    for network in run.networks.values():
        assert not network.network.compiled
        assert not any("forward" in vars(module) for module in network.modules())


@pytest.mark.parametrize("given", [None, "off"])
def test_the_recipe_gives_the_mode_and_the_command_line_overrides_it(
    given: CompileMode | None, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the recipe's hash nor a run's identity depends on it, and averages are not compiled."""
    monkeypatch.setattr("edmdistill.training.checks.require_compiler", lambda mode, device: None)
    run, plain = start("cosim", Machine(device="cpu", compile=given), compile="default"), start("cosim")
    assert {flow.network.compiled for flow in run.networks.values()} == {given is None}
    assert not run.ema.network.network.compiled
    assert run.recipe.hash == plain.recipe.hash
    for role, network in run.networks.items():
        assert list(network.state_dict()) == list(plain.networks[role].state_dict())


def test_a_run_resumes_with_another_mode(
    start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edmdistill.training.checks.require_compiler", lambda mode, device: None)
    monkeypatch.setattr("edmdistill.training.roles.compile_blocks", lambda network, mode: None)  # it takes minutes
    train(start("cosim", images=8), tmp_path / "run", on_message=lambda sentence: None)
    run = start("cosim", compile="default")
    assert run.engine.machine.compile == "default"
    outcome = train(run, tmp_path / "run", on_message=lambda sentence: None)
    assert (outcome.finished, run.images) == (True, 24)


@pytest.mark.parametrize(
    ("mode", "environment", "match"),
    [
        ("reduce-overhead", {}, "reduce-overhead is for GPUs, and this is on the CPU: use default"),
        ("max-autotune", {}, "max-autotune is for GPUs"),
        ("default", {"CXX": "/nowhere/c++"}, r"no /nowhere/c\+\+ here: install one \(apt-get install g\+\+\)"),
    ],
)
def test_what_cannot_compile_is_refused_before_anything_is_read(
    mode: CompileMode, environment: dict[str, str], match: str, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EdmDistillError, match=match):
        prepare(recipe("cosim"), data="no such data", teacher="none", machine=Machine(device="cpu", compile=mode))


def test_tritons_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "selected", lambda: "triton")
    with pytest.raises(EdmDistillError, match="does not work with EDMDISTILL_KERNELS=triton: unset it"):
        compiling.require_compiler("default", CPU)


def test_a_broken_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Callable[[Tensor], Tensor]:
        raise RuntimeError("no Python.h\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(EdmDistillError, match=r"^torch.compile does not work here \(no Python.h\): install a C\+\+"):
        compiling.require_compiler("default", CPU)


def test_what_says_nothing_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Callable[[Tensor], Tensor]:
        raise NotImplementedError(" ")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(EdmDistillError, match=r"^torch.compile does not work here \(NotImplementedError\): install"):
        compiling.require_compiler("default", CPU)
    compiling.require_compiler("off", CPU)


def test_a_gpu_takes_cuda_graphs_and_no_compiler_of_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    ones, tried = torch.ones, list[tuple[object, ...]]()
    monkeypatch.setattr(torch, "ones", lambda size, device: tried.append((size, device)) or ones(size))
    monkeypatch.setattr(torch, "compile", lambda act, **options: tried.append((act, options)) or act)
    compiling.require_compiler("max-autotune", torch.device("cuda"))
    assert tried == [(torch.sin, {"mode": "max-autotune", "dynamic": False}), (8, torch.device("cuda"))]


def test_every_network_of_a_sampler_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, guide and score; each pass is a step of CUDA graphs."""
    steps: list[str] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append("step"))
    monkeypatch.setattr(compiling, "_compiled", lambda forward, shapes, mode: forward)
    monkeypatch.setattr(compiling, "_report", lambda: None)
    source = tiny_generator(tmp_path / "teacher", "teacher")
    model, guide, score = (load_model(source) for _ in range(3))
    specs = (
        SimpleNamespace(companions=[guide]),
        SimpleNamespace(companions=[score]),
    )
    networks = [each.flow.network for each in (model, guide, score)]
    compiling.compile_for_sampling("off", model, *specs)
    assert not any(network.compiled for network in networks)
    with torch._dynamo.config.patch(recompile_limit=8):  # which monkeypatch would not bring back
        for _ in range(2):
            compiling.compile_for_sampling("reduce-overhead", model, *specs)
        assert torch._dynamo.config.recompile_limit == compiling.MOST_KINDS
    assert all(network.compiled for network in networks)
    for each in (model, guide, score):
        each(torch.zeros(1, 1, 8, 8), 1.0)
    assert steps == ["step"] * 3
    compiling.begin_step("default")
    assert steps == ["step"] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_the_main_process_reports(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    handler, watched = torch._dynamo.callback.callback_handler, list[object]()
    monkeypatch.setattr(compiling, "process_rank", lambda: (rank, 2))
    monkeypatch.setattr(handler, "register_start_callback", watched.append)
    monkeypatch.setattr(handler, "register_end_callback", watched.append)
    compiling._report.__wrapped__()
    assert len(watched) == (2 if rank == 0 else 0)


def test_micro_batches_are_not_tried_with_cuda_graphs(recipe: Callable[..., Recipe]) -> None:
    from edmdistill.training.checks import with_compile_mode

    with pytest.raises(EdmDistillError, match="memory of CUDA graphs, which --compile max-autotune makes: give a numb"):
        with_compile_mode(recipe("cosim"), Machine(micro_batch="auto", compile="max-autotune"))


def test_cuda_graphs_begin_a_step_at_every_turn(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches are one step: gradients of the first, which a graph may own, are added to."""
    steps: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(0))
    run = start("cosim", Machine(device="cpu", micro_batch=4))
    next(rounds(run))
    assert steps == []
    run.engine.machine = run.engine.machine._replace(compile="reduce-overhead")
    next(rounds(run))
    assert len(steps) == len(run.method.turns())


def test_smaller_batches_are_padded() -> None:
    sizes: list[int] = []

    def forward(x: Tensor, condition: Conditioning) -> Tensor:
        assert condition.labels is not None
        sizes.append(len(x))
        return x + condition.c_noise.view(-1, 1) + condition.labels

    network = compiling._PaddedBatches(forward, "default")
    for rows, given in ((3, 3), (4, 4), (2, 2), (1, 1), (4, 1), (2, 1)):
        x, condition = torch.rand(rows, 2), Conditioning(torch.rand(given), torch.rand(rows, 2))
        torch.testing.assert_close(network(x, condition), forward(x, condition))
    assert sizes[::2] == [3, 4, 4, 4, 4, 4]


def test_compiling_is_reported_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the seconds that it took so far, not those between."""
    lines, clock = list[str](), iter([100.0, 110.0, 120.0, 130.0, 200.0, 201.0])
    monkeypatch.setattr(compiling, "write", lines.append)
    monkeypatch.setattr(compiling.time, "monotonic", clock.__next__)
    report = compiling._Report()
    for _ in range(3):
        report.start()
        report.end()
    assert lines[1:] == ["Compiling: 2 pieces so far, in 20 s.", "Compiling: 3 pieces so far, in 21 s."]


def test_compiling_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(compiling, "write", lines.append)
    monkeypatch.setattr(compiling, "INTERVAL", 0)
    report = compiling._Report()
    for _ in range(2):
        report.start()
        report.end()
    assert [line.split(",")[0] for line in lines] == [
        "Compiling blocks of networks: minutes at first",
        "Compiling: 1 piece so far",
        "Compiling: 2 pieces so far",
    ]


# What follows compiles.


@pytest.fixture(scope="module")
def wide_teacher(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float64, so that rounding does not grow into a difference."""
    folder = tmp_path_factory.mktemp("wide") / "teacher"
    flow, config = load_checkpoint(teacher)
    save_sources(folder, flow.double(), config)
    return folder


def assert_same_path(plain: list[dict[str, float]], compiled: list[dict[str, float]]) -> None:
    assert len(plain) == len(compiled) == 5
    for expected, actual in zip(plain, compiled, strict=True):
        assert {"loss/generator", "grad_norm/generator"} <= expected.keys()
        for name in expected:
            assert actual[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


@quiet
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options", "backend"),
    [
        ("cosim", {}, "inductor"),
        # The same graphs, but no C++, which takes minutes.
        ("cosim", {"micro_batch": 3, "checkpointing": True, "offload": ("teacher",)}, "aot_eager"),
        ("scd", {}, "aot_eager"),  # with tangents
        ("scd", {"checkpointing": True}, "aot_eager"),
    ],
)
def test_rounds_follow_the_plain_path(
    case: str, options: dict[str, Any], backend: str, wide_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", backend)
    compiling._compiled.cache_clear()
    torch.compiler.reset()
    kinds = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_same_path(*both(wide_teacher, case, options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > kinds


@pytest.mark.slow
def test_on_two_processes(wide_teacher: Path, tmp_path: Path) -> None:
    """By DDP, and sharded by FSDP2; the graphs are inductor's."""
    ways = [json.dumps(["cosim", options]) for options in ({}, {"shard": True}, {"shard": True, "checkpointing": True})]
    run_by_two(Path(compiled_runs.__file__), wide_teacher, tmp_path / "out.json", *ways)
    measures = json.loads((tmp_path / "out.json").read_text())
    assert list(measures) == ways
    for way in ways:
        assert_same_path(*measures[way])


@quiet
@pytest.mark.slow
def test_resumed_is_never_interrupted(recipe: Callable[..., Recipe], wide_teacher: Path, tmp_path: Path) -> None:
    """Bit for bit, as by another process: nothing that was compiled is left."""

    def interrupt(images: int, measures: object) -> None:
        if images == 16:
            signal.raise_signal(signal.SIGINT)

    def trained(folder: str, **options: Any) -> Run:
        compiling._compiled.cache_clear()
        torch.compiler.reset()
        table = recipe("cosim", images=40, dropout=0.2, compile="default")  # as above, so that code is in torch's cache
        run = prepare(table, data="digits", teacher=wide_teacher, machine=Machine(device="cpu"))
        train(run, tmp_path / folder, on_message=lambda sentence: None, **options)
        return run

    whole = trained("whole")
    assert trained("parts", on_round=interrupt).images == 16
    resumed = trained("parts")
    assert resumed.finished
    for group, tensors in whole.state().items():
        for name, tensor in resumed.state()[group].items():
            assert torch.equal(tensor, tensors[name]), f"{group} {name}"


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher", "generator"])
def test_samples_are_within_one_of_255(stage: str, tmp_path: Path) -> None:
    """A last, smaller batch and guidance by another network included."""
    source, guide = tiny_generator(tmp_path / "model", stage), tiny_generator(tmp_path / "guide", stage, scale=2)
    images = []
    for mode in ("off", "default"):
        model = load_model(source)
        guided = {"guidance": 2.0, "guide": load_model(guide)} if stage == "teacher" else {}
        spec = SamplerSpec(nfe=3 if stage == "teacher" else 1, **guided)
        compiling.compile_for_sampling(mode, model, spec)
        compiling.compile_for_sampling(mode, model, spec)  # again, which changes nothing
        images.append(generate_images(model, spec, range(11), batch=4))
        assert model.flow.network.compiled == (mode != "off")
    assert images[0].std() > 0.1
    assert (images[1] - images[0]).abs().max() <= 2 / 255
