"""Networks from whatever a user names: a checkpoint, a run directory, one of its states, or an official file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from msgspec.structs import replace

from edmdistill.arguments import checked
from edmdistill.checkpoints.config import CheckpointConfig, read_config
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.layout import CONFIG, checkpoint_in, images_of, is_state
from edmdistill.checkpoints.official import load_official, outline_official
from edmdistill.checkpoints.run_state import newest_whole_state, raw_weights
from edmdistill.checkpoints.source import Source, open_source
from edmdistill.checkpoints.store import build_meta, fill, load_checkpoint
from edmdistill.errors import CheckpointError, counted
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import NoisePrediction
from edmdistill.networks.surgery.two_time import drop_second_time
from edmdistill.progress import write
from edmdistill.transfer import is_gpu, require_device

Weights = Literal["ema", "raw"]
Dtype = torch.dtype | Literal["auto"] | None
IN_INTERVALS = ("scd", "sct")
"""The methods whose option `intervals` trains for certain steps alone."""
DTYPES = (None, torch.float32, torch.float64, torch.bfloat16, torch.float16, "auto")


@checked
def load_model(
    source: str | Path | Source,
    device: torch.device | str = "cpu",
    dtype: Dtype = None,
    weights: Weights = "ema",
) -> Denoiser | Generator:
    """Returns a network for sampling: a generator if the checkpoint holds one, else a denoiser.

    EDM2's weights are folded, and half precision rounds others: to train or save a network, read it by `load_flow`.

    Args:
        source: a checkpoint of ours (folder or Hub id), a run directory, a run's state RUN/state/IMAGES, an official
            pickle or OpenAI's .pt.
        weights: of a run directory: ema, the average that the run publishes, or raw, the weights in its newest state;
            a state has only raw ones.
        dtype: of the arithmetic: float16 and bfloat16 inside the network only, where the weights of convolutions are
            kept so; float64 throughout; default: float32. auto: float16 on a GPU for networks whose official code
            computes them so (EDM's `use_fp16`), and what was distilled from them, but not where they predict the noise;
            else float32.
    Raises: CheckpointError: it cannot be read.  HubError: the Hub refuses.
    """
    if dtype not in DTYPES:
        names = ", ".join(str(each) for each in DTYPES if each is not None)
        raise CheckpointError(f"a network cannot compute in {dtype}: choose one of {names}")
    require_device(device)
    flow, config = load_flow(source, weights, mapped=False)  # folding changes them all
    if dtype == "auto":
        exact = not config.use_fp16 or isinstance(flow.preconditioning, NoisePrediction)
        dtype = torch.float16 if is_gpu(torch.device(device)) and not exact else None
    if dtype == torch.float64:
        flow.double()
    elif dtype is not None:
        flow.compute_dtype = dtype
    flow = flow.to(device).requires_grad_(False)
    half = flow.activation_dtype in (torch.float16, torch.bfloat16)
    flow.network.fold(sample=not half)
    if half:
        flow.network.store_convolutions(flow.activation_dtype)
    if config.stage == "generator":
        return Generator(flow, config).eval()
    teacher = Denoiser(flow)
    teacher.label_names, teacher.encoder, teacher.images_seen = config.label_names, config.encoder, config.images_seen
    return teacher.eval()


@checked
def load_denoiser(source: str | Path | Source, device: torch.device | str = "cpu", dtype: Dtype = None) -> Denoiser:
    """Returns a teacher in EDM's view; see `load_model`.  Raises: CheckpointError: it is a generator or unreadable."""
    model = load_model(source, device, dtype)
    if not isinstance(model, Denoiser):
        raise CheckpointError(f"{source} is a generator, not a teacher: give the teacher that it was distilled from")
    return model


@checked
def load_generator(source: str | Path | Source, device: torch.device | str = "cpu", dtype: Dtype = None) -> Generator:
    """Returns a few-step generator; see `load_model`.  Raises: CheckpointError: it is a teacher or unreadable."""
    model = load_model(source, device, dtype)
    if not isinstance(model, Generator):
        raise CheckpointError(f"{source} is a teacher, not a generator: distill it with `edmdistill train`")
    return model


def read_teacher(source: str | Path | Source) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns a teacher and its configuration, whose provenance names the teacher as parent.

    Args:
        source: as load_model's.
    Raises: CheckpointError: it is a generator, or cannot be read.  HubError: the Hub refuses.
    """
    source = open_source(source)
    flow, config = _read(source, "ema")
    if config.stage != "teacher":
        raise CheckpointError(f"{source} is a {config.stage}, made by {config.method}: give its teacher")
    return flow, replace(config, provenance=replace(config.provenance, parent=source.sha256))


def read_first_stage(
    source: str | Path | Source, methods: tuple[str, ...], of_steps: bool = False
) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns a generator that another training goes on from, and its configuration, as read_teacher does.

    Args:
        source: as load_model's.
        methods: those by which it may have been trained; with "diffusion", it may be a teacher, too.
        of_steps: whether it may be for certain steps alone.
    Raises: CheckpointError: it is a teacher, by another method, guided, for certain steps alone, or unreadable.
        HubError: the Hub refuses.
    """
    source = open_source(source)
    flow, config = _read(source, "ema")
    is_teacher = config.stage == "teacher" and "diffusion" in methods
    if not is_teacher and (config.stage != "generator" or config.method not in methods):
        described = f"a generator of {config.method}" if config.stage == "generator" else f"a {config.stage}"
        known = " or ".join(filter(None, [", ".join(methods[:-1]), methods[-1]]))
        raise CheckpointError(f"{source} is {described}, not a first stage: train one by {known}")
    if config.trained_sigmas and not of_steps:
        advice = "train it with --set method.intervals=1" if config.method in IN_INTERVALS else "give one that does"
        raise CheckpointError(
            f"{source} was trained for {counted(len(config.trained_sigmas), 'step')} and does not jump from every "
            f"noise level to data, as a first stage must: {advice}"
        )
    if flow.guided:
        raise CheckpointError(
            f"{source} reads a weight of guidance, which a second stage cannot: train it with "
            "--set 'method.guidance=[1,1]', or another single weight"
        )
    return flow, replace(config, provenance=replace(config.provenance, parent=source.sha256))


@checked
def load_flow(
    source: str | Path | Source, weights: Weights = "ema", mapped: bool = True
) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns the network of a checkpoint, in float32 on the CPU, and its configuration.

    The second time of teachers and auxiliary scores is dropped; a generator has one only if its jumps read it.

    Args:
        source, weights: as load_model's.
        mapped: whether the weights of a checkpoint of ours stay in its file; see `load_tensors`.
    Raises: CheckpointError: it cannot be read.  HubError: the Hub refuses.
    """
    flow, config = _read(open_source(source), weights, mapped)
    drop = config.stage != "generator" and flow.two_time
    return drop_second_time(flow, share=True) if drop else flow, config


def _read(source: Source, weights: Weights, mapped: bool = True) -> tuple[FlowNetwork, CheckpointConfig]:
    if weights == "raw" or is_state(source.path):
        return _read_raw(source.path, mapped)
    if source.path.is_dir():
        return load_checkpoint(checkpoint_in(source.path), mapped=mapped)
    return load_official(source)


def _read_raw(path: Path, mapped: bool) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns the network being trained, from a run's newest whole state or from the given state."""
    state = newest_whole_state(path, write)
    config = _config_of_state(state)
    flow = build_meta(config, _generator_beside(state))
    role = "teacher" if config.stage == "teacher" else "generator"
    fill(flow.network, raw_weights(state, role, mapped), str(state))
    return flow, config


def _config_of_state(state: Path) -> CheckpointConfig:
    """Returns the configuration of the raw weights in a saved state, which is named by the images that it has seen."""
    config = read_config(_generator_beside(state))
    return replace(config, images_seen=images_of(state), ema=None, results=())


def _generator_beside(state: Path) -> Path:
    return state.absolute().parent.parent / "generator"


def outline(source: str | Path | Source) -> FlowNetwork:
    """Returns the network of a checkpoint on the meta device: its shapes, without reading its weights.

    Args:
        source: as load_model's.
    Raises: CheckpointError: it cannot be read.  HubError: the Hub refuses.
    """
    source = open_source(source)
    if source.path.is_dir():
        folder = checkpoint_in(source.path)
        return build_meta(read_config(folder), folder)
    return load_official(source)[0].to("meta") if source.is_archive else outline_official(source.official)


def find_config(source: str | Path | Source) -> CheckpointConfig | None:
    """Returns the configuration of a checkpoint of ours, a run directory or a state; None for anything else.

    A state that was renamed is something else.
    """
    path = open_source(source).path
    if is_state(path):
        return None if images_of(path) is None else _config_of_state(path)
    folder = checkpoint_in(path)
    return read_config(folder) if (folder / CONFIG).is_file() else None


def weights_digest(source: str | Path | Source, model: Generator | Denoiser, weights: Weights = "ema") -> str:
    """Returns the sha256 of the file from which a model was loaded; for raw weights, of its tensors."""
    source = open_source(source)
    if weights == "ema" and not is_state(source.path):
        return source.sha256
    return tensors_digest(model)


def tensors_digest(model: Generator | Denoiser) -> str:
    """Returns the sha256 of the names and values of a model's weights, folded and rounded as it keeps them."""
    digest = hashlib.sha256()
    for name, tensor in model.flow.state_dict().items():
        digest.update(name.encode() + tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()
