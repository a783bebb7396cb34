"""From a recipe to a run: what the product's checkpoint says of itself."""

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from toy_runs import TABLES, source_of

from edmdistill.checkpoints.config import CheckpointConfig, Guidance, Provenance, describe, read_config, write_config
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.checkpoints.tuning import Tuning
from edmdistill.data.datasets import Dataset
from edmdistill.errors import EdmDistillError, TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM, VP, Preconditioning
from edmdistill.recipes.schema import Recipe
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.training.prepare import prepare
from edmdistill.training.session import train
from edmdistill.trigflow import denoised, sigma_to_time

CPU = Machine(device="cpu")
SIGMA = 0.5


def test_a_second_stage_keeps_guidance_and_precision_and_not_what_was_tuned(teacher: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    shutil.copytree(teacher.with_name("first-stage"), first)
    tuning = Tuning(
        sigmas=(80.0,),
        before=(80.0,),
        metric="fd_digits",
        protocol="digits",
        reference=None,
        gamma=1.0,
        n=10,
        search_seeds="0-9",
        held_out_seeds="",
        schedules=1,
        images=10,
        values=(),
        before_values=(),
        gain=0.0,
        spread=0.0,
        source_sha256=None,
    )
    facts = {"guidance": Guidance("classes", (2.0, 2.0)), "tunings": {"1": tuning}, "use_fp16": True}
    write_config(first, replace(read_config(first), **facts))
    recipe = Recipe.from_tables(TABLES | {"method": {"name": "tcm"}}, "a test")
    config = prepare(recipe, data="digits", teacher=first, machine=CPU).config
    assert config.guidance == Guidance("classes", (2.0, 2.0))
    assert config.tunings == {}
    assert config.use_fp16


@pytest.mark.parametrize(
    ("method", "sampling", "why"),
    [
        (
            {"name": "sid"},
            {"sigmas": {"2": [800.0, 2.5]}},
            r"sampling.sigmas.2 = \[800.0, 2.5\]: noise level 800 is out of",
        ),
        ({"name": "vsd", "guidance": [1e7, 1e7]}, {}, r"could not be read again, because .* must be at most 1000000"),
    ],
)
def test_a_run_whose_generator_could_not_be_used_is_refused(
    teacher: Path, method: dict[str, object], sampling: dict[str, object], why: str
) -> None:
    recipe = Recipe.from_tables(TABLES | {"method": method, "sampling": sampling}, "a test")
    with pytest.raises(TrainingError, match=why):
        prepare(recipe, data="digits", teacher=teacher, machine=CPU, force_guidance="guidance" in method)


@pytest.mark.parametrize("preconditioning", [EDM(), VP()], ids=["edm", "vp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_half_precision_of_a_teacher_that_predicts_noise_is_warned_of(
    tmp_path: Path, preconditioning: Preconditioning, precision: str
) -> None:
    """By an estimate that is within a factor of five of what it is."""
    torch.manual_seed(0)
    network = UNet(8, 1, 10, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    torch.nn.init.ones_(network.out_gain)
    flow = FlowNetwork(network, preconditioning)
    provenance = Provenance(source="a test", licence="cc-by-nc-sa-4.0")
    save_checkpoint(tmp_path / "t", flow, CheckpointConfig(stage="teacher", provenance=provenance, **describe(flow)))
    tables = TABLES | {"method": {"name": "sid"}, "training": TABLES["training"] | {"precision": precision}}
    run = prepare(Recipe.from_tables(tables, "a test"), data="digits", teacher=tmp_path / "t", machine=CPU)
    said = re.search(
        r"rounding in .* is an error of about (\S+) sigma_data in images from noise level 80", "".join(run.notes)
    )
    assert (said is not None) == (precision != "fp32" and not isinstance(preconditioning, EDM))
    if said is not None:
        x, t = SIGMA * torch.randn(64, 1, 8, 8), sigma_to_time(80.0, SIGMA)
        flow.eval().requires_grad_(False)
        exact = denoised(x, flow(x, t), t, SIGMA)
        flow.compute_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        error = float((denoised(x, flow(x, t), t, SIGMA) - exact).square().mean().sqrt()) / SIGMA
        assert 0.2 < error / float(said[1]) < 5


@pytest.mark.parametrize(
    ("method", "sampling", "levels"),
    [
        ({"name": "sid", "sigma_init": 5.0}, {}, (5.0,)),
        ({"name": "sida", "sigma_init": 4.0}, {}, (4.0,)),
        ({"name": "vsd"}, {}, (80.0,)),
        ({"name": "dmd2", "gan": 0.0, "levels": [1.5, 0.4]}, {}, (80.0, 1.5, 0.4)),
        ({"name": "ladd", "levels": [1.5]}, {}, (80.0, 1.5)),
        ({"name": "kd", "levels": [1.5]}, {}, (80.0, 1.5)),
        ({"name": "scd", "allow_edm_time": True, "intervals": 4}, {}, (80.0, 1.207107, 0.5, 0.207107)),
        ({"name": "pd", "steps": 2}, {}, (80.0, 0.496885)),
        ({"name": "cosim"}, {}, (80.0, 2.515219)),
        ({"name": "sid"}, {"sigmas": {"1": [3.0]}}, (3.0,)),  # the recipe's own
        ({"name": "cosim"}, {"sigmas": {"2": [80.0, 80.0]}}, (80.0, 80.0)),  # CoSIM, proposition 3.8
    ],
)
def test_a_generator_is_sampled_at_the_levels_that_it_learned(
    teacher: Path, method: dict[str, object], sampling: dict[str, object], levels: tuple[float, ...]
) -> None:
    tables = TABLES | {"method": method, "sampling": sampling}
    source = source_of(str(method["name"]), teacher)
    run = prepare(Recipe.from_tables(tables, "a test"), data="digits", teacher=source, machine=CPU)
    record = build_sampler(run.model(), SamplerSpec()).record
    assert record.sigmas == pytest.approx(levels, rel=1e-5)
    assert record.nfe == len(levels)
    assert record.gamma == (0 if "intervals" in method or method["name"] == "pd" else 1)
    if not sampling:
        trained = () if method["name"] == "cosim" else levels
        assert run.config.trained_sigmas == pytest.approx(trained, rel=1e-5)


def test_a_data_set_in_memory_is_trained_on_as_it_is(teacher: Path, tmp_path: Path) -> None:
    tables = TABLES | {"method": {"name": "ect"}}
    recipe = Recipe.from_tables(tables, "a test")
    pixels = np.random.default_rng(0).integers(256, size=(20, 1, 8, 8), dtype=np.uint8)
    files, classes = [f"image {i}" for i in range(20)], np.arange(20) % 10
    data = Dataset("mine", "train", files, pixels.__getitem__, classes)
    run = prepare(recipe, data=data, teacher=teacher, machine=CPU)
    assert run.dataset is data
    assert run.identity["data"]["content_sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
    outcome = train(run, str(tmp_path / "run"), on_message=lambda sentence: None)
    assert outcome == (True, 24)

    mirrored = Dataset("mine", "train", files, pixels.__getitem__, classes, xflip=True)
    with pytest.raises(
        TrainingError, match=r"mine has xflip = True, but the recipe's \[data\] says False: .* set data.x"
    ):
        prepare(recipe, data=mirrored, teacher=teacher, machine=CPU)
    asked = Recipe.from_tables(tables | {"data": {"xflip": True}}, "a test")
    assert len(prepare(asked, data=mirrored, teacher=teacher, machine=CPU).dataset) == 40
    with pytest.raises(
        EdmDistillError, match=r"prepare: data = \(a numpy array, .* must be .*Dataset, a string or a path"
    ):
        prepare(recipe, data=pixels, teacher=teacher, machine=CPU)  # type: ignore[arg-type]
