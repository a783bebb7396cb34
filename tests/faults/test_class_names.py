"""Classes go by their names on every official checkpoint of ImageNet and CIFAR-10, and on what is made from them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from make_teacher import to_pickle
from msgspec.structs import replace

from edmdistill.checkpoints.class_names import KNOWN_FILES, class_names, dataset_class_names
from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe, read_config
from edmdistill.checkpoints.convert import convert
from edmdistill.checkpoints.load import load_model
from edmdistill.checkpoints.store import load_checkpoint, save_checkpoint
from edmdistill.cli import main
from edmdistill.embedded import EMBEDDED
from edmdistill.networks import NETWORKS
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.sampling.labels import find_class

OFFICIAL = [
    *("edm-imagenet-64x64-cond-adm.pkl", "edm2-img512-s-2147483-0.025.pkl", "edm2-img64-xl-0671088-0.040.pkl"),
    *(
        "edm2-img512-xs-guid-fid.pkl",
        "edm_imagenet64_ema.pt",
        "datasets/img512-sd.zip",
        "/data/img64.zip",
        "imagenet1k.zip",
    ),
]


@pytest.mark.parametrize("name", OFFICIAL)
def test_imagenet_is_recognized(name: str) -> None:
    names = class_names(1000, name)
    assert names is not None
    assert (len(names), names[0], names[31], names[999]) == (
        *(1000, "tench, Tinca tinca", "tree frog, tree-frog"),
        "toilet tissue, toilet paper, bathroom tissue",
    )


@pytest.mark.parametrize("name", ["edm-cifar10-32x32-cond-vp.pkl", "datasets/cifar10-32x32.zip", "CIFAR-10"])
def test_cifar10_is_recognized(name: str) -> None:
    assert class_names(10, name) == dataset_class_names("cifar10")
    assert class_names(1000, name) is None


@pytest.mark.parametrize(
    ("label_dim", "name"),
    [
        (10, "img64.zip"),
        (10, "birds.zip"),
        (10, "cifar100.zip"),
        (1000, "webvision.zip"),
        (0, "imagenet"),
        (1000, None),
    ],
)
def test_other_data_get_no_names(label_dim: int, name: object) -> None:
    assert class_names(label_dim, name) is None


def test_each_name_finds_its_class() -> None:
    for data_set, label_dim in (("imagenet", 1000), ("cifar10", 10)):
        names = dataset_class_names(data_set)
        for i in range(0, label_dim, 1 if label_dim == 10 else 37):
            assert find_class(names[i], label_dim, names) == i
    names = dataset_class_names("imagenet")
    assert find_class("Tabby", 1000, names) == 281
    assert find_class("maillot", 1000, names) == 638  # the whole name of one, a synonym of another


@pytest.fixture(scope="module")
def pickle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official EDM2 pickle of 1,000 classes under a name that says nothing; the data set in it is img512."""
    torch.manual_seed(0)
    small = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8}
    network = NETWORKS["edm2"](img_resolution=4, img_channels=3, label_dim=1000, logvar_channels=8, **small)
    assert isinstance(network, UNet)
    flow = FlowNetwork(network, EDM())
    config = CheckpointConfig(stage="teacher", provenance=Provenance(source="it"), **describe(flow))
    path = tmp_path_factory.mktemp("pickle") / "teacher.pkl"
    path.write_bytes(to_pickle(network, config).replace(b"digits", b"img512"))
    return path


def test_readmes_command(pickle: Path, tmp_path: Path) -> None:
    words = ["--class", "tree frog", "--class", "1,5-6", "--seeds", "0-4", "--out", str(tmp_path / "frogs.npz")]
    result = CliRunner().invoke(main, ["sample", str(pickle), "--nfe", "1", "--solver", "ddim", *words])
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "frogs.npz") as file:
        assert file["labels"].tolist() == [31, 1, 5, 6, 31]


def test_names_travel(pickle: Path, tmp_path: Path) -> None:
    done = convert(pickle, tmp_path / "teacher")
    assert done.config.label_names == dataset_class_names("imagenet")
    flow, config = load_checkpoint(tmp_path / "teacher")
    save_checkpoint(tmp_path / "generator", flow, replace(config, stage="generator", method="cosim"))
    assert read_config(tmp_path / "generator").label_names == dataset_class_names("imagenet")
    assert (
        load_model(pickle).label_names
        == load_model(tmp_path / "teacher").label_names
        == dataset_class_names("imagenet")
    )


def test_a_checkpoint_of_version_1_0_has_them_too(pickle: Path, tmp_path: Path) -> None:
    flow, config = load_checkpoint(convert(pickle, tmp_path / "teacher").path)
    old = replace(config, label_names=None, provenance=Provenance(source="edm2-img512-s-2147483-0.025.pkl"))
    save_checkpoint(tmp_path / "old", flow, old)
    assert read_config(tmp_path / "old").label_names == dataset_class_names("imagenet")


def test_the_shipped_teacher_is_known_by_its_digest(tmp_path: Path) -> None:
    copy = tmp_path / "other-name.pkl"
    copy.write_bytes(EMBEDDED["digits"].teacher.read_bytes())
    config = convert(copy, tmp_path / "out").config
    assert config.provenance.sha256 in KNOWN_FILES
    assert config.provenance.licence == "apache-2.0"
    assert config.label_names == tuple("0123456789")


def test_inspect_shows_them(pickle: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(pickle), "--classes"])
    assert result.exit_code == 0
    assert "  31 tree frog, tree-frog" in result.stdout
