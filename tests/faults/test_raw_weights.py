"""A state's raw weights: what is in training, beside the average that a run publishes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from edmdistill.checkpoints.config import read_config, write_config
from edmdistill.checkpoints.load import load_flow
from edmdistill.errors import CheckpointError
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
