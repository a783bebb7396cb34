"""Files that are no teachers: what they are, by name and content, and what to give instead.

Facts: github.com/openai/guided-diffusion (names of files), openai/consistency_models (cm/train_util.py), NVlabs/edm
(training/training_loop.py), mingyuanzhou/SiD (training/sid_training_loop.py), tianweiy/DMD2 (main/edm), sony/ctm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edmdistill.checkpoints.layout import CARD, EXPORT, checkpoint_in
from edmdistill.errors import CheckpointError
from edmdistill.stored_tensors import StoredTensor

NVIDIA_64 = "NVIDIA's own pickle of that network, edm-imagenet-64x64-cond-adm.pkl"
TEACHER = "give the network that it was distilled from"
_NAMES = (
    (r"(cd|ct)_.+", f"is by its name a consistency model, a one-step generator and not a teacher: {TEACHER}, "
                    "edm_imagenet64_ema.pt or its like, or convert it with --generator consistency-model to sample it"),
    (r"target_model\d+\.pt", f"is by its name a consistency model, a one-step generator and not a teacher: {TEACHER}"),
    (r"opt\d+\.pt", "is by its name the state of an optimizer: give the ema_*.pt beside it"),
    (r"network-snapshot-\d+\.\d{6}-\d{6,}\.pkl(\.gz)?",
     f"is by its name a one-step generator of SiD and not a teacher: {TEACHER}, or convert it with --generator sid to "
     "sample it"),
)  # fmt: skip
"""Patterns of file names, and the part of a sentence that follows the name."""
_TENSORS = (
    (r"time_embed_s\.|(model\.)?map_layer0_s\.",
     f"holds a generator of CTM, which is no teacher: {TEACHER}, or convert it with --generator ctm to sample it"),
    (r"(model\.|unet\.)?((enc|dec)\.\d+x\d+_|map_(noise|layer0|label)\.|emb_(noise|fourier|label)\.)",
     "is a dict of tensors of an EDM network without its class and arguments, as DMD2's one-step generators are too: "
     "give a teacher's network pickle that the official code writes, for instance edm-cifar10-32x32-cond-vp.pkl"),
    (r"(down_blocks|up_blocks|mid_block|time_embedding)\.",
     "holds a network by diffusers' names, which cannot be read: give the pickle of NVIDIA's or the .pt of OpenAI's "
     "that it was made from"),
)  # fmt: skip
"""Patterns of how a tensor's name begins, and the part of a sentence that follows the file's name."""


def refuse_by_name(path: Path) -> None:
    """Raises: CheckpointError: the file's name is that of a file that is no teacher."""
    if other := describe_name(path):
        raise CheckpointError(f"{path} {other}")


def describe_name(path: Path) -> str | None:
    """Returns what a file is by its name, and what to give: the part of a sentence that follows the name."""
    if path.name.startswith("training-state-"):
        number = path.stem.rpartition("-")[2]
        beside = sorted(path.parent.glob(f"network-snapshot-*{number}*.pkl")) or sorted(
            path.parent.glob("network-snapshot-*.pkl")
        )
        give = beside[-1].name if beside else f"network-snapshot-{number}.pkl"
        return f"is a training state, not a network: give the network-snapshot beside it, {give}"
    return next((phrase for pattern, phrase in _NAMES if re.fullmatch(pattern, path.name)), None)


def describe_tensors(names: Iterable[object]) -> str | None:
    """Returns what a state dict is by the names of its tensors; None if they are not known."""
    tensors = [str(name).removeprefix("module.") for name in names]
    return next((phrase for pattern, phrase in _TENSORS if any(re.match(pattern, name) for name in tensors)), None)


def describe_entries(entries: Mapping[Any, object]) -> str | None:
    """Returns what a dict that is no state dict is, by its keys and what is under them; None if they are not known."""
    names = [str(name)[:60] for name in entries]
    if any(re.match(r"(g_|fake_score_)?optimizer", name) for name in names):
        return "is a training state, not a network: give the network-snapshot beside it (network-snapshot-*.pkl)"
    for name, inner in zip(names, entries.values(), strict=True):
        if isinstance(inner, dict) and any(isinstance(value, StoredTensor) for value in inner.values()):
            listed = ", ".join(map(repr, names[:8]))
            return describe_tensors(inner) or (
                f"is a checkpoint of another program ({listed}), with its weights under {name!r}: write these alone to "
                "a file by torch.save, if they are of an ADM network of OpenAI's"
            )
    return None


def describe_safetensors(header: bytes) -> str | None:
    """Returns what a safetensors file is, by its header, which begins as a JSON object."""
    try:
        return describe_tensors(json.loads(header))
    except (ValueError, RecursionError):
        return None


def describe_folder(folder: Path) -> str:
    """Returns what a folder without a checkpoint to convert is, and what to give."""
    names = {entry.name for entry in checkpoint_in(folder).iterdir()}
    if {"config.json", "model.safetensors"} <= names and not names & {"model_index.json"}:
        return "is a folder, a checkpoint or a run that needs no conversion: train and sample take it as it is"
    other = describe_other_folder(folder)
    return other or "is a folder without a checkpoint: give a converted teacher, a run, or the file to convert"


def describe_other_folder(folder: Path) -> str | None:
    """Returns what a folder that is neither a checkpoint nor a run is, and what to give; None: that is not known."""
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set[str]()
    if (target := _export_target(folder)) is not None:
        return (
            f"is what `export --to {target}` wrote for other programs: give the checkpoint or the run that was "
            f"exported, or load it as its {CARD} says"
        )
    if names & {"model_index.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "unet"}:
        return (
            "is a folder of diffusers', which cannot be read: give the pickle of NVIDIA's or the .pt of OpenAI's that "
            "it was made from"
        )
    files = sorted(name for name in names if re.search(r"\.(pkl|pkl\.gz|pt)$", name) and "training-state" not in name)
    if files:
        return f"is a folder: give a file in it, for instance {files[-1]}"
    return None


def _export_target(folder: Path) -> str | None:
    """Returns the program that a folder was exported for, as `export --to` names it; None: it is no export."""
    try:
        target = json.loads((folder / EXPORT).read_bytes())["to"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return target if isinstance(target, str) and re.fullmatch("[a-z-]{1,20}", target) else None
