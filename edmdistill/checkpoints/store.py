"""Our checkpoints: a folder with config.json, model.safetensors and README.md, on disk as on the Hub.

The tensors carry the network's own names, which are the official ones below their prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from edmdistill.atomic import atomic_write, expanded, reachable, require_no_pipe
from edmdistill.checkpoints.config import CheckpointConfig, NetworkSpec, describe, read_config, write_config
from edmdistill.checkpoints.documents import code, front_matter, markdown
from edmdistill.checkpoints.encoder import vae_words
from edmdistill.checkpoints.layout import CARD, CONFIG, MODEL
from edmdistill.checkpoints.licences import licence_fields, licence_words
from edmdistill.checkpoints.safetensors_file import write_safetensors
from edmdistill.checkpoints.source import resolve
from edmdistill.errors import CheckpointError, Damaged, counted
from edmdistill.networks import NETWORKS
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import IDDPM, PRECONDITIONINGS, make_preconditioning
from edmdistill.stored_tensors import empty_pages

# Tensors.


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all.  Tensors that share memory are each written, and none is copied.

    Raises: CheckpointError: the disk refuses.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as new:
        write_safetensors(new, plain, metadata or {})


def load_tensors(
    path: Path, device: torch.device | str = "cpu", mapped: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file.

    Args:
        mapped: in the host's memory, the numbers stay in the file, which is mapped as a whole. Whoever changes or
            copies them then holds both until the last is gone; False: they are copied one by one, and the file is not
            held.
    Raises: CheckpointError: no such file, or it is damaged.
    """
    require_no_pipe(path)
    try:
        if not path.is_file():
            raise OSError("it is a folder" if reachable(path).exists() else "it does not exist")
        with safe_open(path, framework="pt", device=str(device)) as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            if mapped:
                return {name: file.get_tensor(name) for name in names}, metadata
        return {name: _copied(path, name) for name in names}, metadata
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path} cannot be read as safetensors: {error}") from error


def _copied(path: Path, name: str) -> Tensor:
    """Returns a tensor of a safetensors file, in pages of its own."""
    with safe_open(path, framework="pt") as file:  # opened for this one alone: its pages go with it
        tensor = file.get_tensor(name)
    return empty_pages(tensor.shape, tensor.dtype).copy_(tensor)


def require_finite(tensor: Tensor, name: str, where: str) -> None:
    """Raises: CheckpointError: a tensor of a checkpoint holds NaN or infinity."""
    # A sum finds them in one pass and without memory, but large finite numbers may overflow it.
    if not tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32).isfinite():
        finite = tensor.isfinite()
        if not finite.all():
            raise CheckpointError(
                f"{where} holds NaN or infinity in {name}, at {int((~finite).sum()):,} of {finite.numel():,} numbers: "
                "the network is broken; use an earlier snapshot, or download the file again"
            )


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Loads tensors into a module on the meta device, after checking every name, shape and dtype.

    Raises: CheckpointError: one is missing, unexpected, of another shape, not floating-point, or not finite.
    """
    expected = module.state_dict()
    cause = "it is damaged, or its configuration describes another network"
    for wrong, what in (
        (expected.keys() - tensors.keys(), "lacks {}, which its network needs"),
        (tensors.keys() - expected.keys(), "holds {}, for which its network has no place"),
    ):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise Damaged(f"{where} {what.format(min(wrong) + more)}: {cause}")
    for name, tensor in tensors.items():
        shape = list(expected[name].shape)
        if list(tensor.shape) != shape:
            raise Damaged(f"{where} holds {name} in shape {list(tensor.shape)} where its network has {shape}: {cause}")
        if not tensor.is_floating_point():
            raise Damaged(f"{where} holds {name} as {tensor.dtype}, not as floating-point numbers: {cause}")
        require_finite(tensor, name, where)
    module.load_state_dict(tensors, assign=True)


# Checkpoints.


def build_flow(
    spec: NetworkSpec, preconditioning: Mapping[str, Any], where: str, label_dropout: float | None = None
) -> FlowNetwork:
    """Returns the network that a configuration describes, on the meta device: it takes no memory, however large it is.

    Args:
        where: what errors call the checkpoint.
        label_dropout: see FlowNetwork.
    Raises: CheckpointError: the kind is unknown, the arguments make no network, or it is no denoiser.
    """
    numbers = dict(preconditioning)
    kind = numbers.pop("kind", None)
    for word, table in ((spec.kind, NETWORKS), (kind, PRECONDITIONINGS)):
        if not isinstance(word, str) or word not in table:
            raise Damaged(f"{where} is of the kind {word!r:.80}, but this version supports {', '.join(table)}")
    try:
        with torch.device("meta"):
            network = NETWORKS[spec.kind](**spec.arguments)
    except Exception as error:  # the arguments are untrusted: whatever breaks, they are the cause
        raise Damaged(f"{where} has arguments that make no {spec.kind} network: {error!s:.300}") from error
    try:
        flow = FlowNetwork(network, make_preconditioning(str(kind), numbers), label_dropout=label_dropout)
    except Exception as error:
        raise Damaged(f"{where} has numbers that make no {kind} preconditioning: {error!s:.300}") from error
    # iDDPM's networks also predict the variance, which is not used.
    expected = flow.img_channels * (2 if isinstance(flow.preconditioning, IDDPM) else 1)
    channels = network.arguments.get("out_channels", expected)
    if channels != expected:
        raise Damaged(
            f"{where} has a network that makes {counted(channels, 'channel')} from {flow.img_channels}, where {kind} "
            f"needs {expected}: it is no denoiser of such images"
        )
    if network.positional_time != flow.preconditioning.reads_time:
        reads = "t" if network.positional_time else "ln(sigma)"
        raise Damaged(
            f"{where} contradicts itself: its network reads {reads}, but its preconditioning does not give that"
        )
    return flow


def refuse_occupied(folder: Path, overwrite: bool) -> None:
    """Requires that a checkpoint can be written at `folder`: it is empty, or a checkpoint of ours to overwrite.

    Raises: CheckpointError: something else is there.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or {entry.name for entry in folder.iterdir()} - {CONFIG, MODEL, CARD}:
        raise CheckpointError(f"{folder} exists and is not a checkpoint: choose another path")
    try:
        existing = read_config(folder)
    except CheckpointError as error:  # it may be another library's
        raise CheckpointError(
            f"{folder} exists and is not a checkpoint that can be read: choose another path, or remove it"
        ) from error
    if not overwrite:
        raise CheckpointError(
            f"{folder} holds a checkpoint already, a {existing.stage} from {existing.provenance.source}: "
            "choose another path, or add --overwrite"
        )


def write_checkpoint(
    folder: Path, flow: FlowNetwork, config: CheckpointConfig, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the three files of a checkpoint into a folder, which is created.

    Raises: CheckpointError: weights are folded, which would be normalized again when they are read, or rounded.
    """
    if tensors is None and (flow.network.folded or flow.network.rounded):
        how = "its normalization folded into the weights" if flow.network.folded else "its weights rounded"
        raise CheckpointError(
            f"this network was loaded for sampling, with {how}, and cannot be saved: read it by "
            "edmdistill.checkpoints.load.load_flow to train or change it"
        )
    config = replace(config, **describe(flow))
    save_tensors(folder / MODEL, flow.network.state_dict() if tensors is None else tensors, {"format": "pt"})
    describe_checkpoint(folder, config)


def describe_checkpoint(folder: Path, config: CheckpointConfig) -> None:
    """Writes the files of a checkpoint that describe it."""
    write_config(folder, config)
    (folder / CARD).write_text(_card(config), encoding="utf-8")


def save_checkpoint(
    folder: str | Path,
    flow: FlowNetwork,
    config: CheckpointConfig,
    *,
    overwrite: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        config: its fields that the network determines (see `describe`) are replaced.
        overwrite: replace a checkpoint of ours that is there.
        tensors: of flow.network, where flow holds only shards.
    Raises: CheckpointError: the folder is occupied, the disk refuses, or the network was loaded for sampling.
    """
    folder = expanded(folder)
    refuse_occupied(folder, overwrite)
    with atomic_write(folder) as new:
        write_checkpoint(new, flow, config, tensors)


def load_checkpoint(source: str | Path, mapped: bool = True) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns the network and the configuration of a checkpoint of ours, a folder or a repository of the Hub.

    Args:
        mapped: as for `load_tensors`.
    Raises: CheckpointError: it does not exist, is not ours, or is damaged.  HubError: the Hub refuses.
    """
    folder = resolve(source)
    config = read_config(folder)
    flow = build_meta(config, folder)
    fill(flow.network, load_tensors(folder / MODEL, mapped=mapped)[0], str(folder / MODEL))
    return flow, config


def build_meta(config: CheckpointConfig, folder: Path) -> FlowNetwork:
    """Returns the network of a configuration on the meta device, after comparing the two.

    Args:
        folder: the checkpoint, for errors.
    Raises: CheckpointError: it describes no network, or contradicts itself.
    """
    flow = build_flow(config.network, config.preconditioning, str(folder), config.label_dropout)
    for name in ("sigma_data", "sigma_min", "sigma_max", "label_dim", "two_time"):
        stated, actual = getattr(config, name), getattr(flow, name)
        if stated != actual:
            raise Damaged(f"{folder / CONFIG} contradicts itself: {name} is {stated}, its network has {actual}")
    if flow.guided != (config.guidance is not None and config.guidance.range[0] < config.guidance.range[1]):
        reads = "reads a weight of guidance" if flow.guided else "reads no weight of guidance"
        raise Damaged(f"{folder / CONFIG} contradicts itself: its network {reads}, guidance says otherwise")
    for name in ("scale", "bias") if config.latent else ():
        count = len(config.encoder[name])
        if count != flow.img_channels:
            raise Damaged(
                f"{folder / CONFIG} contradicts itself: its encoder has a {name} for {counted(count, 'channel')}, its "
                f"network has {flow.img_channels}"
            )
    return flow


def _card(config: CheckpointConfig) -> str:
    """Returns the README.md of a checkpoint that is not published yet, with the Hub's header."""
    kinds = {"teacher": "a diffusion model", "generator": "a few-step generator", "auxiliary": "an auxiliary score"}
    provenance = config.provenance
    digest = f" (sha256 {code(provenance.sha256)})" if provenance.sha256 else ""
    guidance = f"Its teacher was guided {config.guidance.words}.\n" if config.guidance else ""
    vae = "".join(f" {word}" for word in vae_words(config.encoder))
    fields = {"library_name": "edmdistill", "pipeline_tag": "unconditional-image-generation"}
    return f"""{front_matter(fields | licence_fields(provenance.licence))}
This is {kinds[config.stage]} in edmdistill's TrigFlow format, from {markdown(provenance.source)}{digest}.
{licence_words(provenance.licence)}
{guidance}
    edmdistill sample PATH_OR_HUB_ID --seeds 0-15{vae} --out images/
"""
