"""VAEs: the official moments, what is read from which place, and what is refused."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_generator import tiny_generator

from edmdistill.checkpoints import vae as module
from edmdistill.checkpoints.encoder import STABLE_DIFFUSION
from edmdistill.checkpoints.vae import CONFIG, WEIGHTS, Vae, cached_vae, diffusers_class, find_vae, read_vae
from edmdistill.checkpoints.vae_architecture import read_architecture
from edmdistill.errors import CheckpointError, HubError
from edmdistill.export.folder import export
from edmdistill.publish.hub import build_package


@pytest.fixture(scope="module")
def case(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "evaluation/latents/expected.safetensors")


@pytest.fixture
def folder(tmp_path: Path, golden: Path) -> Path:
    return shutil.copytree(golden / "evaluation/latents/tiny-vae", tmp_path / "vae")


def change(folder: Path, **keys: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | keys))


def test_the_official_moments(folder: Path, case: dict[str, torch.Tensor]) -> None:
    vae = read_vae(str(folder))
    assert (vae.name, vae.channels, vae.factor) == ("vae", 4, 8)
    moments = vae.encode(case["pixels_u8"], "edm2")
    assert moments.dtype == torch.float32
    torch.testing.assert_close(moments, case["mean_std"], rtol=0, atol=1e-5)
    vae.batch = 2  # three images in two batches
    torch.testing.assert_close(vae.encode(case["pixels_u8"], "edm2"), moments, rtol=0, atol=1e-5)
    assert vae.statistics("edm2").std == pytest.approx([1 / 0.18215] * 4)


def test_the_two_ranges_see_the_same_picture_in_other_units(folder: Path, case: dict[str, torch.Tensor]) -> None:
    vae = read_vae(str(folder))
    pixels = vae.model.encode(case["pixels_u8"] / 127.5 - 1).latent_dist
    torch.testing.assert_close(vae.encode(case["pixels_u8"], "scm")[:, :4], pixels.mean, rtol=0, atol=1e-5)
    assert not torch.allclose(vae.encode(case["pixels_u8"], "scm"), case["mean_std"], atol=0.1)


def test_bfloat16_is_close_and_stored_as_float32(folder: Path, case: dict[str, torch.Tensor]) -> None:
    moments = read_vae(str(folder), dtype=torch.bfloat16).encode(case["pixels_u8"], "edm2")
    assert moments.dtype == torch.float32
    torch.testing.assert_close(moments, case["mean_std"], rtol=0, atol=0.1)
    assert not torch.equal(moments, case["mean_std"])
    vae = read_vae(str(folder), dtype=torch.bfloat16)
    assert vae.decode(moments[:, :4]).dtype == torch.float32
    assert not vae.model.training
    assert {(p.dtype, p.requires_grad) for p in vae.model.parameters()} == {(torch.bfloat16, False)}


def test_attention_by_its_old_names(folder: Path, case: dict[str, torch.Tensor]) -> None:
    """As in sd-vae-ft-mse's file."""
    new = {new: old for old, new in module.OLD_NAMES.items()}
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        head, dot, tail = name.partition(".attentions.0.")
        layer = tail.rpartition(".")[0]
        tensors[f"{head}{dot}{tail.replace(layer, new.get(layer, layer))}"] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in tensors
    save_file(tensors, folder / WEIGHTS)
    torch.testing.assert_close(
        read_vae(str(folder)).encode(case["pixels_u8"], "edm2"), case["mean_std"], rtol=0, atol=1e-5
    )


def test_memory_that_runs_out_halves_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, sizes = read_vae(str(folder)), []

    def room_for_two(latents: torch.Tensor) -> object:
        sizes.append(len(latents))
        if len(latents) > 2:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return type("Decoded", (), {"sample": latents[:, :3]})

    monkeypatch.setattr(vae.model, "decode", room_for_two)
    latents = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 4, 2, 2)
    assert torch.equal(vae.decode(latents), latents[:, :3])
    assert sizes == [5, 4, 2, 2, 1]

    def no_room(latents: torch.Tensor) -> object:
        raise torch.OutOfMemoryError

    def other_fault(latents: torch.Tensor) -> object:
        raise RuntimeError("a size must match")

    monkeypatch.setattr(vae.model, "decode", other_fault)
    with pytest.raises(RuntimeError, match="a size must match"):
        vae.decode(latents)
    assert vae.batch == 2
    monkeypatch.setattr(vae.model, "decode", no_room)
    with pytest.raises(CheckpointError, match="does not fit in the GPU's memory with one image of 2x2"):
        vae.decode(latents)


def test_declared_statistics_are_those_of_the_architecture(folder: Path) -> None:
    vae = read_vae(str(folder))
    change(folder, shift_factor=0.1, scaling_factor=0.5)
    shifted = read_architecture(folder)
    assert Vae("", folder, shifted, vae.model).statistics("edm2") == ((0.1,) * 4, (2.0,) * 4)
    change(folder, latents_mean=[1, 2, 3, 4], latents_std=[5, 6, 7, 8])
    assert read_vae(str(folder)).statistics("scm") == ((1, 2, 3, 4), (5, 6, 7, 8))
    change(folder, block_out_channels=[128, 256, 512, 512])
    stable = Vae("", folder, read_architecture(folder), vae.model)
    assert [stable.statistics(name) for name in ("edm2", "scm")] == list(STABLE_DIFFUSION.values())
    change(folder, latent_channels=16, latents_mean=None, latents_std=None)  # as Stable Diffusion 3's
    later = Vae("", folder, read_architecture(folder), vae.model)
    assert later.statistics("edm2") == later.statistics("scm") == ((0.1,) * 16, (2.0,) * 16)


def test_places(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_vae(str(folder)) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_vae("~/vae") == folder
    monkeypatch.chdir(folder)
    assert read_vae(".").name == "vae"
    (folder / "vae").mkdir()
    assert find_vae(str(folder)) == folder  # which is a VAE itself
    (folder / "me").mkdir()
    (folder / "me" / "vae").touch()
    assert find_vae("me/vae", download=True) is None  # a file that is here is not looked for elsewhere
    assert find_vae(str(tmp_path)) == folder  # a pipeline's folder holds its VAE in vae/
    assert find_vae(str(tmp_path / "nothing")) is None
    assert find_vae(str(folder / CONFIG)) is None


def lacks_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename((folder / WEIGHTS).with_suffix(".bin"))


def lacks_a_config(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


def lacks_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("quant_conv.bias")
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / CONFIG).write_text("{"), "config.json cannot be used"),
        (lambda folder: change(folder, _class_name="UNet"), "it describes 'UNet', not an AutoencoderKL"),
        (lambda folder: change(folder, in_channels=4), "its images have 4 channels and not 3"),
        (lambda folder: change(folder, out_channels=1), "its images have 1 channel and not 3"),
        (lambda folder: change(folder, latents_mean=[1, 2]), "latents_mean or latents_std is not of 4 channels"),
        (lambda folder: change(folder, latents_std=[1] * 5), "latents_mean or latents_std is not of 4 channels"),
        (lambda folder: change(folder, latents_std=[1, 1, 1, 0]), "latents_std"),
        (lambda folder: change(folder, note="x" * 2**20), "it is not a file of at most 1 MiB"),
        (lambda folder: change(folder, layers_per_block=10**9), "layers_per_block"),
        (lambda folder: change(folder, block_out_channels=[10**12]), "block_out_channels"),
        (lambda folder: (folder / CONFIG).write_text('{"x": ' + "[" * 100_000), "config.json cannot be used"),
        (lambda folder: change(folder, block_out_channels=[8]), "differ in length"),
        (lambda folder: change(folder, down_block_types=["DownEncoderBlock2D"]), "differ in length"),
        (lambda folder: change(folder, up_block_types=["UpDecoderBlock2D"]), "differ in length"),
        (lambda folder: change(folder, latent_channels=5), r"holds \S+ in shape"),
        (lambda folder: change(folder, block_out_channels=[8, 8, 16, 65536]), "lacks decoder"),
        (lambda folder: change(folder, down_block_types=["NoBlock"] * 4), "arguments that make no VAE"),
        (lambda folder: (folder / WEIGHTS).unlink(), r"has no diffusion_pytorch_model\.safetensors \(it has none\)"),
        (lacks_a_config, "it is not a file of at most 1 MiB"),
        (lacks_weights, "has diffusion_pytorch_model.bin, a pickle, which is not read"),
        (lacks_a_tensor, "lacks quant_conv.bias"),
    ],
)
def test_what_is_refused(
    folder: Path, break_it: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(folder)
    if not message.startswith(("holds", "lacks", "arguments")):  # of tensors, or what diffusers itself refuses
        monkeypatch.setattr("edmdistill.checkpoints.vae.diffusers_class", import_of_diffusers)
    with pytest.raises(CheckpointError, match=message) as error:
        read_vae(str(folder))
    assert len(str(error.value).splitlines()) == 1


def import_of_diffusers(*args: object, **keywords: object) -> None:
    raise AssertionError("diffusers is imported for a VAE that is refused")


def test_none_there(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edmdistill.checkpoints.vae.diffusers_class", import_of_diffusers)
    with pytest.raises(CheckpointError, match=r"has latents of 4 channels, but those of the network have 8: name"):
        read_vae(str(folder), channels=8)
    for name in (str(tmp_path / "nothing"), "me/a--b", "me/a.git"):  # the Hub takes no such names
        with pytest.raises(CheckpointError, match=f"there is no VAE {name}: give a folder with"):
            read_vae(name)
    with pytest.raises(HubError, match=r"me/a--b cannot be downloaded from the Hub: Cannot have --"):
        read_vae("me/a--b", download=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is not a VAE of diffusers"):
        read_vae(str(tmp_path / "empty"))


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'edmdistill\[latent\]'"):
        read_vae("a/b")


def test_the_hub_once_and_then_its_cache(server, folder: Path, case: dict[str, torch.Tensor]) -> None:
    from hub_server import Repository

    server.repositories["me/vae"] = repository = Repository(private=False)
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    repository.commit("main", files | {"diffusion_pytorch_model.bin": b"a pickle"})
    assert find_vae("me/vae") is None
    vae = read_vae("me/vae", download=True)
    assert vae.name == "me/vae"
    torch.testing.assert_close(vae.encode(case["pixels_u8"], "edm2"), case["mean_std"], rtol=0, atol=1e-5)
    assert not any("bin" in call.path for call in server.calls)
    before = len(server.calls)
    for name in ("me/vae", "me/vae@main"):
        assert read_vae(name, download=True).sha256 == vae.sha256
        assert find_vae(name) == cached_vae(name) == vae.folder
    assert len(server.calls) == before
    repository.commit("next", files)
    assert find_vae("me/vae@next") is None
    assert find_vae("me/vae@next", download=True).parent == vae.folder.parent  # type: ignore[union-attr]
    with pytest.raises(HubError, match="you/vae cannot be downloaded from the Hub"):
        read_vae("you/vae", download=True)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_damaged_download_is_not_taken_for_none(server, folder: Path, tmp_path: Path, file: str) -> None:
    from hub_server import Repository

    encoder = {"kind": "StabilityVAEEncoder", "vae_name": "me/vae", "scale": [0.5] * 4, "bias": [0.0] * 4}
    generator = tiny_generator(tmp_path / "latents", channels=4, encoder=encoder)
    server.repositories["me/vae"] = repository = Repository(private=False)
    repository.commit("main", {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    for use in (
        lambda **options: build_package(generator, "me/it", "mit", **options),
        lambda **options: export(generator, "space", tmp_path / "space", overwrite=True, **options),
    ):
        cached = find_vae("me/vae", download=True)
        assert cached is not None
        (cached / file).write_bytes((folder / file).read_bytes()[:99])
        with pytest.raises(CheckpointError, match=r"; it is removed from the cache, and --vae me/vae downloads it"):
            use()
        use(vae="me/vae")  # as was advised
        assert (cached / file).read_bytes() == (folder / file).read_bytes()


def test_what_diffusers_says_of_other_packages_is_not_passed_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = ModuleType("diffusers")
    package.__getattr__ = lambda name: logging.getLogger("torchao").warning("no CUDA")  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "diffusers", package)
    logging.disable(logging.INFO)
    diffusers_class("AutoencoderKL", extra="latent", needed_by="a VAE needs")
    assert not caplog.records
    assert logging.root.manager.disable == logging.INFO  # as it was
    logging.disable(logging.NOTSET)
    logging.getLogger("torchao").warning("later")
    assert [record.message for record in caplog.records] == ["later"]
