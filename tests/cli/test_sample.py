"""`edmdistill sample`, from the words of a command to files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from edmdistill.checkpoints.convert import load_generator, load_model
from edmdistill.checkpoints.store import CheckpointConfig, Guidance, Provenance, Sampling, facts, save_checkpoint
from edmdistill.cli import main
from edmdistill.cli.sample import SOLVERS
from edmdistill.networks import NETWORKS
from edmdistill.networks.preconditioning import PRECONDITIONINGS, FlowNetwork
from edmdistill.sampling import generate
from edmdistill.sampling.generate import sample
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.heun import Churn

NAMES = ("zero", "one", "tree frog")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["sample", *map(str, words), "--device", "cpu"])


def checkpoint(
    folder: Path,
    *,
    label_dim: int = 3,
    channels: int = 1,
    stage: str = "generator",
    guidance: tuple[float, float] | None = None,
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
        sampling=Sampling({"1": (80.0,), "2": (80.0, 3.0)}),
        guidance=None if guidance is None else Guidance("network", guidance),
        provenance=Provenance(source="a test"),
        **facts(flow),
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
        "latent": checkpoint(root / "latent", channels=4),
        "guided": checkpoint(root / "guided", guidance=(1.0, 2.0)),
    }


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
        "grid.png"
    ]
    assert (tmp_path / "frogs" / "grid.png").read_bytes() == (tmp_path / "frogs.png").read_bytes()
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
    "churn": (
        "teacher",
        ["--nfe", 5, "--churn", 2, "--churn-noise", 1.01],
        {"nfe": 5, "churn": Churn(2, inflation=1.01)},
    ),
    "guidance": ("teacher", ["--nfe", 5, "--guidance", 2], {"nfe": 5, "guidance": 2.0}),
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


def test_the_choices_are_the_solvers() -> None:
    assert tuple(generate.SOLVERS) == SOLVERS


def test_a_guide_and_a_precision(runs: dict[str, Path], tmp_path: Path) -> None:
    words = ["--nfe", 3, "--seeds", 0, "--guidance", 1.5, "--guide", runs["teacher"], "--dtype", "float64"]
    assert run(runs["teacher"], *words, "--out", tmp_path / "a.npz").exit_code == 0
    assert run(runs["teacher"], *words[:4], "--out", tmp_path / "b.npz").exit_code == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert np.array_equal(a["images"], b["images"])  # guided by itself, with its own labels: no guidance


def test_an_official_pickle(golden: Path, tmp_path: Path) -> None:
    result = run(golden / "edm-tiny-cond.pkl", "--nfe", 3, "--seeds", "5-7", "--out", tmp_path / "new" / "a.npz")
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "new" / "a.npz") as file:
        assert file["images"].shape == (3, 8, 8, 3)


def test_latents(runs: dict[str, Path], tmp_path: Path) -> None:
    result = run(runs["latent"], "--seeds", "0-2", "--out", tmp_path / "a.npz")
    assert "latents of a VAE, undecoded" in result.stderr
    with np.load(tmp_path / "a.npz") as file:
        assert file["latents"].shape == (3, 4, 8, 8)


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("generator", ["--seeds", "3-1"], "'3-1' is no seed"),
        ("generator", ["--class", "tree forg"], "did you mean 'tree frog'"),
        ("generator", ["--class", "3"], "run from 0 to 2"),
        ("plain", ["--class", "1"], "unconditional"),
        ("generator", ["--t", "2.5,80"], "fall"),
        ("generator", ["--t", "800"], "0.002 to 80"),
        ("generator", ["--t", "1.6rad"], "(0, pi/2]"),
        ("generator", ["--gamma", "1.5"], "[0, 1]"),
        ("generator", ["--guidance", "2"], "knows guidance 1, which is none"),
        ("guided", ["--guidance", "2.5"], "knows guidance 1 to 2"),
        ("teacher", ["--nfe", "4"], "3 or 5"),
        ("teacher", ["--gamma", "0.5"], "for generators"),
        ("teacher", ["--guidance", "2", "--guide", "nowhere.pkl"], "nowhere.pkl does not exist"),
        ("generator", ["--device", "warp"], "'warp' cannot be used"),
        ("latent", [], "latents"),
        ("missing", [], "does not exist"),
    ],
)
def test_the_users_errors(runs: dict[str, Path], tmp_path: Path, kind: str, words: list[str], message: str) -> None:
    out = tmp_path / "out"
    command = ["sample", str(runs.get(kind, tmp_path / kind)), "--device", "cpu", *words, "--out", str(out)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
