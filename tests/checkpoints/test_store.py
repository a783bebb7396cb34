"""Our checkpoints: whole or not at all, and strict when read."""

import gc
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from tolerance import assert_rounded, depth

from edmdistill.atomic import atomic_write
from edmdistill.checkpoints import store
from edmdistill.checkpoints.class_names import dataset_class_names
from edmdistill.checkpoints.config import (
    CheckpointConfig,
    Guidance,
    Provenance,
    SamplingDefaults,
    describe,
    read_config,
)
from edmdistill.checkpoints.layout import CARD, CONFIG, MODEL
from edmdistill.checkpoints.load import load_denoiser, load_flow, load_generator
from edmdistill.checkpoints.store import load_checkpoint, load_tensors, save_checkpoint, save_tensors
from edmdistill.errors import CheckpointError
from edmdistill.networks import NETWORKS
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import PRECONDITIONINGS
from edmdistill.sampling.generate import sample

SMALL = {"img_resolution": 4, "label_dim": 3, "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
RGB = SMALL | {"img_channels": 2}
EDM = {"in_channels": 2, "out_channels": 2, "attn_resolutions": []}
LATENT = {"kind": "StabilityVAEEncoder", "vae_name": "me/vae", "scale": [0.5, 0.5], "bias": [0.0, 0.1]}
CASES = {
    "song": (SMALL | EDM, "vp"),
    "adm": (SMALL | EDM | {"out_channels": 4}, "iddpm"),
    "edm2": (SMALL | {"img_channels": 2, "attn_resolutions": [], "two_time": True}, "edm"),
}


def make(kind: str = "edm2") -> tuple[FlowNetwork, CheckpointConfig]:
    torch.manual_seed(0)
    arguments, preconditioning = CASES[kind]
    flow = FlowNetwork(NETWORKS[kind](**arguments), PRECONDITIONINGS[preconditioning]()).eval()
    provenance = Provenance(source="edm.pkl", sha256="0" * 64, licence="mit")
    return flow, CheckpointConfig(stage="teacher", provenance=provenance, **describe(flow))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint, alone in its folder."""
    flow, config = make()
    save_checkpoint(tmp_path / "c", flow, config)
    return tmp_path / "c"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("kind", CASES)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    flow, config = make(kind)
    config = replace(
        config,
        label_names=("a", "b", "c"),
        sampling=SamplingDefaults({"2": (80.0, 2.5), "3": (80.0, 2.5, 2.5)}),
        guidance=Guidance("classes", (2.0, 2.0)),  # one weight, built in
        encoder=LATENT,
        results=({"fd": 1.0},),
    )
    save_checkpoint(tmp_path / "c", flow, config)
    assert names(tmp_path) == ["c"]
    assert names(tmp_path / "c") == [CARD, CONFIG, MODEL]
    read, read_back = load_checkpoint(tmp_path / "c")
    assert read_back == config
    assert read.preconditioning == flow.preconditioning
    saved, found = flow.network.state_dict(), read.network.state_dict()
    assert list(saved) == list(found)
    assert all(torch.equal(saved[name], found[name]) for name in saved)
    assert load_tensors(tmp_path / "c" / MODEL)[1] == {"format": "pt"}  # which other programs ask for
    assert "--seeds 0-15 --vae me/vae --out" in (tmp_path / "c" / CARD).read_text()
    x_t, t = torch.randn(2, 2, 4, 4), torch.tensor([0.1, math.pi / 2])
    assert_rounded(read.eval()(x_t, t), flow(x_t, t), depth(flow))  # the file lends its weights where they lie


def is_mapped(folder: Path) -> bool:
    """Returns whether anything of this process lies in the file of weights."""
    gc.collect()
    return str(folder / MODEL) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_that_are_folded_are_not_held_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher is read mapped, and stays so without its second time; for sampling, each tensor is copied by itself."""
    mapped, _ = load_flow(folder)
    assert not mapped.two_time
    assert is_mapped(folder)
    expected = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in mapped.state_dict().items()}
    addresses = [address for _, address in expected.values()]
    assert max(addresses) - min(addresses) < (folder / MODEL).stat().st_size
    del mapped
    assert not is_mapped(folder)
    for large in 1, 2**40:  # pages of their own, and malloc's
        monkeypatch.setattr("edmdistill.stored_tensors.LARGE", large)
        own, _ = load_flow(folder, mapped=False)
        assert all(torch.equal(tensor, expected[name][0]) for name, tensor in own.state_dict().items())
        assert not is_mapped(folder)
    model = load_denoiser(folder)
    assert model.flow.network.out_conv.folded
    assert not is_mapped(folder)


def test_the_network_speaks_for_itself(tmp_path: Path) -> None:
    flow, config = make()
    save_checkpoint(tmp_path / "c", flow, replace(config, two_time=False, label_dim=7))
    assert load_checkpoint(tmp_path / "c")[1] == config


def test_tensors_may_come_from_elsewhere(tmp_path: Path) -> None:
    """As from the shards of a network in several processes."""
    flow, config = make()
    tensors = {name: tensor + 1 for name, tensor in flow.network.state_dict().items()}
    save_checkpoint(tmp_path / "c", flow, config, tensors=tensors)
    found = load_checkpoint(tmp_path / "c")[0].network.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_files_are_for_people(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    assert text.startswith('{\n  "format_version": "1.4",\n  "stage": "teacher"')
    assert json.loads(text)["c_noise"] == "0.25 ln(sigma)"
    card = (folder / CARD).read_text()
    assert card.startswith(
        "---\nlibrary_name: edmdistill\npipeline_tag: unconditional-image-generation\nlicense: mit\n"
    )
    assert "edm.pkl" in card


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException) -> None:
    before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}

    def fail(config: CheckpointConfig) -> str:
        raise interruption

    monkeypatch.setattr(store, "_card", fail)
    flow, config = make()
    for place in (folder, folder.parent / "new"):
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            save_checkpoint(place, flow, config, overwrite=True)
    assert names(folder.parent) == ["c"]
    assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == before


def test_a_failed_rename_gives_the_old_one_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(CheckpointError, match="cannot be written: Input/output error"):
        save_checkpoint(folder, *make(), overwrite=True)
    monkeypatch.undo()
    assert names(folder.parent) == ["c"]
    load_checkpoint(folder)


def test_overwrite(folder: Path) -> None:
    flow, config = make()
    with pytest.raises(CheckpointError, match=r"holds a checkpoint already, a teacher from edm\.pkl"):
        save_checkpoint(folder, flow, config)
    save_checkpoint(folder, flow, replace(config, stage="auxiliary"), overwrite=True)
    assert load_checkpoint(folder)[1].stage == "auxiliary"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a checkpoint: choose another path"):
        save_checkpoint(folder, flow, config, overwrite=True)


def test_another_library_s_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"architectures": ["GPT2"]}')
    with pytest.raises(
        CheckpointError, match="is not a checkpoint that can be read: choose another path, or remove it"
    ):
        save_checkpoint(tmp_path, *make(), overwrite=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_weights_are_not_saved(golden: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Of EDM's classes, which have nothing to fold."""
    source = golden / "edm-tiny-cond.pkl"
    model, (flow, config) = load_denoiser(source, dtype=dtype), load_flow(source)
    if dtype != torch.float32:
        with pytest.raises(CheckpointError, match=r"with its weights rounded, and cannot be saved: read it by"):
            save_checkpoint(tmp_path / "again", model.flow, config)
        return
    save_checkpoint(tmp_path / "again", model.flow, config)
    again = load_flow(tmp_path / "again")[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in flow.state_dict().items())


def test_what_was_loaded_for_sampling_is_not_saved(folder: Path, tmp_path: Path) -> None:
    """Its weights would be normalized twice: it would draw other images, in silence."""
    model = load_denoiser(folder)
    with pytest.raises(
        CheckpointError, match=r"was loaded for sampling, .* read it by edmdistill.*\.load_flow to train"
    ):
        save_checkpoint(tmp_path / "again", model.flow, load_flow(folder)[1])
    assert not (tmp_path / "again").exists()
    flow, config = load_flow(folder)
    save_checkpoint(str(tmp_path / "again"), flow, config)
    again, x = load_denoiser(tmp_path / "again"), torch.randn(1, flow.img_channels, *[flow.img_resolution] * 2)
    assert_rounded(again(x, 1.0), model(x, 1.0), depth(flow.network))  # other memory addresses


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    save_checkpoint(tmp_path / "c", *make())
    load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": "2.0"}, "has format_version '2.0', but this edmdistill reads 1.x"),
        ({"format_version": "1.x"}, "has format_version '1.x'"),
        ({"format_version": "1.3x"}, "has format_version '1.3x'"),
        ({"format_version": None}, "has format_version None"),
        ({"color": "red"}, "unknown field `color`"),
        ({"stage": "student"}, "stage: invalid enum value 'student', where teacher or generator or auxiliary"),
        ({"sampling": {"sigmas": {"2": [1.0, 2.0]}}}, "the schedule for 2 steps is"),
        ({"sampling": {"sigmas": {"3": [2.0, 1.0]}}}, "the schedule for 3 steps is"),
        ({"sampling": {"sigmas": {"0": []}}}, "the schedule for 0 steps is"),
        ({"label_names": ["a", "b"]}, "label_names holds 2 names for 3 classes"),
        ({"label_dim": 4}, "contradicts itself: label_dim is 4, its network has 3"),
        ({"two_time": False}, "contradicts itself: two_time is False, its network has True"),
        ({"sigma_data": 0.4}, "contradicts itself: sigma_data is 0.4, its network has 0.5"),
        ({"sigma_min": 0.004}, "contradicts itself: sigma_min is 0.004, its network has 0.002"),
        ({"sigma_max": 70.0}, "contradicts itself: sigma_max is 70.0, its network has 80.0"),
        ({"encoder": LATENT | {"scale": [0.5]}}, "its encoder has a scale for 1 channel, its network has 2"),
        ({"encoder": LATENT | {"bias": [0.1] * 3}}, "its encoder has a bias for 3 channels, its network has 2"),
        ({"guidance": {"kind": "classes", "range": [1, 2]}}, "contradicts itself: its network reads no weight of guid"),
        ({"guidance": {"kind": "classes", "range": [2, 1]}}, "the range of guidance is [2.0, 1.0]"),
        ({"network": {"kind": "vit", "arguments": {}}}, "is of the kind 'vit'"),
        ({"network": {"kind": "edm2", "arguments": {"num_blocks": "x"}}}, "arguments that make no edm2 network"),
        (
            {"network": {"kind": "edm2", "arguments": SMALL | {"img_channels": 2, "num_blocks": 10**12}}},
            "num_blocks must be at most 64",
        ),
        ({"sampling": {"gamma": 2.0}}, "sampling.gamma must be at most 1"),
        (
            {"network": {"kind": "edm2", "arguments": RGB | {"positional_time": True}}},
            "network reads t, but its precon",
        ),
        ({"preconditioning": {"kind": "edm", "c_noise_kind": "time"}}, "its network reads ln(sigma), but its precon"),
        (
            {
                "network": {
                    "kind": "edm2",
                    "arguments": RGB | {"model_channels": 16, "attn_resolutions": [4], "channels_per_head": 3},
                }
            },
            "16 channels cannot be split among 5 heads of attention",
        ),
        (
            {"network": {"kind": "song", "arguments": SMALL | EDM | {"model_channels": 5}}},
            "embedding has 5 channels, but",
        ),
        ({"network": {"kind": "song", "arguments": SMALL | EDM | {"split_times": True}}}, "set two_time too"),
        (
            {"preconditioning": {"kind": "edm", "sigma_min": 90}},
            "where all must be positive and finite, and sigma_min b",
        ),
        ({"preconditioning": {"kind": []}}, "is of the kind []"),
        (
            {"network": {"kind": "song", "arguments": SMALL | EDM | {"out_channels": 4}}},
            "makes 4 channels from 2, where edm needs 2: it is no denoiser",
        ),
        ({"preconditioning": {"kind": "edm", "c_noise_kind": "x"}}, "c_noise_kind: invalid enum value 'x'"),
        ({"preconditioning": {"kind": "iddpm", "M": 10**12}}, "M must be at most 10000"),
        ({"preconditioning": {"kind": "edm", "rho": 1}}, "rho: the preconditioning edm has no such argument"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused(folder: Path, change: dict[str, object], sentence: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert re.search("use an intact copy$|upgrade edmdistill", str(caught.value))


def test_a_file_of_version_1_0_reads_as_it_did() -> None:
    """format-1.0 was written when there was no other version; its samples with it."""
    old = Path(__file__).with_name("format-1.0")
    generator = load_generator(old)
    assert generator.config.method == "cosim"
    expected, _ = load_tensors(old / "samples.safetensors")
    assert torch.allclose(sample(generator, 2, seeds=range(3)), expected["samples"], atol=1e-5)


def test_a_file_without_names_of_classes_has_those_of_its_data_set(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for source, expected in (("edm-cifar10-32x32-cond-vp.pkl", dataset_class_names("cifar10")), ("edm.pkl", None)):
        changes = {"format_version": "1.0", "label_dim": 10, "provenance": config["provenance"] | {"source": source}}
        (folder / CONFIG).write_text(json.dumps(config | changes))
        assert read_config(folder).label_names == expected


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["out_gain"], tensors["second_time.gain"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["spare"] = torch.zeros(1)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["out_gain"] = torch.zeros(1)


def retype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["out_gain"] = torch.zeros([], dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop, "lacks out_gain and 1 more, which its network needs"),
        (add, "holds spare, for which its network has no place"),
        (reshape, "holds out_gain in shape [1] where its network has []"),
        (retype, "holds out_gain as torch.int64"),
    ],
)
def test_wrong_tensors_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], sentence: str
) -> None:
    tensors, _ = load_tensors(folder / MODEL)
    change(tensors)
    save_tensors(folder / MODEL, tensors)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith("; use an intact copy")


def test_what_is_no_checkpoint_is_refused(folder: Path) -> None:
    (folder / MODEL).write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors.*; use an intact copy"):
        load_checkpoint(folder)
    (folder / CONFIG).write_text("[")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint.*; use an intact copy"):
        load_checkpoint(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(folder)


def test_aside_takes_files_too(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "deep" / "a.txt") as new:
        new.write_text("a")
    assert (tmp_path / "deep" / "a.txt").read_text() == "a"

    def fail() -> None:
        with atomic_write(tmp_path / "deep" / "a.txt") as new:
            new.write_text("b")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path / "deep") == ["a.txt"]
    assert (tmp_path / "deep" / "a.txt").read_text() == "a"
