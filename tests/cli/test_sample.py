"""`edmdistill sample`, from the words of a command to files."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from tiny_generator import tiny_generator

from edmdistill.checkpoints.config import (
    CheckpointConfig,
    Guidance,
    Provenance,
    SamplingDefaults,
    describe,
)
from edmdistill.checkpoints.encoder import PIXELS
from edmdistill.checkpoints.load import load_generator, load_model
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.cli import main
from edmdistill.cli.sampling_options import SamplerGrid, SamplerOptions
from edmdistill.cli.types import MAX_GUIDANCE, MAX_NFE, PROTOCOLS, SOLVERS
from edmdistill.evaluation import protocol
from edmdistill.networks import NETWORKS
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import PRECONDITIONINGS
from edmdistill.sampling import files, spec
from edmdistill.sampling.decode import open_decoder
from edmdistill.sampling.generate import sample
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.heun import Churn
from edmdistill.sampling.reference import ReferenceFiles

NAMES = ("zero", "one", "tree frog")
LATENTS = {"kind": "StabilityVAEEncoder", "vae_name": "nobody/vae", "scale": [0.5] * 4, "bias": [0.1] * 4}


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["sample", *map(str, words), "--device", "cpu"])


def checkpoint(
    folder: Path,
    *,
    label_dim: int = 3,
    channels: int = 1,
    stage: str = "generator",
    guidance: tuple[float, float] | None = None,
    encoder: dict[str, object] = PIXELS,
) -> Path:
    torch.manual_seed(0)
    network = NETWORKS["edm2"](
        img_resolution=8,
        img_channels=channels,
        label_dim=label_dim,
        model_channels=8,
        channel_mult=[1],
        num_blocks=1,
        attn_resolutions=[],
        channels_per_head=8,
        guided=guidance is not None,
    )
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.constant_(parameter, 0.5)  # gains and the map of guidance, 0 at first
    flow = FlowNetwork(network, PRECONDITIONINGS["edm"]())
    config = CheckpointConfig(
        stage=stage,
        label_names=NAMES if label_dim else None,
        sampling=SamplingDefaults({"1": (80.0,), "2": (80.0, 3.0)}),
        guidance=None if guidance is None else Guidance("network", guidance),
        provenance=Provenance(source="a test"),
        encoder=encoder,
        **describe(flow),
    )
    save_checkpoint(folder, flow, config)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    checkpoint(root / "run" / "generator")
    return {
        "run": root / "run",
        "generator": root / "run" / "generator",
        "diffusion run": checkpoint(root / "diffusion" / "generator", stage="teacher").parent,
        "teacher": checkpoint(root / "teacher", stage="teacher"),
        "plain": checkpoint(root / "plain", label_dim=0, channels=3),
        "latent": checkpoint(root / "latent", channels=4, encoder=LATENTS),
        "unknown": checkpoint(root / "unknown", channels=4),
        "guided": checkpoint(root / "guided", guidance=(1.0, 2.0)),
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_a_launcher_of_several_processes_is_told_that_they_share_nothing(
    runs: dict[str, Path], tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `torchrun --nproc-per-node 8 generate.py` of EDM's does."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "8")
    result = run(runs["generator"], "--seeds", "0", "--out", tmp_path / "out")
    assert ("if all 8 processes run this command, each draws all of --seeds" in result.stderr) == (rank == 0)


def test_npz(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    result = run(runs["run"], "--seeds", "0-2,100", "--class", "Tree Frog", "--class", "1", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert result.stderr.endswith("4 images\n")
    expected = sample(load_generator(runs["generator"]), 2, seeds=[0, 1, 2, 100], labels=[2, 1, 2, 1])
    with np.load(out) as file:
        assert np.array_equal(file["images"], to_uint8(expected).permute(0, 2, 3, 1))
        assert file["seeds"].tolist() == [0, 1, 2, 100]
        assert file["labels"].tolist() == [2, 1, 2, 1]


def test_folder_and_grid(runs: dict[str, Path], tmp_path: Path) -> None:
    assert run(runs["run"], "--seeds", "0-5", "--out", tmp_path / "frogs").exit_code == 0
    assert run(runs["run"], "--seeds", "0-5", "--out", tmp_path / "frogs.png").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "frogs").iterdir()) == [f"{i:06d}.png" for i in range(6)] + [
        "dataset.json",
        "samples.json",
    ]
    assert (tmp_path / "frogs-grid.png").read_bytes() == (tmp_path / "frogs.png").read_bytes()
    expected = to_uint8(sample(load_generator(runs["generator"]), seeds=range(6)))
    with Image.open(tmp_path / "frogs" / "000004.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), expected[4, 0])


OPTIONS = {
    "nfe": ("generator", ["--nfe", 1], {"nfe": 1}),
    "t": (
        "generator",
        ["--t", "80,3,1.1rad", "--gamma", 0.5],
        {"times": [1.5645463353, 1.4056476494, 1.1], "gamma": 0.5},
    ),
    "teacher": ("teacher", ["--nfe", 5, "--class", "one"], {"nfe": 5, "labels": 1}),
    "run": ("diffusion run", ["--nfe", 3, "--class", "tree frog"], {"nfe": 3, "labels": 2}),
    "solver": ("teacher", ["--nfe", 4, "--solver", "dpm-solver++2m"], {"nfe": 4, "solver": "dpm-solver++2m"}),
    "t of a teacher": (
        "teacher",
        ["--t", "80,3,1.1rad", "--solver", "ipndm"],
        {"times": [1.5645463353, 1.4056476494, 1.1], "solver": "ipndm"},
    ),
    "churn": (
        "teacher",
        ["--nfe", 5, "--churn", 2, "--churn-noise", 1.01],
        {"nfe": 5, "churn": Churn(2, inflation=1.01)},
    ),
    "guidance": (
        "teacher",
        ["--nfe", 5, "--guidance", 2, "--force-guidance"],
        {"nfe": 5, "guidance": 2.0, "force_guidance": True},
    ),
    "guided generator": ("guided", ["--guidance", 1.8], {"guidance": 1.8}),
    "unconditional": ("plain", ["--nfe", 2, "--batch", 2], {"nfe": 2}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_reach_the_sampler(runs: dict[str, Path], tmp_path: Path, case: str) -> None:
    kind, words, options = OPTIONS[case]
    result = run(runs[kind], "--seeds", "0-2", *words, "--out", tmp_path / "a.npz")
    assert result.exit_code == 0, result.output
    model = load_model(runs[kind])
    expected = to_uint8(sample(model, seeds=range(3), **options)).permute(0, 2, 3, 1)
    with np.load(tmp_path / "a.npz") as file:
        assert (abs(file["images"].astype(int) - expected.numpy()) <= 1).all()
        assert (file["labels"] >= 0).all() == (kind != "plain")


def test_the_choices_and_limits_are_the_librarys() -> None:
    assert tuple(spec.SOLVERS) == SOLVERS
    assert tuple(protocol.PROTOCOLS) == PROTOCOLS
    assert (spec.MAX_NFE, spec.MAX_GUIDANCE) == (MAX_NFE, MAX_GUIDANCE)


def test_a_guide_and_a_precision(runs: dict[str, Path], tmp_path: Path) -> None:
    guide = tiny_generator(tmp_path / "guide", stage="teacher", scale=2, label_dim=len(NAMES))
    words = ["--nfe", 3, "--seeds", 0, "--guidance", 0, "--guide", guide, "--dtype", "float64"]
    assert run(runs["teacher"], *words, "--out", tmp_path / "a.npz").exit_code == 0
    assert run(guide, *words[:4], "--out", tmp_path / "b.npz").exit_code == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert np.array_equal(a["images"], b["images"])  # at weight 0 the guide alone
    refused = run(runs["teacher"], *words[:-3], runs["teacher"], "--out", tmp_path / "c.npz")
    assert refused.exit_code == 2
    assert "the guide has the network's own weights, so it has no effect" in refused.stderr


def test_what_guides_a_network_computes_as_it_was_asked_to(runs: dict[str, Path], tmp_path: Path) -> None:
    flow, teacher = load_model(runs["teacher"]).flow, str(runs["teacher"])
    words: dict[str, Any] = {"guide": teacher, "force_guidance": False}
    one = SamplerOptions(times=None, guidance=1.5, solver=None, **words).spec(flow, torch.bfloat16)
    (swept,) = SamplerGrid(times=(), guidance=[1.5], solvers=(), **words).specs(flow, torch.bfloat16, [None], [None])
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    files = ReferenceFiles(image=tmp_path / "a.png", feature_net="identity", score=teacher)
    for network in (one.guide, swept.guide, files.load(flow, torch.bfloat16).score):
        assert network is not None
        assert network.flow.activation_dtype == torch.bfloat16


@pytest.mark.parametrize("command", ["sample", "sweep"])
def test_a_guide_is_loaded_by_its_own_rule(
    command: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guide that predicts the noise stays exact beside a network that computes in half precision by default."""
    asked: list[Any] = []

    def load(source: str, device: torch.device, dtype: Any) -> None:
        asked.append(dtype)
        raise KeyboardInterrupt

    monkeypatch.setattr("edmdistill.checkpoints.load.load_denoiser", load)
    rest = (
        ["--seeds", "0", "--out", str(tmp_path / "a.npz")]
        if command == "sample"
        else ["--protocol", "digits", "--nfe", "3"]
    )
    for dtype in (None, "float16"):
        words = [] if dtype is None else ["--dtype", dtype]
        words += ["--guidance", "1.5", "--guide", str(runs["teacher"]), "--device", "cpu", *rest]
        CliRunner().invoke(main, [command, str(runs["teacher"]), *words])
    assert asked == ["auto", torch.float16]


def test_an_official_pickle(golden: Path, tmp_path: Path) -> None:
    result = run(golden / "edm-tiny-cond.pkl", "--nfe", 3, "--seeds", "5-7", "--out", tmp_path / "new" / "a.npz")
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "new" / "a.npz") as file:
        assert file["images"].shape == (3, 8, 8, 3)


def test_latents(runs: dict[str, Path], tmp_path: Path) -> None:
    result = run(runs["latent"], "--seeds", "0-2", "--latents", "--out", tmp_path / "a.npz")
    assert "latents of a VAE, undecoded" in result.stderr
    with np.load(tmp_path / "a.npz") as file:
        assert file["latents"].shape == (3, 4, 8, 8)


def test_latents_are_decoded(runs: dict[str, Path], golden: Path, tmp_path: Path) -> None:
    vae = golden / "evaluation/latents/tiny-vae"
    for out in ("frogs", "a.npz"):
        result = run(runs["latent"], "--seeds", "0-2", "--vae", vae, "--out", tmp_path / out)
        assert result.exit_code == 0, result.output
    expected = open_decoder(LATENTS, str(vae))(sample(load_generator(runs["latent"]), 2, seeds=[0, 1, 2]))
    assert expected.shape == (3, 3, 64, 64)
    with np.load(tmp_path / "a.npz") as file:
        assert np.abs(file["images"].astype(int) - expected.permute(0, 2, 3, 1).numpy()).max() <= 1
    with Image.open(tmp_path / "frogs" / "000002.png") as image:
        assert np.abs(np.asarray(image).astype(int) - expected[2].permute(1, 2, 0).numpy()).max() <= 1
    other = run(runs["latent"], "--seeds", "0-2", "--latents", "--out", tmp_path / "a.npz")
    assert "already exists" in other.stderr


def test_another_vae_than_the_checkpoint_s_is_said(golden: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "latent", channels=4, encoder=LATENTS | {"vae_sha256": "0" * 64})
    vae = golden / "evaluation/latents/tiny-vae"
    result = run(source, "--seeds", "0", "--vae", vae, "--out", tmp_path / "a.npz")
    assert (result.exit_code, "other weights" in result.stderr) == (0, True)


def test_the_layout_of_adm(runs: dict[str, Path], tmp_path: Path) -> None:
    assert run(runs["run"], "--seeds", "0-2", "--out", tmp_path / "a.npz", "--layout", "adm").exit_code == 0
    with np.load(tmp_path / "a.npz") as file:
        assert {name: file[name].shape for name in file} == {"arr_0": (3, 8, 8, 3), "arr_1": (3,)}


def test_what_a_grid_does_not_show_is_not_drawn(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_GRID", 2)
    drawn = run(runs["plain"], "--nfe", 1, "--seeds", "0-4", "--out", tmp_path / "a.png")
    assert drawn.stderr.splitlines() == [
        "A grid shows the first 2 images, so only these of the 5 are drawn.",
        f"{tmp_path / 'a.png'}: 2 images",
    ]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """TorchScript files: a classifier to whom class 1 looks bright and the others dark, and the upper half."""
    root = tmp_path_factory.mktemp("scripts")
    functions = {
        "bright": lambda x: x.mean((1, 2, 3))[:, None] * torch.tensor([-20.0, 20.0, -20.0]),
        "upper": lambda x: x[:, :, :4],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, function in functions.items():
            torch.jit.trace(function, torch.zeros(2, 1, 8, 8)).save(str(root / f"{name}.pt"))
    return {name: root / f"{name}.pt" for name in functions}


def test_rejection(runs: dict[str, Path], scripts: dict[str, Path], tmp_path: Path) -> None:
    words = ["--seeds", "0-5", "--class", "1", "--class", "2", "--nfe", 1, "--reject", 0.5]
    result = run(runs["run"], *words, "--classifier", scripts["bright"], "--out", tmp_path / "a.npz")
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "a.npz") as file:
        images, seeds, labels = file["images"], file["seeds"], file["labels"]
    assert labels.tolist() == [1, 2, 1, 2, 1, 2]
    again = sample(load_generator(runs["run"] / "generator"), 1, seeds=seeds.tolist(), labels=torch.tensor(labels))
    assert (abs(images.astype(int) - to_uint8(again).permute(0, 2, 3, 1).numpy()) <= 1).all()
    pool = sample(load_generator(runs["run"] / "generator"), 1, seeds=[0, 2, 4, 6, 7, 8], labels=1)
    brightest = to_uint8(pool).double().mean((1, 2, 3)).argsort(descending=True)[:3]
    assert seeds[labels == 1].tolist() == sorted([0, 2, 4, 6, 7, 8][i] for i in brightest)


def test_a_reference(runs: dict[str, Path], scripts: dict[str, Path], tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "bright.png")
    Image.fromarray(np.repeat(np.uint8([[255], [0]]), 4, 0) * np.ones((1, 8), np.uint8)).save(tmp_path / "mask.png")
    words = ["--seeds", "0-7", "--reference", tmp_path / "bright.png", "--reference-weight", 20, "--t", "80,0.3"]
    drawn = {}
    for name, net in {"script": scripts["upper"], "mask": f"mask:{tmp_path / 'mask.png'}", "all": "identity"}.items():
        out = tmp_path / f"{name}.npz"
        result = run(runs["run"], *words, "--feature-net", net, "--score", runs["teacher"], "--out", out)
        assert result.exit_code == 0, result.output
        with np.load(out) as file:
            drawn[name] = file["images"].astype(int)
    assert (abs(drawn["script"] - drawn["mask"]) <= 1).all()
    assert drawn["all"][:, 4:].mean() > drawn["mask"][:, 4:].mean()  # the lower half is pulled, too


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reject", "0.5"], "go together"),
        (["--reject", "0.5", "--classifier", "nowhere.pt"], "cannot be read as TorchScript"),
        (["--reject", "0.5", "--classifier", "digits"], "of 3 classes"),
        (["--correctors", "3"], "are for --reference"),
        (["--reference", "DIR/gray.png"], "go together"),
        (["--reference", "DIR/gray.png", "--feature-net", "gray"], "name its teacher"),
        (["--reference", "DIR/wide.png", "--feature-net", "gray"], "is 9x8"),
        (["--reference", "DIR/none.png", "--feature-net", "gray"], "cannot be read as a picture"),
    ],
)
def test_mistakes_about_files(runs: dict[str, Path], tmp_path: Path, words: list[str], message: str) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "gray.png")
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    (tmp_path / "none.png").write_text("nothing")
    words = [word.replace("DIR", str(tmp_path)) for word in words]
    result = run(runs["run"], "--seeds", "0-1", *words, "--out", tmp_path / "a.npz")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("generator", ["--seeds", "3-1"], "'3-1' is neither a seed"),
        ("generator", ["--class", "tree forg"], "did you mean 'tree frog'"),
        ("generator", ["--class", "3"], "run from 0 to 2"),
        ("plain", ["--class", "1"], "unconditional"),
        ("generator", ["--t", "2.5,80"], "must decrease"),
        ("generator", ["--t", "800"], "0.002 to 80"),
        ("generator", ["--t", "1.6rad"], "above 0 and at most pi/2"),
        ("latent", [], "the VAE nobody/vae is not in the Hub's cache: name the VAE's folder or its Hub id with --vae"),
        ("generator", ["--gamma", "1.5"], "1.5 is not in the range 0<=x<=1"),
        ("generator", ["--guidance", "2"], "supports guidance 1 (none) only"),
        ("guided", ["--guidance", "2.5"], "supports guidance 1 to 2"),
        ("teacher", ["--nfe", "4"], "3 or 5"),
        ("teacher", ["--gamma", "0.5"], "for generators"),
        ("teacher", ["--guidance", "2", "--guide", "nowhere.pkl"], "nowhere.pkl does not exist"),
        ("generator", ["--device", "warp"], "there is no device 'warp'"),
        ("generator", ["--dtype", "tf32"], "tf32 is for CUDA, and this runs on the CPU: use float32"),
        ("latent", ["--vae", "nowhere"], "there is no VAE nowhere"),
        ("latent", ["--latents"], "--latents go into an .npz"),
        ("latent", ["--latents", "--vae", "a"], "leave one of them out"),
        ("unknown", [], "images of 4 channels, and its checkpoint does not say how to decode them"),
        ("plain", ["--vae", "a"], "has no effect because the network works on pixels"),
        ("plain", ["--latents"], "--latents go into an .npz"),
        ("plain", ["--layout", "adm"], "leave out --layout"),
        ("plain", ["--reject", "0.5", "--classifier", "digits"], "this network has none"),
        ("missing", [], "does not exist"),
    ],
)
def test_the_users_errors(runs: dict[str, Path], tmp_path: Path, kind: str, words: list[str], message: str) -> None:
    out = tmp_path / "out"
    command = ["sample", str(runs.get(kind, tmp_path / kind)), "--device", "cpu", *words, "--out", str(out)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1
    assert not list(tmp_path.iterdir())
