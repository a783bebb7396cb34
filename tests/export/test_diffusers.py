"""Pipelines of networks that lack what others have: classes and their names, a VAE, the usual noise levels."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from tiny_generator import tiny_generator

from edmdistill.checkpoints.config import Guidance, SamplingDefaults, read_config, write_config
from edmdistill.checkpoints.load import load_generator
from edmdistill.errors import EdmDistillError
from edmdistill.export.folder import export
from edmdistill.networks.preconditioning import EDM
from edmdistill.sampling.generate import sample

diffusers = pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place for the code of the pipelines."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def loaded(folder: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_network_without_classes_from_another_noise_level(tmp_path: Path):
    """As SiD's generators are, whose guidance is built in."""
    folder = tiny_generator(tmp_path / "sid", label_dim=0, preconditioning=EDM(sigma_max=2.5))
    config = replace(read_config(folder), sampling=SamplingDefaults(gamma=0.5), guidance=Guidance("classes", (2, 2)))
    write_config(folder, config)
    export(folder, "diffusers", tmp_path / "out")
    assert "VAE" not in (tmp_path / "out" / "README.md").read_text()
    streams = [torch.Generator().manual_seed(seed) for seed in (4, 9)]
    expected = sample(load_generator(folder), seeds=[4, 9]) / 2 + 0.5
    pipe = loaded(tmp_path / "out")
    torch.testing.assert_close(pipe(generator=streams, output_type="pt").images, expected, rtol=0, atol=1e-4)
    for words in ({"class_labels": 0}, {"guidance_scale": 2.0}):
        with pytest.raises(ValueError, match=r"(has no classes|takes none): leave (them|it) out"):
            pipe(**words)
    # In half precision, images are float32, and near.
    streams = [stream.manual_seed(seed) for stream, seed in zip(streams, (4, 9), strict=True)]
    read: list[torch.dtype] = []
    pipe.unet.one_step.network.register_forward_pre_hook(lambda network, args: read.append(args[0].dtype))
    half = pipe.to(torch.bfloat16)(generator=streams, output_type="pt").images
    assert (read, half.dtype) == ([torch.bfloat16] * 2, torch.float32)
    assert 0 < (half - expected).abs().max() < 0.05


def test_latents_without_their_vae(tmp_path: Path):
    """The folder says how they are scaled, and its README how they are decoded."""
    statistics = {"scale": [0.5, 1.0, 1.5, 2.0], "bias": [0.1, 0.2, 0.3, 0.4]}
    encoder = {"kind": "StabilityVAEEncoder", "vae_name": 'nobody\'s "vae"', "range": "scm", **statistics}
    folder = tiny_generator(tmp_path / "latents", channels=4, encoder=encoder)
    export(folder, "diffusers", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert {key: index[f"latent_{key}"] for key in ("range", *statistics)} == {"range": "scm", **statistics}
    assert (index["vae"], index["id2label"]) == ([None, None], None)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert 'vae = AutoencoderKL.from_pretrained("nobody\'s \\"vae\\"")' in readme
    drawn = loaded(tmp_path / "out")(output_type="latent", class_labels=3, generator=torch.Generator().manual_seed(5))
    expected = sample(load_generator(folder), seeds=[5], labels=3)
    torch.testing.assert_close(drawn.images, expected, rtol=1e-4, atol=1e-4)


def test_a_pipeline_that_draws_other_images_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tiny_generator(tmp_path / "it")

    def black(**words: Any) -> SimpleNamespace:
        return SimpleNamespace(images=torch.zeros(3, 1, 8, 8))

    monkeypatch.setattr("edmdistill.export.diffusers._loaded", lambda out: black)
    with pytest.raises(EdmDistillError, match="nothing was exported: with 1 network evaluation, its images differ"):
        export(folder, "diffusers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_diffusers_own_logging_is_left_as_it_was(tmp_path: Path):
    logs = diffusers.utils.logging
    before = logs.get_verbosity()
    assert before != logs.ERROR
    assert [row.nfe for row in export(tiny_generator(tmp_path / "it"), "diffusers", tmp_path / "out")] == [1, 2]
    assert (logs.get_verbosity(), logs.is_progress_bar_enabled()) == (before, True)
