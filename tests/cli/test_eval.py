"""`edmdistill eval`: sources, tables and documents."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from msgspec.structs import replace

from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe, read_config
from edmdistill.checkpoints.load import load_denoiser
from edmdistill.checkpoints.store import load_checkpoint, load_tensors, save_checkpoint, save_tensors
from edmdistill.cli import main
from edmdistill.cli.eval import command
from edmdistill.data.datasets import open_dataset
from edmdistill.embedded import EMBEDDED
from edmdistill.evaluation.likelihood import SOLVER_TOLERANCE, evaluate_likelihood
from edmdistill.evaluation.results import results_in_config
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments), "--device", "cpu"])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A generator of digits that nobody trained."""
    torch.manual_seed(0)
    network = UNet(8, 1, 10, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), logvar_channels=4)
    flow = FlowNetwork(network, EDM(sigma_data=0.5))
    config = CheckpointConfig(stage="generator", provenance=Provenance(source="made up"), **describe(flow))
    save_checkpoint(tmp_path / "run" / "generator", flow, config)
    return tmp_path / "run" / "generator"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The held-out digits in an .npz."""
    data = open_dataset("digits", split="test")
    pixels = data.images(range(len(data))).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "real.npz", images=pixels, labels=data.labels(range(len(data))))
    return tmp_path / "real.npz"


def test_a_table_by_nfe(checkpoint: Path) -> None:
    result = run(checkpoint, "--protocol", "digits", "--ref", "digits", "--nfe", "1,2", "--n", 20)
    assert result.exit_code == 0, result.output
    title, head, *rows = result.stdout.splitlines()
    assert title == "protocol digits: 20 images against digits (train, 1500)"
    assert head.split() == ["NFE", "fd_digits@20", "class_accuracy@20"]
    assert [row.split()[0] for row in rows] == ["1", "2"]


def test_save_keeps_results_with_the_weights(checkpoint: Path, images: Path) -> None:
    arguments = ("--protocol", "digits", "--save", "--n")
    for count, nfe in ((20, "1,2"), (20, "2"), (21, "1")):
        assert run(checkpoint, *arguments, count, "--nfe", nfe).exit_code == 0
    config = read_config(checkpoint)
    kept = [(result.sampler.nfe, *result.metrics) for result in results_in_config(config)]
    assert kept == [(nfe, f"fd_digits@{n}", f"class_accuracy@{n}") for nfe, n in ((1, 20), (2, 20), (1, 21))]
    assert load_checkpoint(checkpoint)[1] == config
    refused = run(images, "--protocol", "digits", "--save")
    assert refused.exit_code == 2
    assert "is for a checkpoint folder or a run, but" in refused.stderr


def test_json_is_one_document_on_stdout_and_in_the_file(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint.parent / "recipe.toml").touch()
    out = tmp_path / "new" / "eval.json"
    arguments = ("--protocol", "digits", "--t", "80,2.5", "--seeds", "5-9,30", "--json", "--out", out)
    result = run(checkpoint.parent, *arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads(out.read_text())
    (only,) = document["results"]
    assert only["sampler"]["sigmas"] == pytest.approx([80, 2.5])
    assert only["protocol"]["seeds"] == "5-9,30"
    assert only["provenance"]["source"] == str(checkpoint.parent)


def test_no_seeds_are_not_all_of_the_protocols(checkpoint: Path) -> None:
    result = run(checkpoint, "--protocol", "digits", "--seeds", "")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--seeds '' is an empty list: give it an entry" in result.stderr


def test_repetitions(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    words = ("--protocol", "digits", "--nfe", "1", "--n", 20, "--repeat", 3, "--metrics", "fd_digits")
    result = run(checkpoint, *words, "--out", out)
    assert result.exit_code == 0, result.output
    *_, mean, low, spread, last = result.stdout.splitlines()
    (only,) = json.loads(out.read_text())["results"]
    values = [one["fd_digits@20"] for one in only["repetitions"]]
    assert only["metrics"]["fd_digits@20"] == pytest.approx(sum(values) / 3)
    assert [line.split()[-1] for line in (mean, low)] == [f"{value:.4g}" for value in (sum(values) / 3, min(values))]
    assert spread.split()[1] == "std"
    assert last.startswith("Means of 3 repetitions of 20 images, seeds 0-59. EDM's papers give the minimum of three.")


def test_the_first_images(images: Path) -> None:
    result = run(images, "--protocol", "digits", "--n", 100, "--json")
    assert result.exit_code == 0, result.output
    (only,) = json.loads(result.stdout)["results"]
    assert list(only["metrics"]) == ["fd_digits@100", "class_accuracy@100"]
    assert "has 297 images, fewer than --n 298" in run(images, "--protocol", "digits", "--n", 298).stderr


def test_the_networks_dtype_is_recorded(checkpoint: Path) -> None:
    words = ("--protocol", "digits", "--nfe", "1", "--n", 20, "--json")
    both = (run(checkpoint, *words, *more) for more in (("--dtype", "float64"), ()))
    results = [json.loads(one.stdout)["results"][0] for one in both]
    assert [one["sampler"]["dtype"] for one in results] == ["float64", "float32"]
    assert {one["provenance"]["source_sha256"] for one in results} == {sha256_file(checkpoint / "model.safetensors")}


def test_other_weights_of_a_feature_space_are_named(images: Path, tmp_path: Path) -> None:
    tensors, metadata = load_tensors(EMBEDDED["digits"].features)
    save_tensors(tmp_path / "other.safetensors", tensors | {"head.bias": tensors["head.bias"] + 1}, metadata)
    result = run(images, "--protocol", "digits", "--weights", f"digits={tmp_path / 'other.safetensors'}", "--json")
    assert result.exit_code == 0, result.output
    (only,) = json.loads(result.stdout)["results"]
    sha256 = sha256_file(tmp_path / "other.safetensors")
    assert only["protocol"]["weights"] == {"digits": sha256}
    assert list(only["metrics"]) == [f"{name}[{sha256[:8]}]@297" for name in ("fd_digits", "class_accuracy")]


def test_images(images: Path) -> None:
    result = run(images, "--protocol", "digits", "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)["results"][0]["metrics"]
    assert metrics["fd_digits@297"] < 12
    assert metrics["class_accuracy@297"] > 0.98


@pytest.fixture
def teacher(checkpoint: Path, tmp_path: Path) -> Path:
    """The same network as a teacher."""
    flow, config = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "teacher", flow, replace(config, stage="teacher"))
    return tmp_path / "teacher"


def test_a_likelihood_is_as_exact_as_the_library_has_it() -> None:
    assert [option.default for option in command.params if option.name == "tolerance"] == [SOLVER_TOLERANCE]


def test_a_likelihood_is_bound_to_data_probes_and_tolerance(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "nll.json"
    words = [teacher, "--metrics", " nll", "--ref", "digits", "--n", 3, "--probes", 2, "--tolerance", 0.01]
    result = run(*words, "--out", out)
    assert result.exit_code == 0, result.output
    title, head, row = result.stdout.splitlines()
    assert title == "protocol nll: bits per dimension of digits (test, 3)"
    assert head.split() == ["NFE", "nll@3", "nll_image_error@3", "nll_probe_std@3"]
    (only,) = json.loads(out.read_text())["results"]
    expected = evaluate_likelihood(
        load_denoiser(teacher), open_dataset("digits", split="test"), count=3, probes=2, tolerance=0.01
    )
    assert only["metrics"] == pytest.approx(expected.metrics, rel=1e-6)
    assert float(row.split()[1]) == pytest.approx(expected.metrics["nll@3"], rel=1e-3)
    assert only["protocol_sha256"] == expected.protocol_sha256
    assert only["provenance"]["source"] == str(teacher)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--protocol", "digits", "--ref", "digits"], "--protocol does not go with --metrics nll"),
        (["--nfe", "2", "--ref", "digits"], "--nfe does not go with --metrics nll"),
        ([], "name them with --ref"),
        (["--ref", "digits", "--split", "held-out"], "'held-out'"),
    ],
)
def test_a_likelihood_draws_nothing(teacher: Path, words: list[str], message: str) -> None:
    result = run(teacher, "--metrics", "nll", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_images_have_no_likelihood(images: Path) -> None:
    result = run(images, "--metrics", "nll", "--ref", "digits")
    assert "is images: name a network" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "fid"], "'fid' is not known"),
        (["--protocol", "digits", "--nfe", "2"], "--nfe says how a network is sampled, but"),
        (["--protocol", "digits", "--t", "80"], "holds images, which exist: leave it out"),
        (["--protocol", "digits", "--nfe", "two"], "'two' is not a list of numbers such as 1,2,4"),
        (["--protocol", "digits", "--n", "9", "--seeds", "1"], "--seeds says how a network is sampled"),
        (["--protocol", "digits", "--weights", "dinov2=w.pt"], "weights of dinov2 were given, but the metrics are"),
        (["--protocol", "digits", "--weights", "raw"], "--weights ema or raw is of a run"),
        (["--protocol", "digits", "--metrics", "fdi"], "there is no metric 'fdi'"),
        (["--protocol", "digits", "--repeat", "2"], "--repeat says how a network is sampled"),
        (
            ["--protocol", "edm"],
            "measures against the training set, or EDM's statistics of it (.npz): name it with --ref",
        ),
        (["--protocol", "digits", "--ref", "absent.zip"], "absent.zip does not exist"),
        ([], "Missing option '--protocol'. Choose one of digits, tiles, pixels, edm"),
        (["--protocol", "digits", "--probes", "2"], "--probes does not go with a measurement of images"),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(images: Path, arguments: list[str], message: str) -> None:
    result = run(images, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
