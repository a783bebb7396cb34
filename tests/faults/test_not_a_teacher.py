"""Networks of another kind do not pass as teachers: each is refused by one sentence that names what to give instead."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edmdistill.checkpoints import openai
from edmdistill.checkpoints.config import read_config
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import load_official
from edmdistill.checkpoints.openai import UnknownNetwork, read_openai, to_adm
from edmdistill.checkpoints.published_generators import convert_generator
from edmdistill.errors import CheckpointError

CASES = Path(__file__).parent.parent / "cases"
NVIDIA = r"edm-imagenet-64x64-cond-adm\.pkl"


def adm(channels_in: int, channels_out: int) -> dict[str, Tensor]:
    """The ends of OpenAI's ADM: what says how many channels go in and come out."""
    return {
        "time_embed.0.weight": torch.zeros(512, 128),
        "input_blocks.0.0.weight": torch.zeros(128, channels_in, 3, 3),
        "out.2.weight": torch.zeros(channels_out, 128, 3, 3),
    }


@pytest.mark.parametrize(
    ("channels_in", "channels_out", "why"),
    [
        (3, 6, f"learns variances too.*{NVIDIA}"),  # 64x64_diffusion.pt
        (1, 2, f"learns variances too.*{NVIDIA}"),
        (6, 6, f"is an upsampler.*{NVIDIA}"),  # 64_256_upsampler.pt
        (6, 3, f"is an upsampler.*{NVIDIA}"),
        (3, 1, r"takes 3 channels and gives 1.*edm_imagenet64_ema\.pt"),
        (4, 4, "takes 4 channels and gives 4"),
    ],
)
def test_channels(channels_in: int, channels_out: int, why: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNetwork, match=why):
        to_adm(adm(channels_in, channels_out))
    path = tmp_path / "model050000.pt"
    torch.save(adm(channels_in, channels_out), path)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{why}[^\n]*$"):
        read_openai(path, "")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_pass(channels: int) -> None:
    openai._require_denoiser(channels, channels)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ct_imagenet64.pt", "consistency model, a one-step generator and not a teacher"),
        ("cd_bedroom256_lpips.pt", "consistency model, a one-step generator and not a teacher"),
        ("target_model050000.pt", "consistency model, a one-step generator and not a teacher"),
        ("opt050000.pt", "state of an optimizer"),
        ("network-snapshot-1.200000-403968.pkl", "one-step generator of SiD and not a teacher"),
    ],
)
def test_names(name: str, why: str, tmp_path: Path, golden: Path) -> None:
    good = golden / "edm-tiny-cond.pkl" if name.endswith("pkl") else CASES / "ct_imagenet64.pt"
    path = tmp_path / name
    path.write_bytes(good.read_bytes())
    with pytest.raises(CheckpointError, match=rf"is by its name .*{why}.*: give "):
        load_official(path)


@pytest.mark.parametrize(
    "name", ["network-snapshot-000512.pkl", "network-snapshot-0002048-0.050.pkl", "cd.pkl", "opt1.pt.pkl"]
)
def test_names_of_teachers_pass(name: str, tmp_path: Path, golden: Path) -> None:
    path = tmp_path / name
    path.write_bytes((golden / "edm-tiny-cond.pkl").read_bytes())
    assert read_official(path).network_class == "SongUNet"


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["time_embed.0.weight", "time_embed_s.0.weight"], "holds a generator of CTM"),
        (["model.enc.64x64_conv.weight", "model.map_layer0.weight"], "DMD2's one-step generators"),
        (["module.enc.8x8_conv.weight"], "tensors of an EDM network"),
        (["unet.emb_fourier.freqs"], "tensors of an EDM network"),
        (["down_blocks.0.resnets.0.conv1.weight"], "diffusers' names"),
    ],
)
def test_tensors_of_others(names: list[str], why: str, tmp_path: Path) -> None:
    tensors = dict.fromkeys(names, torch.ones(2))
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=rf"{why}.*: give "):
        load_official(path)
    torch.save({"model": tensors, "epoch": 3}, path)
    with pytest.raises(CheckpointError, match=rf"{why}.*: give "):
        load_official(path)


def test_a_pickle_of_a_generator(tmp_path: Path, golden: Path) -> None:
    path = tmp_path / "x.pkl"
    good = (golden / "edm-tiny-cond.pkl").read_bytes()
    old = pickle.SHORT_BINUNICODE + b"\x0aEDMPrecond"
    assert old in good
    path.write_bytes(good.replace(old, pickle.SHORT_BINUNICODE + b"\x0aGeneratorX"))
    with pytest.raises(
        CheckpointError, match=r"'GeneratorX' under 'ema', a one-step generator and not a teacher: give"
    ):
        read_official(path)
    path.write_bytes(pickle.dumps({"G_ema": 1}))
    with pytest.raises(CheckpointError, match="holds a generator under 'G_ema' and no teacher: give"):
        read_official(path)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (("config.json", "model.safetensors"), "a checkpoint or a run that needs no conversion: train and sample take"),
        (("generator/config.json", "generator/model.safetensors"), "a checkpoint or a run that needs no conversion: "),
        (("model_index.json", "config.json", "model.safetensors"), "is a folder of diffusers'.*: give the pickle"),
        (("unet/config.json",), "is a folder of diffusers'.*: give the pickle"),
        (("config.json", "diffusion_pytorch_model.safetensors"), "is a folder of diffusers'.*: give the pickle"),
        (("config.json", "diffusion_pytorch_model.bin"), "is a folder of diffusers'.*: give the pickle"),
        (("a.pkl", "b.pkl.gz", "notes.txt", "training-state-9.pt"), r"give a file in it, for instance b\.pkl\.gz"),
        (("c.pt",), r"give a file in it, for instance c\.pt"),
        (("pkl", "model.safetensors"), "is a folder without a checkpoint: give a converted teacher, a run, or the"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_folders(tmp_path: Path, files: tuple[str, ...], why: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=rf"^{tmp_path} [^\n]*{why}[^\n]*$"):
        load_official(tmp_path)


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ("model.safetensors", r"is not a checkpoint of edmdistill: its config\.json is another program's; give a conv"),
        ("diffusion_pytorch_model.safetensors", "is a folder of diffusers', which cannot be read: give the pickle"),
    ],
)
def test_models_of_another_program(tmp_path: Path, weights: str, why: str) -> None:
    """What `sample`, `eval` and `train` say of a folder that is also called as a model on the Hub is."""
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel", "sample_size": 32}')
    (tmp_path / weights).touch()
    with pytest.raises(CheckpointError, match=f"^{tmp_path} {why}"):
        read_config(tmp_path)


@pytest.mark.parametrize("key", ["optimizer_state", "g_optimizer_state", "fake_score_optimizer_state"])
def test_training_states_whatever_their_names(tmp_path: Path, key: str) -> None:
    path = tmp_path / "last.pt"
    torch.save({"net": {"a": torch.ones(1)}, key: {"state": {0: torch.ones(1)}}}, path)
    with pytest.raises(CheckpointError, match="is a training state, not a network: give the network-snapshot"):
        load_official(path)


def test_checkpoints_of_another_program_are_described_in_few_words(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"k" * 1000: {"epoch": 3, "weights": torch.ones(1)}} | {f"more{i}": i for i in range(100)}, path)
    with pytest.raises(CheckpointError, match=r"is a checkpoint of another program.*weights under 'kkk") as caught:
        load_official(path)
    assert len(str(caught.value)) < 500


ONE, ENDS = torch.zeros(1), adm(3, 3)
FOREIGN = {
    "empty": ({}, "holds an empty dict, without tensors"),
    "another network": ({"0.weight": ONE}, r"without input_blocks\.0\.0\.weight", "without blocks of an encoder"),
    "numbers as keys": ({0: ONE}, r"without input_blocks\.0\.0\.weight", "without blocks of an encoder"),
    "the ends of ADM": (ENDS, r"without input_blocks\.[^ ]*weight", "without blocks of an encoder"),
    "in other shapes": (dict.fromkeys(ENDS, ONE), "whose shapes do not fit one another", "without blocks"),
    "options": ({"lr": 0.1}, r"holds no plain dict of tensors \(there is none under 'lr'\)"),
    "a list": ([ONE], "holds no plain dict of tensors"),
    "a tensor": (ONE, "holds no plain dict of tensors"),
    "the second time of ADM": ({"time_embed_s.0.weight": ONE}, "a generator of CTM", "without blocks", "without input"),
    "the second time of DDPM++": (
        {"map_layer0_s.weight": ONE},
        "a generator of CTM",
        "without blocks",
        "without blocks",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_file_of_another_program_lacks_is_said_in_words(name: str, tmp_path: Path) -> None:
    content, teacher, *others = FOREIGN[name]
    dmd2, ctm = (*others, "reads no second time")[:2] if others else (teacher, teacher)
    path = tmp_path / "other.pt"
    torch.save(content, path)
    for method, why in (("", teacher), ("consistency-model", teacher), ("dmd2", dmd2), ("ctm", ctm)):
        with pytest.raises(CheckpointError, match=rf"^{path} [^\n]*{why}") as caught:
            convert_generator(path, tmp_path / "out", method) if method else load_official(path)
        assert "Error(" not in str(caught.value), "Python's own words"
