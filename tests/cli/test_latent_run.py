"""From pictures to a report by commands alone: a tiny latent run, with a VAE and a DINOv2 of random weights."""

import json
import zipfile
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from feature_files import TINY_DINOV2
from golden_set import GOLDEN
from picture_files import cifar10, tar_bytes
from PIL import Image

from edmdistill.checkpoints.config import read_config
from edmdistill.cli import main

FILES = {
    "source": GOLDEN / "prepare" / "source",
    "vae": GOLDEN / "evaluation" / "latents" / "tiny-vae",
    "dinov2.pth": TINY_DINOV2,
}
TRAINING = """
[training]
images = {images}
batch = 8
lr = 1e-3
log_every = 16
snapshot_every = {images}
[ema]
half_life_images = 16
[sampling]
nfe = [{nfe}]
[method]
name = "{method}"
"""
NETWORK = """
[network]
kind = "edm2"
[network.arguments]
model_channels = 8
channel_mult = [1]
num_blocks = 1
attn_resolutions = []
channels_per_head = 8
"""


def command(line: str) -> Result:
    """Runs a command, which must succeed."""
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 0, f"{line}: {result.output}"
    return result


def table(path: Path) -> list[dict[str, float]]:
    return [result["metrics"] for result in json.loads(path.read_text())["results"]]


def pictures(folder: Path) -> list[tuple[int, int]]:
    """The sizes of the RGB pictures of a folder, apart from the grid."""
    sizes = []
    for path in sorted(folder.glob("0*.png")):
        with Image.open(path) as image:
            assert image.mode == "RGB"
            sizes.append(image.size)
    return sizes


@pytest.mark.slow  # twelve commands, of which three train
def test_from_pictures_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, path in FILES.items():
        Path(name).symlink_to(path)
    Path("teacher.toml").write_text(TRAINING.format(method="diffusion", images=64, nfe=5) + NETWORK)
    Path("cosim.toml").write_text(TRAINING.format(method="cosim", images=32, nfe=2))

    command("data prepare source in64.zip --resolution 64 --transform center-crop")
    command("data encode in64.zip latents.zip --xflip --device cpu --vae vae")
    assert "22" in command("data inspect latents.zip").stdout
    command("train diffusion --data latents.zip --recipe teacher.toml --run-dir teacher --device cpu --vae vae")
    command("convert teacher adapted --time-embedding positional --licence mit")
    said = command("train cosim adapted --data latents.zip --recipe cosim.toml --run-dir run --device cpu --vae vae")
    assert "edmdistill sample run --nfe 2 --seeds 0-63 --vae vae --out run/images" in said.stderr

    # The encoder of the data is in every checkpoint, and what was learnt about classes and licence too.
    configs = [read_config(Path(folder)) for folder in ("teacher/generator", "adapted", "run/generator")]
    with zipfile.ZipFile("latents.zip") as archive:
        recorded = json.loads(archive.read("dataset.json"))["encoder"]
    for config in configs:
        assert msgspec.to_builtins(config.encoder)["vae_sha256"] == recorded["vae_sha256"]
        assert config.label_names == ("tench, Tinca tinca", "crane", "daisy")
    assert [config.provenance.licence for config in configs] == [None, "mit", "mit"]

    # Pictures: those of the command's own words, of the VAE's resolution, and as many as seeds.
    command("sample run --nfe 2 --seeds 0-7 --device cpu --out run/images --vae vae")
    assert pictures(Path("run/images")) == 8 * [(64, 64)]

    weights = "--features dinov2 --weights dinov2=dinov2.pth"
    command(f"data stats in64.zip in64.npz {weights} --device cpu")
    measure = "--protocol edm2 --metrics fd_dinov2 --weights dinov2=dinov2.pth --n 8 --device cpu --vae vae"
    command(f"eval run {measure} --ref in64.npz --nfe 1,2 --out run/eval/generator.json")
    command(f"eval adapted {measure} --ref in64.zip --nfe 3 --out run/eval/teacher.json")
    (metric,) = table(Path("run/eval/teacher.json"))[0]
    assert metric.startswith("fd_dinov2[")
    assert metric.endswith("]@8")  # neither the official weights nor the official number of images
    values = [row[metric] for name in ("generator", "teacher") for row in table(Path(f"run/eval/{name}.json"))]

    # The folder of pictures is the network's images: measured from there, the number is the same.
    command(f"eval run/images {measure.partition(' --vae')[0]} --ref in64.zip --out folder.json")
    assert table(Path("folder.json"))[0][metric] == pytest.approx(values[1], rel=1e-4)

    compared = command("compare run/eval/generator.json run/eval/teacher.json --json").stdout
    reported = command("report run").stdout
    for value in values:
        assert f"{value:.4g}" in reported
        assert str(value) in compared

    page = Path("run/report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3  # grids of training, and the pictures sampled since
    assert "edmdistill eval run --nfe 2 --protocol edm2 --ref IMAGES --vae DIR" in page
    grids = pictures(Path("run/samples"))
    assert len(grids) >= 2
    assert min(map(min, grids)) >= 64  # decoded: latents are 8 pixels wide


@pytest.mark.slow  # nine commands, of which one trains
def test_from_an_archive_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/cifar10.md: an official network without classes, and CIFAR-10's archive."""
    monkeypatch.chdir(tmp_path)
    Path("dinov2.pth").symlink_to(TINY_DINOV2)
    Path("official.pkl.gz").symlink_to(GOLDEN / "vp-ddpmpp-uncond.pkl.gz")
    Path("cifar-10-python.tar.gz").write_bytes(tar_bytes(cifar10(8, 2)[0], "w:gz"))
    Path("cosim.toml").write_text(TRAINING.format(method="cosim", images=16, nfe=2))

    command("data prepare cifar-10-python.tar.gz cifar10.zip --resolution 16")
    command("convert official.pkl.gz teacher")
    assert "takes these data" in command("data inspect cifar10.zip --teacher teacher").stdout
    for words in (
        "train cosim teacher --data cifar10.zip --recipe cosim.toml --run-dir run",
        "sample run --nfe 2 --seeds 0-7 --out pictures",
        "data stats cifar10.zip cifar10.npz --features dinov2 --weights dinov2=dinov2.pth",
    ):
        command(f"{words} --device cpu")
    measure = "--protocol cosim --metrics fd_dinov2 --weights dinov2=dinov2.pth --n 8 --device cpu --ref cifar10.npz"
    command(f"eval run {measure} --nfe 2,4 --out cosim.json --save")
    command(f"eval teacher {measure} --nfe 3 --out edm.json")
    compared = json.loads(command("compare cosim.json edm.json --json").stdout)
    assert compared
    reported = command("report run --results cosim.json --results edm.json").stdout
    for row in (*table(Path("cosim.json")), *table(Path("edm.json"))):
        (value,) = row.values()
        assert f"{value:.4g}" in reported
