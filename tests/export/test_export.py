"""What is exported makes the images of `edmdistill sample`."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_set import NETWORKS
from msgspec.structs import replace
from tiny_generator import tiny_generator
from tolerance import assert_rounded, depth
from two_times import with_second_time

from edmdistill.checkpoints.config import (
    default_nfe,
)
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.load import load_flow
from edmdistill.cli.export import TARGETS as CHOICES
from edmdistill.errors import EdmDistillError
from edmdistill.export import parity
from edmdistill.export.diffusers import FILES, _require_pixels
from edmdistill.export.folder import TARGETS, export
from edmdistill.export.one_step import OneStep
from edmdistill.export.parity import compare, step_sampler
from edmdistill.networks.flow import Denoiser
from edmdistill.networks.preconditioning import EDM
from edmdistill.sampling.decode import model_decoder
from edmdistill.sampling.generate import sample
from edmdistill.sampling.grid import to_image, to_uint8
from edmdistill.trigflow import cos_sin, sigma_to_time

RGB = "edm2-rgb-cond.pkl"


def test_the_choices_are_the_targets():
    assert tuple(TARGETS) == CHOICES


def test_the_readmes_say_what_a_network_takes(runs: Path, tmp_path: Path):
    """The inputs that it has, and the noise levels and the number of steps that it was made for."""
    sid = tiny_generator(tmp_path / "sid", label_dim=0, preconditioning=EDM(sigma_max=2.5))
    for folder, optional in ((runs / "pixels", ["labels", "w"]), (runs / "jumps", ["labels", "sigma_next"]), (sid, [])):
        flow, config = load_flow(folder)
        for target in ("onnx", "torch-export"):
            text = TARGETS[target].readme(flow, config)
            assert re.findall(r"^- `(\w+)`:", text, re.MULTILINE) == ["x", "sigma", *optional, "x0"]
            assert re.findall(r"(?:: |=)(\w+)[,}\)]", text.partition("\n\n- ")[0]) == ["x", "sigma", *optional]
            assert f"noise levels, from {flow.sigma_min:g} to {flow.sigma_max:g}." in text
            assert "labels" not in optional or "class numbers, 0 to 2; -1" in text
        text = TARGETS["diffusers"].readme(flow, config)
        assert f"num_inference_steps={default_nfe(config)}, generator=generator" in text
        assert ("class_labels=0" in text) == bool(flow.label_dim)
        assert f"from {flow.sigma_max:g} to {flow.sigma_min:g}" in text.replace("\n", " ")


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_one_step_is_the_denoiser(golden: Path, name: str):
    flow, _ = load_flow(golden / name)
    x, sigma = torch.randn(2, flow.img_channels, flow.img_resolution, flow.img_resolution), torch.tensor([0.3, 7.0])
    labels = torch.tensor([1, -1]) if flow.label_dim else None
    vectors = None if labels is None else torch.eye(flow.label_dim + 1)[labels, :-1]
    expected = [Denoiser(flow.eval())(x, sigma, vectors), Denoiser(flow)(x, sigma)]
    step = OneStep(flow.network, flow.preconditioning)
    assert_rounded(step(x, sigma, labels), expected[0], depth(flow))  # folded weights lie elsewhere
    assert_rounded(step(x, sigma), expected[1], depth(flow))


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_one_step_of_two_times_is_the_jump(golden: Path, name: str):
    torch.manual_seed(0)
    flow = with_second_time(load_flow(golden / name)[0]).eval()
    shape = 2, flow.img_channels, flow.img_resolution, flow.img_resolution
    sigma = torch.tensor([0.7, 7.0])
    x, t = sigma[:, None, None, None] * torch.randn(shape), sigma_to_time(sigma, flow.sigma_data)
    step, found = OneStep(flow.network, flow.preconditioning), []
    for sigma_next in torch.tensor([[0.0, 0.0], [0.3, 5.0]]):
        s = sigma_to_time(sigma_next, flow.sigma_data)
        expected = flow.jump(cos_sin(t, x)[0] * x, t, s) / cos_sin(s, x)[0]
        share = (sigma_next / sigma)[:, None, None, None]
        found.append(step(x, sigma, sigma_next=sigma_next))
        difference = (share * x + (1 - share) * found[-1] - expected).abs().max() / expected.abs().max()
        assert difference < 1e-4  # VP's; others' are 1e-6: in float32, 1 + sigma^2 knows little of a small sigma
    assert torch.equal(step(x, sigma), found[0])
    assert (found[1] - found[0]).abs().amax((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize(("name", "w"), [pytest.param("pixels", 2.0, marks=pytest.mark.slow), ("jumps", None)])
def test_torch_export(runs: Path, tmp_path: Path, name: str, w: float | None):
    out = tmp_path / "out"
    found = export(runs / name, "torch-export", out)
    assert [row.nfe for row in found] == [1, 2]
    assert max(row.difference for row in found) < 1e-4
    document = json.loads((out / "export.json").read_text())
    assert document["sigmas"]["2"] == pytest.approx([80, 3])
    assert (document["to"], document["gamma"], document["checkpoint"]["stage"]) == ("torch-export", 0.7, "generator")
    assert document["parity"] == [row._asdict() for row in found]
    assert parity.table(found) in (out / "README.md").read_text()
    # By hand, as the README says.
    step = torch.export.load(out / "model.pt2").module()
    flow, config = load_flow(runs / name)
    rng, levels, gamma = torch.Generator().manual_seed(5), document["sigmas"]["3"], 0.6
    x = levels[0] * torch.randn(1, flow.img_channels, flow.img_resolution, flow.img_resolution, generator=rng)
    torch.randint(flow.label_dim, [], generator=rng)
    for sigma, after in pairwise([*levels, 0.0]):
        sigma_next = (1 - gamma**2) ** 0.5 * after
        more = {"w": torch.tensor([w])} if w else {"sigma_next": torch.tensor([sigma_next])}
        x0 = step(x=x, sigma=torch.tensor([sigma]), labels=torch.tensor([1]), **more)
        z = torch.randn(x.shape, generator=rng)
        x = sigma_next / sigma * x + (1 - sigma_next / sigma) * x0 + gamma * after * z
    expected = sample(Generator(flow, config), 3, seeds=[5], labels=1, gamma=gamma, guidance=w)
    torch.testing.assert_close(x.clamp(-1, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixels", "jumps"])
def test_onnx(runs: Path, tmp_path: Path, name: str):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="the extra [onnx] is not installed")
    assert max(row.difference for row in export(runs / name, "onnx", tmp_path / "out")) < 1e-4
    assert (tmp_path / "out" / "model.onnx").stat().st_size > 10_000
    graph = sys.modules["onnx"].load(tmp_path / "out" / "model.onnx").graph
    axes = [value.type.tensor_type.shape.dim[0] for value in [*graph.input, *graph.output]]
    assert [axis.dim_param for axis in axes] == ["batch"] * len(axes)


@torch.no_grad()
@pytest.mark.parametrize(
    ("wrong", "nfe"),
    [
        (lambda step, told: 1.01 * step(**told), 1),
        (lambda step, told: math.nan * step(**told), 1),
        (lambda step, told: step(**told | {"sigma_next": told["sigma"]}), 1),
        (lambda step, told: step(**told | {"sigma_next": torch.zeros_like(told["sigma"])}), 2),
    ],
    ids=["scaled", "nan", "told sigma", "told 0"],
)
def test_another_step_makes_other_images(runs: Path, wrong: Callable[..., torch.Tensor], nfe: int):
    flow, config = load_flow(runs / "jumps")
    step = OneStep(flow.network, flow.preconditioning).eval()
    assert max(row.difference for row in compare(flow, config, step_sampler(flow, config, step))) < 1e-5
    with pytest.raises(EdmDistillError, match=f"with {nfe} network evaluations?, its images differ"):
        compare(flow, config, step_sampler(flow, config, lambda **told: wrong(step, told)))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(golden: Path, tmp_path: Path, name: str, to: str):
    if to == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    export(golden / name, to, tmp_path / "out")


@pytest.fixture(scope="module")
def monkeypatches() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def pipelines(
    runs: Path, vae: str, tmp_path_factory: pytest.TempPathFactory, monkeypatches: pytest.MonkeyPatch
) -> dict:
    diffusers = pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
    monkeypatches.setattr(
        "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules"))
    )
    made = {}
    for name in ("pixels", "jumps", "latents"):
        folder = tmp_path_factory.mktemp("pipelines") / name
        export(runs / name, "diffusers", folder, vae=vae if name == "latents" else None)
        made[name] = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        made[name].set_progress_bar_config(disable=True)
    return made


def streams(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(("name", "w"), [("pixels", 2.5), ("jumps", None)])
def test_a_pipeline_samples_as_we_do(pipelines: dict, runs: Path, name: str, w: float | None):
    pipe, ours = pipelines[name], Generator(*load_flow(runs / name))
    sigmas = [60.0, 2.0, 2.0, 0.3]
    times = [math.atan(sigma / ours.flow.sigma_data) for sigma in sigmas]
    for words, options in (
        ({"num_inference_steps": 3, "guidance_scale": w}, {"nfe": 3, "guidance": w}),
        ({"sigmas": sigmas, "gamma": 0.0, "class_labels": "Number 2"}, {"times": times, "gamma": 0.0, "labels": 2}),
        (
            {"sigmas": sigmas, "gamma": 0.4, "class_labels": torch.tensor([1, 0])},
            {"times": times, "gamma": 0.4, "labels": [1, 0]},
        ),
    ):
        found = pipe(generator=streams(4, 9), output_type="pt", **words).images
        expected = sample(ours, seeds=[4, 9], **options) / 2 + 0.5
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    (picture,) = pipe(generator=streams(4)).images
    (pixels,) = to_uint8(sample(ours, seeds=[4]))
    found, expected = (np.asarray(image).astype(int) for image in (picture, to_image(pixels)))
    assert found.shape == expected.shape
    assert abs(found - expected).max() <= 1


def test_a_pipeline_draws_as_many_as_it_is_asked_for(pipelines: dict):
    pipe, like = pipelines["pixels"], {"num_inference_steps": 1, "output_type": "latent"}
    assert len(pipe(**like).images) == 1
    (images,) = pipe(batch_size=3, return_dict=False, **like)
    assert len(images) == 3
    by_name = pipe(class_labels=["Number 2", "number 0"], generator=streams(1, 1), **like).images
    by_number = pipe(class_labels=[2, 0], generator=streams(1, 1), **like).images
    assert torch.equal(by_name, by_number)
    assert not torch.equal(by_number[0], by_number[1])
    one, other = (pipe(batch_size=3, generator=streams(5)[0], **like).images for _ in range(2))
    assert torch.equal(one, other)


def test_a_pipeline_decodes_any_number_of_latents(pipelines: dict):
    pipe = pipelines["latents"]
    latents = torch.randn(9, 4, 8, 8, generator=streams(0)[0])  # more than the VAE takes at a time
    singles = torch.cat([pipe.pictures(latents[i : i + 1], "pt") for i in range(9)])
    torch.testing.assert_close(pipe.pictures(latents, "pt"), singles, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("shift", "same"), [(1, True), (-1, True), (2, False), (-2, False)])
def test_pictures_that_differ_from_ours_are_not_exported(shift: int, same: bool):
    ours = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    pipe = SimpleNamespace(pictures=lambda latents, kind: [to_image(image) for image in ours + shift])
    with nullcontext() if same else pytest.raises(EdmDistillError, match="its decoded pictures differ from ours by 2"):
        _require_pixels(pipe, lambda latents: ours, torch.zeros(1))


def test_a_pipeline_of_latents_holds_its_vae_and_decodes_as_we_do(pipelines: dict, runs: Path, vae: str):
    pipe, ours = pipelines["latents"], Generator(*load_flow(runs / "latents"))
    expected = model_decoder(ours, vae)(sample(ours, 2, seeds=[3])).permute(0, 2, 3, 1).numpy()
    pictures = np.stack([np.asarray(picture) for picture in pipe(generator=streams(3)).images])
    assert np.abs(pictures.astype(int) - expected).max() <= 1
    unit = pipe(generator=streams(3), output_type="np").images
    assert np.abs(np.floor(unit * 255) - expected).max() <= 1
    with pytest.raises(ValueError, match="takes none"):
        pipe(generator=streams(0), output_type="latent", guidance_scale=2.0)
    held = pipe.vae
    pipe.register_modules(vae=None)
    with pytest.raises(ValueError, match=r"load the pipeline with vae=AutoencoderKL"):
        pipe(generator=streams(0))
    pipe.register_modules(vae=held)


def test_a_pipeline_knows_the_range_of_scm(pipelines: dict, runs: Path, vae: str):
    """In sCM's range, a VAE's pixels are rounded as those of other networks."""
    pipe, ours = pipelines["latents"], Generator(*load_flow(runs / "latents"))
    ours.config = replace(ours.config, encoder=ours.config.encoder | {"range": "scm"})
    latents = sample(ours, 2, seeds=[0])
    pipe.register_to_config(latent_range="scm")
    found = np.asarray(pipe.pictures(latents)[0]).astype(int)
    pipe.register_to_config(latent_range="edm2")
    assert np.abs(found - model_decoder(ours, vae)(latents)[0].permute(1, 2, 0).numpy()).max() <= 1


def test_a_vae_that_would_do_nothing_is_refused(runs: Path, vae: str, tmp_path: Path):
    with pytest.raises(EdmDistillError, match=r"--to nvidia holds the network alone, so --vae .* has no effect"):
        export(runs / "latents", "nvidia", tmp_path / "out", vae=vae)
    with pytest.raises(EdmDistillError, match="has no effect because the network works on pixels"):
        export(runs / "pixels", "diffusers", tmp_path / "out", vae=vae)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_a_pipeline_that_diffusers_saves_is_loaded_again(pipelines: dict, name: str, tmp_path: Path):
    """With the code of its own, though other pipelines have been loaded since, into the same files and modules."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    pipe = pipelines[name]
    pipe.save_pretrained(tmp_path / "saved")
    exported = Path(pipe.config._name_or_path)
    ours, theirs = (json.loads((folder / "model_index.json").read_text()) for folder in (exported, tmp_path / "saved"))
    assert {key: value for key, value in theirs.items() if key != "_name_or_path"} == ours
    for file in FILES:
        assert (tmp_path / "saved" / file).read_bytes() == (exported / file).read_bytes()
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    found, expected = (np.asarray(each(generator=streams(4)).images[0]).astype(int) for each in (again, pipe))
    assert np.abs(found - expected).max() <= 1
    again.scheduler = DDIMScheduler()
    again.save_pretrained(tmp_path / "other")
    assert json.loads((tmp_path / "other/model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert sorted(path.name for path in (tmp_path / "other/scheduler").iterdir()) == ["scheduler_config.json"]


def test_a_pipeline_outlives_the_next_one(pipelines: dict):
    """diffusers runs the code anew for whichever pipeline is loaded, in the module that the first one has."""
    for pipe in pipelines.values():
        assert pipe(generator=streams(0), output_type="latent").images.isfinite().all()


@pytest.mark.parametrize(
    "stored", [{}, {"1": [2.5]}, {"2": [80.0, 2.0]}, {"4": [80.0, 9.0, 2.0, 0.5], "8": [80.0] * 8}]
)
def test_a_pipelines_default_number_of_steps_is_samples(stored: dict[str, list[float]], runs: Path):
    pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
    from edmdistill.export.remote.scheduler import GammaScheduler

    config = load_flow(runs / "pixels")[1]
    expected = default_nfe(replace(config, sampling=replace(config.sampling, sigmas=stored)))
    scheduler = GammaScheduler(sigmas=stored)
    scheduler.set_timesteps()
    assert len(scheduler.timesteps) == expected
    if stored:
        assert scheduler.timesteps.tolist() == stored[str(expected)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"class_labels": 99}, "no class 99"),
        ({"class_labels": "no such"}, "no class 'no such'"),
        ({"class_labels": "digit"}, "'digit' means 3 classes"),
        ({"class_labels": [1, 2, 3], "batch_size": 2}, r"have lengths \[3, 2\]"),
        ({"sigmas": [2.0, 80.0]}, "must decrease"),
        ({"sigmas": [800.0]}, "between 0.002 and 80"),
        ({"sigmas": [2.0, 0.001]}, "between 0.002 and 80"),
        ({"sigmas": []}, "must decrease"),
        ({"guidance_scale": 5.0}, r"must be in \[1, 3\]"),
        ({"gamma": 1.5}, r"must be in \[0, 1\]"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"output_type": "jpg"}, "not 'jpg'"),
    ],
)
def test_a_pipelines_errors(pipelines: dict, words: dict, message: str):
    with pytest.raises(ValueError, match=message):
        pipelines["pixels"](**words)


@pytest.mark.parametrize(("to", "package"), [("diffusers", "diffusers"), ("onnx", "onnxscript")])
def test_a_package_that_is_missing_is_named(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, package: str
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EdmDistillError, match=rf"pip install 'edmdistill\[{to}\]'"):
        export(golden / RGB, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_an_export_that_is_not_the_same(golden: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(parity, "IMAGE_TOLERANCE", -1.0)
    with pytest.raises(EdmDistillError, match="nothing was exported: with 1 network evaluation, its images differ"):
        export(golden / RGB, "nvidia", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_is_replaced_if_that_is_said_and_other_things_never(golden: Path, tmp_path: Path):
    export(golden / RGB, "nvidia", tmp_path / "out")
    with pytest.raises(EdmDistillError, match="add --overwrite"):
        export(golden / RGB, "nvidia", tmp_path / "out")
    export(golden / RGB, "nvidia", tmp_path / "out", overwrite=True)
    with pytest.raises(EdmDistillError, match="is not an export"):
        export(golden / RGB, "nvidia", tmp_path, overwrite=True)
