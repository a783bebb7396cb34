"""`edmdistill plan`: before anything is loaded."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from edmdistill import assets
from edmdistill.cli import main

TEACHER = str(Path(assets.__file__).with_name("digits-teacher.pkl"))


def plan(*words: str) -> Result:
    return CliRunner().invoke(main, ["plan", *words])


def test_text() -> None:
    result = plan("cosim/digits-paper", TEACHER, "--processes", "2", "--gpu", "l40s")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("cosim in fp32 on 2 GPUs: teacher 0.2M, generator 0.2M, auxiliary 0.2M.")
    assert "teacher's weights" in result.stdout
    assert "at most on each GPU, in micro-batches of 16" in result.stdout
    assert "time for 640,000 images, at 35% of its peak" in result.stdout
    assert "in the auxiliary's turn" in result.stdout
    assert "CUDA graphs" not in result.stdout
    assert result.stdout.splitlines()[-1].split()[:2] == ["l40s", "16"]


def test_quiet_shows_no_stages_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda stream: True)
    assert plan("sid/digits", TEACHER, "--gpu", "l40s", "-q").stderr == ""


def test_a_tiny_network_is_as_fast_as_its_calls_and_as_large_as_it_is() -> None:
    """No GPU takes a step of thousands of calls in microseconds; this machine has a row of its own."""
    result = plan("cosim/digits-paper", TEACHER)
    rows = {line[:12].strip(): line.split() for line in result.stdout.splitlines()[-9:]}
    assert 10 < float(rows["h200"][2]) < 10_000
    assert 1 < float(rows["this machine"][3]) < 10_000
    assert " 0.00 " not in result.stdout


def test_a_recipe_without_a_method(tmp_path: Path) -> None:
    training = "images = 8\nbatch = 8\nlr = 1e-3\nlog_every = 8\nsnapshot_every = 8\n"
    (tmp_path / "mine.toml").write_text(f"[training]\n{training}[ema]\nhalf_life_images = 8\n")
    result = plan(str(tmp_path / "mine.toml"), TEACHER, "--method", "sid", "--gpu", "h100")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("sid in fp32")


def test_the_second_moment() -> None:
    """Two bytes for each parameter of both networks, at beta1 = 0."""
    words = "cosim/digits-paper", TEACHER, "--second-moment", "bf16"
    document = json.loads(plan(*words, "--gpu", "l40s", "--json").stdout)
    trained = document["parameters"]["generator"] + document["parameters"]["auxiliary"]
    assert document["bytes"]["optimizers"] == pytest.approx(2 * trained, rel=0.02)
    result = plan(*words, "--set", 'training.optimizer="radam"')
    assert result.exit_code == 2
    assert "--second-moment bf16 has no effect: it is for adam, and the recipe uses radam" in result.output


def test_cuda_graphs_are_not_counted_and_that_is_said() -> None:
    """They hold the memory of all micro-batches of a turn, of which the plan counts one."""
    words = "sid/digits", TEACHER, "--gpu", "l40s", "--micro-batch", "8"
    result = plan(*words, "--compile", "reduce-overhead")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if "CUDA graphs" in line]
    assert "not counted" in line
    result = plan(*words, "--fit", "auto", "--set", 'training.compile="max-autotune"')
    assert result.exit_code == 2
    assert "does not know the memory of CUDA graphs, which --compile max-autotune makes" in result.output


def test_fit_is_for_one_gpu_that_is_named_or_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edmdistill.planning.fit.pick_device", lambda name: torch.device("cpu"))
    words = "sid/digits", TEACHER, "--fit"
    for result, sentence in (
        (plan(*words, "auto"), "--fit auto needs a GPU, but this run is on the CPU: name the memory"),
        (plan(*words, "9GB", "--gpu", "l40s", "--gpu", "h100"), "--fit chooses for one GPU: give one --gpu, or none"),
    ):
        assert (result.exit_code, sentence in result.stderr) == (2, True)


def test_what_fit_chose_is_in_the_document() -> None:
    words = "diffusion/digits", "--data", "digits", "--gpu", "l40s", "--json"
    assert json.loads(plan(*words).stdout)["fit"] is None
    result = plan(*words, "--fit", "6MB")
    document = json.loads(result.stdout)
    chosen = document["fit"]
    assert f"--fit chooses {chosen['options']}, by plan " in result.stderr
    assert chosen["loss_pieces"] == 1
    assert chosen["offload"]
    assert f"--micro-batch {chosen['micro_batch']}" in chosen["options"]
    assert document["peak"]["micro_batch"] == chosen["peak"] <= chosen["memory"] == 6e6
    assert chosen["checkpointing"] is ("--checkpoint-activations" in chosen["options"])
    assert {chosen["second_moment"], *chosen["offload"]} <= {"fp32", "bf16", "ema", "teacher", "optimizer"}
    assert chosen["seconds_per_round"] > 0


def test_every_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edmdistill.planning.document.PRECISIONS", ("bf16",))
    document = json.loads(plan("sid/digits", TEACHER, "--processes", "2", "--all", "--json").stdout)
    assert document["schema_version"] == 1
    assert document["parameters"]["generator"] == 233_282
    others = document["others"]
    assert len({(other["precision"], other["checkpointing"], other["shard"]) for other in others}) == 4
    peak = {(o["precision"], o["checkpointing"], o["shard"]): o["micro_batch"] for o in others}
    assert peak["bf16", True, True] < peak["bf16", False, True] < peak["bf16", False, False]
    words = "--processes", "2", "--offload", "ema", "--all", "--json"
    document = json.loads(plan("diffusion/digits", "--data", "digits", *words).stdout)
    assert {other["shard"] for other in document["others"]} == {False}  # no run offloads and shards


GUIDED = ["--set", "method.guidance=[1,2]", "--set", "method.guide=network"]


def test_a_guide() -> None:
    result = plan("scd/digits", TEACHER, *GUIDED, "--guide", TEACHER, "--micro-batch", "1", "--gpu", "h100")
    assert result.exit_code == 0, result.output
    assert "guide's weights" in result.stdout


def test_a_network_for_the_data() -> None:
    result = plan("diffusion/digits", "--data", "digits")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("diffusion in fp32 on 1 GPU: teacher 0.2M.")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cosim/digits"], "the plan needs the teacher's shape: name a checkpoint, or --network edm2-img512-s"),
        (["cosim/digits", "--network", "edm3"], "there is no network 'edm3': choose one of adm-imagenet64, "),
        (["scd/digits", TEACHER, *GUIDED], "scd uses another network as guide in this recipe"),
        (["scd/digits", TEACHER, *GUIDED, "--guide", "edm2-img512-xs"], "the guide's img_resolution is 64, but the"),
        (["diffusion/digits"], "this recipe makes its network for the data: name it with --data"),
        (
            ["vsd/digits", TEACHER, "--loss-pieces", "2"],
            "--loss-pieces has no effect: vsd has no loss that can be split",
        ),
        (
            ["vsd/digits", TEACHER, "--processes", "2", "--shard", "--offload", "ema"],
            "--offload does not work with --shard",
        ),
        (
            ["vsd/digits", TEACHER, "--set", "training.optimizer=radam", "--offload", "optimizer"],
            "--offload optimizer is for adam, but the recipe uses radam",
        ),
        (
            ["sid/digits", TEACHER, "--set", "training.batch=4", "--processes", "8"],
            "a batch of 4 images is too small for 8 processes: use fewer",
        ),
        (["cosim/nothing", TEACHER], "there is no recipe 'cosim/nothing'"),
        (["cosim/digits", "nowhere.pkl"], "nowhere.pkl"),
    ],
)
def test_the_users_errors(words: list[str], sentence: str) -> None:
    result = plan(*words)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.output


def test_a_group_is_the_smallest_micro_batch() -> None:
    assert "  in micro-batches of 4 images\n" in plan("imm/digits", TEACHER, "--gpu", "l40s").stdout
