"""`edmdistill sweep`: eval's numbers, side by side, and pictures of them."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result
from msgspec.structs import replace
from PIL import Image

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.cli import main
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM

COMMON = "--protocol", "digits", "--n", "24", "--device", "cpu"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    torch.manual_seed(0)
    network = UNet(8, 1, 10, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), logvar_channels=4)
    torch.nn.init.ones_(network.out_gain)
    flow, root = FlowNetwork(network, EDM()), tmp_path_factory.mktemp("sweep")
    config = CheckpointConfig(stage="generator", provenance=Provenance(source="made up"), **describe(flow))
    for stage in ("generator", "teacher"):
        save_checkpoint(root / stage, flow, replace(config, stage=stage))
    return {stage: str(root / stage) for stage in ("generator", "teacher")}


def run(command: str, *words: str) -> Result:
    return CliRunner().invoke(main, [command, *words, *COMMON])


def test_its_numbers_are_evals(checkpoints: dict[str, str], tmp_path: Path) -> None:
    source, out = checkpoints["generator"], tmp_path / "sweep.json"
    swept = run("sweep", source, "--nfe", "3,1", "--gamma", "0,.5", "--out", str(out))
    assert swept.exit_code == 0, swept.output
    document = json.loads(out.read_text())
    apart = [run("eval", source, "--nfe", "3,1", "--gamma", gamma, "--json") for gamma in ("0", ".5")]
    assert document["results"] == [result for part in apart for result in json.loads(part.stdout)["results"]]

    head, *lines, claim = swept.stdout.splitlines()[1:]
    assert head.split() == ["NFE", "3", "1", "best", "NFE"]
    assert [line.partition("  ")[0] for line in lines] == [
        f"{metric}, gamma {gamma}" for metric in ("digits-FD@24", "class accuracy@24") for gamma in ("0", "0.5")
    ]
    fd = [result["metrics"]["fd_digits@24"] for result in document["results"]]
    shown = [[float(cell) for cell in line.split()[3:5]] for line in lines[:2]]
    assert [value for row in shown for value in row] == pytest.approx(fd, rel=1e-3)
    assert fd[1] == fd[3] != fd[0] != fd[2]  # in one evaluation gamma plays no part
    best = min(range(4), key=lambda i: fd[i])
    assert f"lowest with {(3, 1)[best % 2]} evaluation" in claim


def test_json_and_a_teacher(checkpoints: dict[str, str]) -> None:
    result = run("sweep", checkpoints["teacher"], "--nfe", "1,3", "--json")
    assert result.exit_code == 0, result.output
    assert [one["sampler"]["nfe"] for one in json.loads(result.stdout)["results"]] == [1, 3]
    assert "digits-FD@24, heun" in run("sweep", checkpoints["teacher"], "--nfe", "1,3").stdout


def test_several_guidance_weights_of_a_teacher(checkpoints: dict[str, str], tmp_path: Path) -> None:
    words = ("--nfe", "3,1", "--guidance", "1,1.5", "--force-guidance", "--metrics", "fd_digits")
    page = tmp_path / "guidance.html"
    result = run("sweep", checkpoints["teacher"], *words, "--plot", str(page), "--json")
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)["results"]
    assert [(one["sampler"]["guidance"], one["sampler"]["nfe"]) for one in results] == [
        (1.0, 3),
        (1.0, 1),
        (1.5, 3),
        (1.5, 1),
    ]
    alone = run("eval", checkpoints["teacher"], *words[:2], "--guidance", "1.5", *words[4:], "--json")
    assert json.loads(alone.stdout)["results"] == results[2:]
    text = page.read_text()
    assert "digits-FD@24, heun, guidance 1.5" in text
    assert text.count("<polyline") == 2


def test_several_schedules(checkpoints: dict[str, str]) -> None:
    words = ("--t", "80,2.5", "--t", "80,1", "--t", "80", "--metrics", "fd_digits")
    result = run("sweep", checkpoints["generator"], *words)
    assert result.exit_code == 0, result.output
    head, *lines, claim = result.stdout.splitlines()[1:]
    assert head.split() == ["NFE", "2", "1", "best", "NFE"]
    names = [f"digits-FD@24, gamma 1, sigma {levels}" for levels in ("80 2.5", "80 1", "80")]
    assert [line.partition("  ")[0] for line in lines] == names
    assert "lowest with" in claim


def test_settings_that_are_nearly_equal_are_all_measured(checkpoints: dict[str, str]) -> None:
    """And equal ones once."""
    words = ("--t", "75,2.5", "--t", "75.01,2.5", "--t", "75,2.5", "--metrics", "fd_digits", "--json")
    results = json.loads(run("sweep", checkpoints["generator"], *words).stdout)["results"]
    assert [round(one["sampler"]["sigmas"][0], 3) for one in results] == [75, 75.01]


@pytest.fixture(scope="module")
def plots(checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plots")
    for kind in ("svg", "html", "png", "pdf"):
        words = ("--nfe", "1,2", "--gamma", "0,1", "--plot", str(root / f"sweep.{kind}"))
        assert run("sweep", checkpoints["generator"], *words).exit_code == 0
    return {path.suffix[1:]: path for path in root.iterdir()}


def test_an_svg_stands_alone(plots: dict[str, Path]) -> None:
    root = ElementTree.fromstring(plots["svg"].read_text())
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    curves = list(root.iter(f"{space}g"))
    marks = [[path for path in curve.iter(f"{space}path") if path.get("class") == "mark"] for curve in curves]
    assert list(map(len, marks)) == [2, 2]
    assert "".join(root.itertext()).count("gamma") == 2
    assert "--first: #" in (root.findtext(f"{space}style") or "")


def test_other_formats(plots: dict[str, Path]) -> None:
    page = plots["html"].read_text()
    assert "$" not in page
    assert page.count("<tr>") == 1 + 4
    assert page.count("<polyline") == 2
    with Image.open(plots["png"]) as image:
        assert image.width > 500
    assert plots["pdf"].read_bytes().startswith(b"%PDF")


def test_without_matplotlib(checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("sweep", checkpoints["generator"], "--nfe", "1", "--plot", str(tmp_path / "a.png"))
    assert result.exit_code == 2
    assert "pip install 'edmdistill[plot]'" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nfe", "1,two"], "'1,two' is not a list of numbers such as 1,2,4"),
        (["--nfe", "1", "--gamma", "a"], "'a' is not a list of numbers"),
        (["--nfe", "1", "--gamma", "2"], "2.0 is not in the range 0<=x<=1"),
        (["--nfe", "1", "--plot", "a.jpg"], "must end in .svg or .html or .png or .pdf"),
        (["--gamma", "1"], "give --nfe or --t"),
        (["--nfe", "1", "--t", "80,2"], "2 noise levels cannot make 1 network evaluation, but 2: leave out one"),
        (["--nfe", "1", "--guidance", "1,strong"], "'1,strong' is not a list of numbers such as 1,1.2,1.4"),
        (["--nfe", "1", "--weights", "inception"], "'inception' is neither ema, raw nor NAME=FILE"),
    ],
)
def test_mistakes(checkpoints: dict[str, str], words: list[str], message: str) -> None:
    result = run("sweep", checkpoints["generator"], *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize("weights", [[], ["--guidance", "1"]])
@pytest.mark.parametrize("option", [["--guide", "TEACHER"], ["--force-guidance"]])
def test_what_guides_nothing_is_refused(checkpoints: dict[str, str], option: list[str], weights: list[str]) -> None:
    words = [checkpoints["teacher"] if word == "TEACHER" else word for word in option]
    result = run("sweep", checkpoints["teacher"], "--nfe", "3", *words, *weights)
    assert (result.exit_code, "guidance" in result.stderr, "leave" in result.stderr) == (2, True, True)


@pytest.mark.parametrize("solvers", ["--solver ddim,unipc", "--solver ddim --solver unipc,ddim"])
def test_solvers(checkpoints: dict[str, str], solvers: str) -> None:
    words = ("--nfe", "2,4", *solvers.split(), "--metrics", "fd_digits", "--json")
    swept = json.loads(run("sweep", checkpoints["teacher"], *words).stdout)["results"]
    samplers = [(one["sampler"]["solver"], one["sampler"]["nfe"]) for one in swept]
    assert samplers == [("ddim", 2), ("ddim", 4), ("unipc", 2), ("unipc", 4)]
