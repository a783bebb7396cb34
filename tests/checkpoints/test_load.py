"""Networks for sampling and for training, from whatever a user names."""

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from openai_weights import weights_of
from tiny_generator import tiny_generator

from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.config import Guidance, describe, read_config, unfinished, write_config
from edmdistill.checkpoints.convert import convert
from edmdistill.checkpoints.layout import MODEL, PROGRESS
from edmdistill.checkpoints.load import (
    find_config,
    load_denoiser,
    load_flow,
    load_generator,
    load_model,
    outline,
    read_first_stage,
    read_teacher,
    tensors_digest,
    weights_digest,
)
from edmdistill.checkpoints.openai import RESOLUTIONS
from edmdistill.checkpoints.source import open_source
from edmdistill.checkpoints.store import load_checkpoint, load_tensors, save_checkpoint, save_tensors
from edmdistill.errors import CheckpointError
from edmdistill.networks.preconditioning import EDM, VP, Preconditioning
from edmdistill.networks.surgery.rebuild import add_guidance
from edmdistill.networks.surgery.two_time import add_second_time


@pytest.mark.parametrize("stage", ["generator", "teacher"])
def test_what_is_loaded_for_sampling_is_not_trained(tmp_path: Path, stage: str) -> None:
    encoder = {"kind": "StabilityVAEEncoder", "scale": [0.5] * 4, "bias": [0.0] * 4}
    folder = tiny_generator(tmp_path / "c", stage, channels=4, label_names=tuple("0123456789"), encoder=encoder)
    load = load_generator if stage == "generator" else load_denoiser
    model = load(folder, dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.flow.network.out_conv.folded
    assert model.label_names == tuple("0123456789")
    assert model.encoder == encoder
    with pytest.raises(CheckpointError, match=r"cannot compute in torch\.int8: choose one of torch\.float32, "):
        load(folder, dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_weights_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """Those of convolutions, nearly all; a network that casts them in each pass gives the same bits."""
    folder = tiny_generator(tmp_path / "c", "teacher")
    model, casts = load_denoiser(folder, dtype=dtype), load_denoiser(folder)
    casts.flow.compute_dtype = dtype
    assert {(p.ndim == 4, p.dtype) for p in model.parameters()} == {(True, dtype), (False, torch.float32)}
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 20.0])
    assert torch.equal(model(x, sigma, torch.arange(2)), casts(x, sigma, torch.arange(2)))


def test_the_official_precision_is_for_gpus(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EDM's `use_fp16`, which a conversion keeps; the CPU here is taken for a GPU."""
    files = {"edm2-latent-cond.pkl": torch.float16, "edm-tiny-cond.pkl": torch.float32}
    for name in files:
        convert(str(golden / name), tmp_path / name, parity="none")
    sources = [(folder / name, dtype) for name, dtype in files.items() for folder in (golden, tmp_path)]
    for gpu in (False, True):
        monkeypatch.setattr("edmdistill.checkpoints.load.is_gpu", lambda device, gpu=gpu: gpu)
        for source, dtype in sources:
            expected = dtype if gpu else torch.float32
            for load in (load_model, load_denoiser):
                assert load(source, dtype="auto").flow.activation_dtype == expected
            assert load_model(source).flow.activation_dtype == torch.float32
            assert load_model(source, dtype=torch.bfloat16).flow.activation_dtype == torch.bfloat16


@pytest.mark.parametrize(("preconditioning", "dtype"), [(EDM(), torch.float16), (VP(), torch.float32)])
def test_half_precision_is_not_for_networks_that_predict_the_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preconditioning: Preconditioning, dtype: torch.dtype
) -> None:
    """By default, whatever their official code does; `use_fp16` of a generator is its teacher's."""
    folder = tiny_generator(tmp_path / "c", preconditioning=preconditioning, use_fp16=True)
    monkeypatch.setattr("edmdistill.checkpoints.load.is_gpu", lambda device: True)
    assert load_model(folder, dtype="auto").flow.activation_dtype == dtype


def test_a_state_is_as_old_as_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_generator(tmp_path / "generator", images_seen=80_000, images_total=80_000)
    state = tmp_path / "state/000000000896"
    state.mkdir(parents=True)
    (state / PROGRESS).touch()
    for folder in (tmp_path, state.parent):  # from which it is named
        monkeypatch.chdir(folder)
        config = find_config(state.relative_to(folder))
        assert config is not None
        assert unfinished(config, "It") == "It is unfinished: 896 of 80,000 images seen."
    monkeypatch.chdir(state)
    assert find_config(".") == config
    assert find_config(state.rename(state.parent / "best")) is None


def test_a_network_of_a_run_says_what_it_began_from(tmp_path: Path) -> None:
    """A teacher is named by its weights; neither a generator nor an auxiliary score is one."""
    teacher = tiny_generator(tmp_path / "run" / "generator", "teacher").parent
    digest = sha256_file(teacher / "generator" / MODEL)
    assert read_teacher(teacher)[1].provenance.parent == digest
    first = tiny_generator(tmp_path / "first", method="ect")
    flow, config = read_first_stage(first, ("ect", "sct"))
    assert config.provenance.parent == sha256_file(first / MODEL)
    assert find_config(teacher) == read_config(teacher / "generator")
    assert find_config(first / MODEL) is None
    for stage in ("auxiliary", "generator"):
        other = tiny_generator(tmp_path / stage, stage, method="sid")
        with pytest.raises(CheckpointError, match=f"is a {stage}, made by sid: give its teacher"):
            read_teacher(other)
        with pytest.raises(CheckpointError, match="not a first stage: train one by ect or sct"):
            read_first_stage(other, ("ect", "sct"))
    with pytest.raises(CheckpointError, match="is a teacher, not a first stage"):
        read_first_stage(tiny_generator(tmp_path / "diffusion", "teacher", method="ect"), ("ect", "sct"))
    guided = add_guidance(flow)
    config = replace(config, guidance=Guidance("classes", (1.0, 2.0)), **describe(guided))
    save_checkpoint(tmp_path / "guided", guided, config)
    with pytest.raises(CheckpointError, match=r"reads a weight of guidance, .* --set 'method\.guidance=\[1,1\]'"):
        read_first_stage(tmp_path / "guided", ("ect", "sct"))


@pytest.mark.parametrize("stage", ["teacher", "auxiliary", "generator"])
def test_only_a_generator_keeps_its_second_time(tmp_path: Path, stage: str) -> None:
    flow, config = load_checkpoint(tiny_generator(tmp_path / "one", stage))
    save_checkpoint(tmp_path / "two", add_second_time(flow), config)
    flow, config = load_flow(tmp_path / "two")
    assert config.two_time
    assert flow.two_time == (stage == "generator")


def test_weights_are_known_by_their_digest(tmp_path: Path) -> None:
    """That of the file; of raw weights, which no file holds alone, of their names and values."""
    folder = tiny_generator(tmp_path / "c")
    model = load_model(folder)
    assert weights_digest(folder, model) == sha256_file(folder / MODEL)
    digest = tensors_digest(model)
    assert weights_digest(folder, model, "raw") == digest == tensors_digest(load_model(folder))
    rounded = tensors_digest(model.half())
    assert digest != rounded == tensors_digest(model.float())
    with torch.no_grad():
        model.flow.network.out_gain.add_(1)
    changed = tensors_digest(model)
    assert changed != rounded
    state = model.flow.state_dict()
    model.flow.state_dict = lambda: {f"other.{name}": tensor for name, tensor in state.items()}
    assert tensors_digest(model) != changed


def test_results_are_of_the_average(tmp_path: Path) -> None:
    """Not of the raw weights, which differ from it."""
    run = tiny_generator(tmp_path / "run" / "generator", results=({"fid": 1.0},), ema={"half_life": 5.0}).parent
    assert load_flow(run)[1].results == ({"fid": 1.0},)
    state = run / "state" / f"{8:012d}"
    state.mkdir(parents=True)
    raw = {f"weights.network.{name}": tensor for name, tensor in load_tensors(run / "generator" / MODEL)[0].items()}
    raw["weights.network.out_gain"] += 1
    save_tensors(state / "generator.safetensors", raw)
    digest = sha256_file(state / "generator.safetensors")
    (state / "progress.json").write_text(f'{{"images": 8, "window": {{}}, "sha256": {{"generator": "{digest}"}}}}')
    for source, weights in ((run, "raw"), (state, "raw"), (state, "ema")):
        config = load_flow(source, weights)[1]
        assert (config.results, config.ema, config.images_seen) == ((), None, 8)
    model = load_model(run, weights="raw")
    assert weights_digest(state, model) == tensors_digest(model) != tensors_digest(load_model(run))
    assert open_source(state).sha256 == digest
    (state / "generator.safetensors").rename(state / "teacher.safetensors")  # of a method that trains one
    assert open_source(state).sha256 == digest


def test_the_outline_of_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RESOLUTIONS, (1,), 4)
    torch.save(weights_of((1,), attending=(), classes=0), tmp_path / "edm_x.pt")
    flow = outline(tmp_path / "edm_x.pt")
    assert (flow.img_resolution, flow.img_channels) == (4, 3)
    assert all(parameter.is_meta for parameter in flow.parameters())


def test_the_outline_of_a_run_is_that_of_its_generator(tmp_path: Path) -> None:
    folder = tiny_generator(tmp_path / "run" / "generator")
    write_config(folder, replace(read_config(folder), label_dropout=0.25))
    assert outline(folder.parent).label_dropout == 0.25
