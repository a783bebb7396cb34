"""A state's raw weights: what is in training, beside the average that a run publishes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call
from msgspec.structs import replace

from edmdistill.checkpoints.config import read_config, write_config
from edmdistill.checkpoints.load import load_flow
from edmdistill.errors import CheckpointError
from edmdistill.evaluation.compare import read_rows
from edmdistill.evaluation.results import load_results, read_results
from edmdistill.training.run import Run
from edmdistill.training.session import train


@pytest.mark.parametrize("method", ["sid", "ctm", "diffusion"])
def test_they_are_those_in_training(method: str, start: Callable[..., Run], tmp_path: Path):
    run = start(method, images=16, snapshot_every=8)
    train(run, tmp_path / "run", on_message=str)
    expected = run.networks[run.method.product].state_dict()
    states = sorted((tmp_path / "run/state").iterdir())
    for source, weights in ((tmp_path / "run", "raw"), (states[-1], "ema"), (states[-1], "raw")):
        flow, config = load_flow(source, weights)
        assert (config.images_seen, config.ema) == (16, None)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in flow.state_dict().items())
    average, config = load_flow(tmp_path / "run")
    assert config.ema is not None
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in average.state_dict().items())
    assert load_flow(states[0])[1].images_seen == 8
    folder = tmp_path / "run/generator"
    write_config(folder, replace(read_config(folder), label_dropout=0.25))
    assert [load_flow(tmp_path / "run", weights)[0].label_dropout for weights in ("ema", "raw")] == [0.25, 0.25]


def test_a_damaged_state_gives_way(start: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(start("sid", images=16, snapshot_every=8), tmp_path / "run", on_message=str)
    before = sorted(path.name for path in (tmp_path / "run/state").iterdir())
    (tmp_path / "run/state/000000000016/generator.safetensors").write_bytes(b"cut")
    assert load_flow(tmp_path / "run", "raw")[1].images_seen == 8
    assert "000000000016 is not whole" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run/state").iterdir()) == before
    with pytest.raises(CheckpointError, match="has no intact state to read raw weights from"):
        load_flow(tmp_path / "run/state/000000000016")


def test_a_checkpoint_has_none(teacher: Path):
    with pytest.raises(CheckpointError, match="has no intact state"):
        load_flow(teacher, "raw")


@pytest.fixture(scope="module")
def run(start: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(start("sid"), folder, on_message=str)
    return folder


def test_they_are_drawn_from_as_asked(run: Path, tmp_path: Path):
    options, images = ["--nfe", 1, "--seeds", "0-499", "--device", "cpu", "--out"], {}
    for name, *source in (("ema", run), ("raw", run, "--weights", "raw"), ("state", max((run / "state").iterdir()))):
        out = tmp_path / f"{name}.npz"
        drawn = call("sample", *source, *options, out)
        assert drawn.exit_code == 0, drawn.stderr
        with np.load(out) as file:
            images[name] = file["images"]
    rounded, apart = (np.count_nonzero(images["raw"] != images[name]) for name in ("state", "ema"))
    assert rounded <= 5  # of 32,000, where weights lie at other memory addresses
    assert apart > 100
    others = call("sample", run, "--weights", "raw", *options, tmp_path / "ema.npz")
    assert (others.exit_code, "already exists" in others.stderr) == (2, True)


def test_what_is_measured_on_them_is_not_the_generators(run: Path, tmp_path: Path):
    """No report, card or checkpoint shows it as such, whether it is asked for by --weights or by the state's folder."""
    state = max((run / "state").iterdir())
    words = ["--protocol", "digits", "--nfe", 1, "--n", 20, "--device", "cpu", "--out"]
    files = [run / "eval" / f"{name}.json" for name in ("average", "raw", "state")]
    for file, *source in ((files[0], run), (files[1], run, "--weights", "raw"), (files[2], state)):
        result = call("eval", *source, *words, file)
        assert result.exit_code == 0, result.output
    average, raw, of_state = read_results(files)
    assert raw.metrics == of_state.metrics != average.metrics
    assert [one.provenance.get("weights") for one in (average, raw, of_state)] == [None, "raw", "raw"]
    assert load_results(run) == [average]
    assert read_rows([files[1]])[0].name == f"{run}, raw weights, 24 images seen"
    report = call("report", run, "--results", files[0], "--results", files[1], "--out", tmp_path / "page.html")
    assert [line.split("  ")[0] for line in report.stdout.splitlines()[2:4]] == [
        "generator",
        "raw weights at 24 images",
    ]


@pytest.mark.parametrize("command", ["eval", "sweep"])
def test_they_are_not_kept_with_the_average(command: str, run: Path):
    before = (run / "generator/config.json").read_bytes()
    words = ["--protocol", "digits", "--nfe", 1, "--n", 20, "--save"]
    refused = call(command, run, *words, "--weights", "raw")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--save keeps results with a run's averaged weights, not its raw ones: use --out." in refused.stderr
    twice = call(command, run, *words, "--weights", "raw", "--weights", "ema")
    assert "the weights of a run (ema or raw) are given twice: leave out one of them." in twice.stderr
    same = call(command, run, *words, "--weights", "digits=a", "--weights", "digits=b")
    assert "the weights of digits are given twice" in same.stderr
    assert (run / "generator/config.json").read_bytes() == before
