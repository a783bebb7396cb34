"""Classifier-free guidance of a network that was never trained without classes is refused, unless it is forced."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.load import load_denoiser
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.cli import main
from edmdistill.errors import EdmDistillError
from edmdistill.methods.base import Method
from edmdistill.methods.dscd import DSCD
from edmdistill.methods.scd import SCD
from edmdistill.networks import new_network
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.surgery.two_time import add_second_time, drop_second_time
from edmdistill.sampling.generate import sample

ARGUMENTS: dict[str, Any] = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


def flow(kind: str, label_dim: int = 3, **arguments: Any) -> FlowNetwork:
    torch.manual_seed(0)
    return FlowNetwork(new_network(kind, 8, 1, label_dim, **ARGUMENTS | arguments), EDM()).eval()


NEVER = {
    "edm2": lambda: flow("edm2"),
    "song": lambda: flow("song"),
    "adm": lambda: flow("adm", label_dropout=0.0),
}
LEARNT = {"song": lambda: flow("song", label_dropout=0.1), "adm": lambda: flow("adm", label_dropout=0.2)}


@pytest.mark.parametrize("kind", NEVER)
def test_refused_unless_forced_or_guided_by_another(kind: str) -> None:
    model = Denoiser(NEVER[kind]())
    with pytest.raises(EdmDistillError, match=r"never trained without them: name a guide, .*--guide, .*--force-"):
        sample(model, 3, seeds=[0], guidance=2.0)
    guide = Denoiser(flow(kind, label_dim=0))
    for options in ({}, {"guidance": 2.0, "force_guidance": True}, {"guidance": 2.0, "guide": guide}):
        assert sample(model, 3, seeds=[0], **options).isfinite().all()


@pytest.mark.parametrize("kind", LEARNT)
def test_label_dropout_passes_and_survives_files_and_copies(kind: str, tmp_path: Path) -> None:
    network = LEARNT[kind]()
    assert drop_second_time(add_second_time(network)).label_dropout == network.label_dropout > 0
    config = CheckpointConfig(stage="teacher", provenance=Provenance(source="it"), **describe(network))
    save_checkpoint(tmp_path / "teacher", network, config)
    model = load_denoiser(tmp_path / "teacher")
    assert model.label_dropout == network.label_dropout
    assert sample(model, 3, seeds=[0], guidance=2.0).isfinite().all()


def test_force_guidance_that_forces_nothing_is_refused() -> None:
    model = Denoiser(flow("edm2"))
    for options in ({}, {"guidance": 1.0}, {"guidance": 2.0, "guide": Denoiser(flow("edm2", label_dim=0))}):
        with pytest.raises(EdmDistillError, match="leave it out"):
            sample(model, 3, seeds=[0], force_guidance=True, **options)


@pytest.mark.parametrize("kind", [SCD, DSCD])
def test_methods_refuse_it_alike(kind: type[Method]) -> None:
    own, known = kind.Config(guidance=(1.0, 2.0)), {"positional_time": True, "label_dim": 3}
    refusal = kind.check_teacher(own, label_dropout=0.0, **known)
    assert refusal is not None
    assert "never trained without them" in refusal
    assert "--guide" in refusal
    assert "--force-guidance" in refusal
    assert kind.check_teacher(own, label_dropout=0.1, **known) is None
    assert kind.check_teacher(own, label_dropout=None, **known) is None
    assert kind.check_teacher(kind.Config(guidance=(1.0, 2.0), guide="network"), label_dropout=0.0, **known) is None
    assert kind.check_teacher(kind.Config(), label_dropout=0.0, **known) is None


def test_the_commands_know_it(golden: Path, tmp_path: Path) -> None:
    teacher = golden / "edm2-rgb-cond.pkl"
    words = ["sample", str(teacher), "--nfe", "3", "--seeds", "0", "--guidance", "2", "--out", str(tmp_path / "a.npz")]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2
    assert "--force-guidance" in refused.stderr
    assert not list(tmp_path.iterdir())
    assert CliRunner().invoke(main, [*words, "--force-guidance"]).exit_code == 0
