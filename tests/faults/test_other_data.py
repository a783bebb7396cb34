"""A run goes on with its own data, whatever they are called by now, and with no others."""

import io
import json
import re
import shlex
import shutil
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edmdistill.cli import main
from edmdistill.data import datasets
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.data.fit import require_fit
from edmdistill.errors import DatasetError, TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.recipes.schema import Recipe
from edmdistill.training.prepare import prepare
from edmdistill.training.session import train

NETWORK = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8}
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
CLASSES = [0, 1, 2, 0, 1, 2, 0, 1]


def files(pixels: np.ndarray = PIXELS, classes: list[int] | None = CLASSES, name: str = "{}.png") -> dict[str, bytes]:
    held = {}
    for i, image in enumerate(pixels):
        out = io.BytesIO()
        Image.fromarray(image).save(out, "png")
        held[name.format(i)] = out.getvalue()
    if classes is not None:
        labels = [[name.format(i), label] for i, label in enumerate(classes)]
        held["dataset.json"] = json.dumps({"labels": labels}).encode()
    return held


def write_zip(path: Path, content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def write_folder(path: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def start(data: Path):
    tables = {
        "method": {"name": "diffusion"},
        "training": {"images": 8, "batch": 8, "lr": 1e-2, "log_every": 8, "snapshot_every": 80},
        "ema": {"half_life_images": 50},
        "sampling": {"nfe": [1]},
        "network": {"kind": "edm2", "arguments": NETWORK},
    }
    return prepare(Recipe.from_json(json.dumps(tables).encode()), data=data, machine=Machine("cpu"))


def test_train_says_what_it_leaves_out(tmp_path: Path) -> None:
    data = write_zip(tmp_path / "set.zip", files(classes=[0, 1, 3] * 2 + [0, 1]) | {".ipynb_checkpoints/0.png": b"x"})
    (tmp_path / "tiny.toml").write_text(
        "[training]\nimages = 8\nbatch = 8\nlr = 0.01\nlog_every = 8\nsnapshot_every = 80\n"
        "[ema]\nhalf_life_images = 50\n"
        '[sampling]\nnfe = [1]\n[network]\nkind = "edm2"\n[network.arguments]\nmodel_channels = 8\nchannel_mult = [1]\n'
        "num_blocks = 1\nattn_resolutions = []\nchannels_per_head = 8\n"
    )
    words = ["train", "diffusion", "--data", str(data), "--recipe", str(tmp_path / "tiny.toml"), "--device", "cpu"]
    result = CliRunner().invoke(main, [*words, "--run-dir", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert f"{data}: left out 1 file: hidden (.ipynb_checkpoints/0.png)." in result.stderr
    assert f"{data}: 1 of the 4 classes has no image, the first 2." in result.stderr


OTHER = np.where(np.arange(8)[:, None, None] == 7, 255 - PIXELS, PIXELS)
CHANGES = {
    "an image": (files(OTHER), "data.content_sha256: .* there, .* now"),
    "a label": (files(classes=[*CLASSES[:-1], 2]), "data.labels_sha256: .* there, .* now"),
    "the count": (files(PIXELS[:7], CLASSES[:7]), "data.images: 8 there, 7 now"),
    "the order": (files(name="{}.png") | {"0.png": files()["1.png"], "1.png": files()["0.png"]}, "data.content_sha256"),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained on set.zip."""
    folder = tmp_path_factory.mktemp("other")
    train(start(write_zip(folder / "set.zip", files())), folder / "run")
    return folder / "run"


@pytest.mark.parametrize("what", CHANGES)
def test_other_data_of_the_same_name_are_refused(what: str, run_dir: Path, tmp_path: Path) -> None:
    content, message = CHANGES[what]
    with pytest.raises(TrainingError, match=message):
        train(start(write_zip(tmp_path / "set.zip", content)), run_dir)


def test_the_same_data_by_another_name_are_the_runs(run_dir: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run_dir, tmp_path / "run")
    for data in (
        write_zip(tmp_path / "other.zip", files(name="top/{}.png"), zipfile.ZIP_DEFLATED),
        write_folder(tmp_path / "folder", files()),
    ):
        assert train(start(data), again).finished
    assert json.loads((again / "run.json").read_text())["data"]["name"] == "set.zip"


def test_a_fingerprint_is_of_content_alone(tmp_path: Path) -> None:
    own = open_dataset(write_zip(tmp_path / "a.zip", files()))
    same = [
        write_zip(tmp_path / "b.zip", files(), zipfile.ZIP_DEFLATED),
        write_zip(tmp_path / "c.zip", files(name="x/y/{}.png") | {"notes.txt": b"mine"}),
        write_folder(tmp_path / "folder", files()),
    ]
    assert {open_dataset(path).fingerprint for path in same} == {own.fingerprint}
    assert open_dataset(tmp_path / "b.zip", xflip=True).fingerprint == own.fingerprint
    for i, (content, _) in enumerate(CHANGES.values()):
        for data in (write_zip(tmp_path / f"z{i}.zip", content), write_folder(tmp_path / f"f{i}", content)):
            assert open_dataset(data).fingerprint != own.fingerprint
    assert len({open_dataset("digits", split=split).fingerprint for split in ("train", "test", "all")}) == 3


@pytest.mark.parametrize("limit", ["HASHED_BYTES", "HASHED_FILES"])
def test_of_a_large_folder_a_part_is_read(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that are read are spread over all; the others count by name and size."""
    size = sum(len(data) for name, data in files().items() if name != "dataset.json")
    monkeypatch.setattr(datasets, limit, {"HASHED_BYTES": size // 2 + 1, "HASHED_FILES": 4}[limit])
    folder = write_folder(tmp_path / "a", files())
    read: list[str] = []

    def digest(path: Path) -> str:
        data = open_dataset(path)
        files_of = data._content.args[0]
        real = files_of.read
        read.clear()
        files_of.read = lambda name: read.append(name) or real(name)
        return data.content_sha256

    own = digest(folder)
    assert read == ["0.png", "2.png", "4.png", "6.png"]
    assert own == digest(write_folder(tmp_path / "copy", files()))
    seen = files()["2.png"]
    (folder / "2.png").write_bytes(seen[:-1] + bytes([seen[-1] ^ 1]))
    assert digest(folder) != own
    (folder / "2.png").write_bytes(seen)
    with (folder / "5.png").open("ab") as file:
        file.write(b"more")
    assert digest(folder) != own
    (folder / "5.png").write_bytes(files()["5.png"])
    assert digest(folder) == own
    (folder / "3.png").rename(folder / "3x.png")
    labels = (folder / "dataset.json").read_text().replace("3.png", "3x.png")
    (folder / "dataset.json").write_text(labels)
    assert digest(folder) != own


def flow(classes: int) -> FlowNetwork:
    return FlowNetwork(UNet(8, 1, classes, **NETWORK), EDM())


class Config:
    encoder = {"kind": "pixels"}
    label_names = None


def fitted(tmp_path: Path, classes: list[int] | None, network: int) -> Dataset:
    data = open_dataset(write_zip(tmp_path / "set.zip", files(classes=classes)))
    require_fit(data, flow(network), Config)  # type: ignore[arg-type]
    return data


def test_classes_are_counted_as_the_network_does(tmp_path: Path) -> None:
    data = fitted(tmp_path, CLASSES, 10)
    assert data.tensors([0])[1].shape == (1, 10)
    assert "7 of the 10 classes have no image, the first 3" in data.notes[0]
    assert fitted(tmp_path, None, 0).label_dim == 0
    assert fitted(tmp_path, CLASSES, 0).notes == []
    with pytest.raises(DatasetError, match="has no classes, but the network has 10"):
        fitted(tmp_path, None, 10)
    with pytest.raises(
        DatasetError, match="has 3 classes, but the network has 2, 0 to 1: give data with these classes"
    ):
        fitted(tmp_path, CLASSES, 2)


@pytest.mark.parametrize("kind", [".zip", ""])
def test_folders_that_could_be_classes(tmp_path: Path, kind: str) -> None:
    """A folder for each class is a data set without classes: said, with a command that makes one with them."""
    write = write_zip if kind else write_folder
    source = write(
        tmp_path / f"my set{kind}", files(PIXELS[:4], None, "a/{}.png") | files(PIXELS[4:], None, "b/{}.png")
    )
    data = open_dataset(source)
    with pytest.raises(DatasetError, match="has no classes, but the network has 2, 0 to 1: `edmdistill") as refused:
        require_fit(data, flow(2), Config)  # type: ignore[arg-type]
    require_fit(data, flow(0), Config)  # type: ignore[arg-type]
    assert data.notes == []  # a network without classes wants none
    noted = start(source).dataset.notes
    for sentence in (str(refused.value), *noted):
        advice = re.search(r"`edmdistill (data prepare .* --labels folders)` makes its 2 top folders classes", sentence)
        assert advice is not None
    assert noted[0].startswith(f"{source} has no classes, so the network will have none; ")
    arguments = [str(tmp_path / "set.zip") if part == "OUT.zip" else part for part in shlex.split(advice[1])]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    made = open_dataset(tmp_path / "set.zip")
    assert (made.class_counts, made.label_names) == ([4, 4], ["a", "b"])


@pytest.mark.parametrize("folders", [["00000", "00001"], ["a", "a"]])
def test_folders_that_are_hardly_classes(tmp_path: Path, folders: list[str]) -> None:
    first, second = folders
    content = files(PIXELS[:4], None, f"{first}/{{}}.png") | files(PIXELS[4:], None, f"{second}/x{{}}.png")
    data = open_dataset(write_folder(tmp_path / "set", content))
    with pytest.raises(DatasetError, match="network has 2, 0 to 1: give data with these classes"):
        require_fit(data, flow(2), Config)  # type: ignore[arg-type]
    assert start(tmp_path / "set").dataset.notes == []


def test_labels_that_begin_at_1(tmp_path: Path) -> None:
    """Out of range for a network of K classes, and refused for one that would be made for them."""
    ones = [label + 1 for label in CLASSES]
    with pytest.raises(DatasetError, match="its labels begin at 1: subtract 1 from each"):
        fitted(tmp_path, ones, 3)
    with pytest.raises(DatasetError, match=r"has labels from 1 to 3, but classes are counted from 0: subtract 1"):
        start(tmp_path / "set.zip")
    assert "the labels begin at 1" in fitted(tmp_path, ones, 10).notes[0]


def write_latents(path: Path, scale: float = 1, shift: float = 0, **encoder: object) -> Dataset:
    rng = np.random.default_rng(0)
    content = {}
    for i in range(8):
        out = io.BytesIO()
        moments = np.concatenate([4 * rng.standard_normal((2, 8, 8)) + shift, np.full((2, 8, 8), 0.1)])
        np.save(out, (scale * moments).astype(np.float32))
        content[f"{i}.npy"] = out.getvalue()
    if encoder:
        statistics = {"raw_mean": [0.0] * 2, "raw_std": [4.0] * 2}
        content["dataset.json"] = json.dumps({"labels": None, "encoder": statistics | encoder}).encode()
    return open_dataset(write_zip(path, content))


class LatentConfig:
    encoder = {"kind": "StabilityVAEEncoder", "scale": [0.5 / 4] * 2, "bias": [0.0] * 2}
    label_names = None


@pytest.mark.parametrize(
    ("scale", "shift", "bias", "noted"),
    [
        (1, 0, 0, False),  # a VAE's latents, of deviation 4, fit the teacher's scale
        (1 / 8, 0, 0, True),  # those that were multiplied by it before do not
        (8, 0, 0, True),
        (1 / 2, 0, 0, False),
        (1, 20, 0, True),  # the deviation fits, and the mean does not: a common deviation would hide it
        (1, -20, 0, True),
        (1, 20, -2.5, False),  # here the teacher's bias takes it away
    ],
)
def test_latents_of_another_scale_are_noted(
    scale: float, shift: float, bias: float, noted: bool, tmp_path: Path
) -> None:
    data = write_latents(tmp_path / "set.zip", scale, shift)
    network = FlowNetwork(UNet(8, 2, 0, **NETWORK), EDM(sigma_data=0.5))
    config = SimpleNamespace(encoder=LatentConfig.encoder | {"bias": [bias] * 2}, label_names=None)
    for _ in range(2):
        require_fit(data, network, config)  # type: ignore[arg-type]
    assert ["they were scaled already, or are of another VAE" in note for note in data.notes] == [True] * noted


@pytest.mark.parametrize(
    ("size", "channels", "encoder", "message"),
    [
        (
            8,
            2,
            {"kind": "pixels"},
            "latents of 8x8 with 2 channels and no classes, but the network takes images of 8x8",
        ),
        (
            16,
            2,
            LatentConfig.encoder,
            "but the network takes latents of 16x16 with 2 channels and no classes: give those",
        ),
        (8, 1, LatentConfig.encoder, "but the network takes latents of 8x8 with 1 channel and no classes"),
    ],
)
def test_data_of_another_shape_are_refused(
    size: int, channels: int, encoder: dict[str, object], message: str, tmp_path: Path
) -> None:
    network = FlowNetwork(UNet(size, channels, 0, **NETWORK), EDM())
    with pytest.raises(DatasetError, match=message):
        require_fit(write_latents(tmp_path / "set.zip"), network, SimpleNamespace(encoder=encoder, label_names=None))  # type: ignore[arg-type]


def test_other_names_of_classes_than_the_networks_are_noted(tmp_path: Path) -> None:
    content = files()
    described = json.loads(content["dataset.json"]) | {"label_names": ["a", "b", "c"]}
    data = open_dataset(write_zip(tmp_path / "set.zip", content | {"dataset.json": json.dumps(described).encode()}))
    config = SimpleNamespace(encoder={"kind": "pixels"}, label_names=["a", "x", "c"])
    require_fit(data, flow(3), config)  # type: ignore[arg-type]
    assert data.notes == [f"{data.name}: class 1 is 'b' there, and 'x' to the network."]


@pytest.mark.parametrize(
    ("record", "teacher", "message"),
    [
        ({"range": "edm2"}, {}, None),
        ({"range": "scm"}, {"range": "scm"}, None),
        (
            {"range": "scm"},
            {},
            r"latents of pixels in \[-1, 1\] \(scm\), .* again by .*--range edm2",
        ),
        ({"range": "edm2"}, {"range": "scm"}, r"latents of pixels in \[0, 1\] .* again by .*--range scm"),
        ({"range": "edm2", "vae_sha256": "a" * 64}, {"vae_sha256": "a" * 64, "vae_name": "b"}, None),
        ({"range": "edm2", "vae_sha256": "a" * 64}, {"vae_sha256": "b" * 64, "vae_name": "b"}, "of the VAE a .* of b"),
        ({"range": "edm2", "vae_sha256": "a" * 64}, {"vae_name": "b"}, None),  # official teachers have no digest
    ],
)
def test_latents_of_another_kind_are_refused(
    tmp_path: Path, record: dict[str, object], teacher: dict[str, object], message: str | None
) -> None:
    data = write_latents(tmp_path / "set.zip", vae_name="a", **record)
    network = FlowNetwork(UNet(8, 2, 0, **NETWORK), EDM(sigma_data=0.5))
    config = SimpleNamespace(encoder=LatentConfig.encoder | teacher, label_names=None)
    with nullcontext() if message is None else pytest.raises(DatasetError, match=message):
        require_fit(data, network, config)  # type: ignore[arg-type]
