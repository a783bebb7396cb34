"""The plan against the bytes that live on a device at one time, counted tensor by tensor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forked

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.machine.engine import Machine
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.planning.plan import make_plan, measure

WAYS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "micro-batches": {"micro_batch": 4},
    "a loss in pieces": {"loss_pieces": 4},
    "checkpointing": {"checkpointing": True},
    "a rounded second moment": {"second_moment": "bf16"},
    "average on the host": {"offload": ["ema"]},
    "everything": {
        "checkpointing": True,
        "loss_pieces": 2,
        "offload": ["ema", "teacher", "optimizer"],
        "micro_batch": 8,
    },
}
BATCH = 16


@pytest.mark.slow
def test_the_plan_knows_every_way_to_save_memory(recipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = FlowNetwork(UNet(8, 1, 10, 32, [1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=32), EDM())
    teacher = CheckpointConfig(stage="teacher", provenance=Provenance(source="a test"), **describe(flow))
    save_checkpoint(tmp_path / "teacher", flow, teacher)
    asked = recipe("cosim", images=3 * BATCH, batch=BATCH, betas=[0.0, 0.99], precision="bf16")
    source, tables = str(tmp_path / "teacher"), json.loads(asked.to_json())
    cases = [["compare", source, tables, machine, 1] for machine in WAYS.values()]
    status, said = Forked(Path(__file__).parent / "rounds.py", json.dumps(cases)).finish()
    assert status == 0, said
    peaks = []
    for (name, way), found in zip(WAYS.items(), json.loads(said.splitlines()[-1]), strict=True):
        machine = Machine(**{key: tuple(value) if isinstance(value, list) else value for key, value in way.items()})
        rows = machine.micro_batch or BATCH
        planned = make_plan(measure(asked, flow, machine), machine).peak(rows, accumulates=rows < BATCH)
        peaks.append(found["peak"])
        assert planned == pytest.approx(found["peak"], rel=0.08), name
    assert max(peaks[1:]) < peaks[0]
