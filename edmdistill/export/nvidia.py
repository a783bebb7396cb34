"""Exports to NVIDIA's scripts: the weights by the official names, and the arguments of the class; no code, no pickle.

Source: training/networks.py and training/networks_edm2.py of the official repositories.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.checkpoints.encoder import latent_encoder
from edmdistill.checkpoints.nvidia import OfficialCheckpoint
from edmdistill.checkpoints.official import NETWORK_CLASSES, OUR_ARGUMENTS, build_official
from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.errors import EdmDistillError
from edmdistill.export.one_step import MORE_STEPS, OneStep
from edmdistill.export.parity import Parity, compare, step_sampler
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM, IDDPM
from edmdistill.networks.surgery.rebuild import add_logvar

WEIGHTS, NETWORK = "model.safetensors", "network.json"
CLASSES = {
    "edm": ("EDMPrecond", ("sigma_min", "sigma_max", "sigma_data")),
    "vp": ("VPPrecond", ("beta_d", "beta_min", "M", "epsilon_t")),
    "ve": ("VEPrecond", ("sigma_min", "sigma_max")),
    "iddpm": ("iDDPMPrecond", ("C_1", "C_2", "M")),
}
"""The preconditioning class of DDPM++, NCSN++ and ADM, and those of our parameters that it takes."""
THEIRS = {
    **dict.fromkeys(("double_norm", "guided", "positional_time", "two_time"), False),
    "adaptive_scale": True,
    "group_channels": 4,
}
"""The values of our arguments that change the network and that NVIDIA's classes do not have."""


def official(flow: FlowNetwork, config: CheckpointConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the arguments of NVIDIA's construct_class_by_name, and the state dict of the network that it makes.

    Args:
        flow: not folded.
    Raises: EdmDistillError: NVIDIA's classes cannot express the network.
    """
    pre = flow.preconditioning
    kind = str(config.preconditioning["kind"])
    ours = OUR_ARGUMENTS[config.network.kind]
    given = flow.network.arguments
    arguments = {name: value for name, value in given.items() if name not in ours} | {"use_fp16": config.use_fp16}
    if strange := [f"{name}={given[name]}" for name, theirs in THEIRS.items() if given.get(name, theirs) != theirs]:
        raise EdmDistillError(f"NVIDIA's classes have no {strange[0]}, which this network has: choose another --to")
    if kind not in CLASSES:
        raise EdmDistillError(
            f"NVIDIA's classes have no preconditioning of the kind {kind}, which this network has: choose another --to"
        )
    if isinstance(pre, EDM) and (pre.c_noise_scale != EDM.c_noise_scale or pre.reads_time):
        raise EdmDistillError(
            f"NVIDIA's classes read ln(sigma)/4 as the noise level, but this network reads {config.c_noise}: "
            "choose another --to"
        )
    if config.network.kind == "edm2":
        flow = add_logvar(flow, 0)  # their class always has exactly one head
        arguments |= {"logvar_channels": flow.network.arguments["logvar_channels"], "sigma_data": pre.sigma_data}
        state = flow.network.state_dict()
        state["logvar_linear.weight"] = state["logvar_linear.weight"][:1]
        tensors = {name if name.startswith("logvar_") else f"unet.{name}": state[name] for name in state}
        return {"class_name": "training.networks_edm2.Precond", **arguments}, tensors
    name, numbers = CLASSES[kind]
    channels = arguments.pop("in_channels")
    if arguments.pop("out_channels") != channels * (1 + isinstance(pre, IDDPM)):
        raise EdmDistillError(f"NVIDIA's {name} has no networks with other output channels: choose another --to")
    network = next(name for name, (ours, _) in NETWORK_CLASSES.items() if ours == config.network.kind)
    arguments = {
        "class_name": f"training.networks.{name}",
        "model_type": network,
        "img_channels": channels,
        **{number: getattr(pre, number) for number in numbers},
        **arguments,
    }
    state = flow.network.state_dict()
    tensors = {f"model.{name}": state[name] for name in state if not name.startswith("logvar_")}
    return arguments, ({"u": pre.levels} if isinstance(pre, IDDPM) else {}) | tensors


def read(folder: Path) -> FlowNetwork:
    """Returns the network in such a folder, by our reader of official checkpoints."""
    arguments = json.loads((folder / NETWORK).read_text(encoding="utf-8"))
    class_name = arguments.pop("class_name").rpartition(".")[2]
    numbers = {name for _, names in CLASSES.values() for name in names} | {"logvar_channels"}
    outer = numbers | {"model_type", "img_channels", "use_fp16"}
    inner = {name: value for name, value in arguments.items() if name not in outer}
    if class_name == "Precond":
        inner["img_channels"] = arguments["img_channels"]
    else:
        channels = arguments["img_channels"]
        inner |= {"in_channels": channels, "out_channels": channels * (1 + (class_name == "iDDPMPrecond"))}
    checkpoint = OfficialCheckpoint(
        path=folder,
        sha256="",
        preconditioning_class=class_name,
        network_class=arguments.get("model_type", "UNet"),
        arguments=arguments,
        network_arguments=inner,
        attributes={},
        stored={},
        buffers=frozenset(),
        encoder=None,
        loss=None,
        augment=None,
        dataset=None,
    )
    return build_official(checkpoint, tensors=load_tensors(folder / WEIGHTS)[0])[0].eval()


def readme(flow: FlowNetwork, config: CheckpointConfig) -> str:
    latent = {name: config.encoder[name] for name in ("vae_name", "raw_mean", "raw_std") if name in config.encoder}
    encoder, entry = "", ""
    latents = latent_encoder(config.encoder)
    if latents is not None and latents.range == "scm":
        raise EdmDistillError(
            "NVIDIA's encoder has pixels in [0, 1], and this network's VAE has them in [-1, 1], so their scripts "
            "would decode its latents wrongly: choose another --to"
        )
    if latents is not None:
        arguments = "".join(f", {name}={value!r}" for name, value in latent.items())
        encoder = f"""\
    encoder = dnnlib.util.construct_class_by_name(class_name="training.encoders.StabilityVAEEncoder"{arguments})
"""
        entry = ', "encoder": encoder'
    use = ""
    if config.stage == "generator":
        labels = f", torch.eye({flow.label_dim})[classes]" if flow.label_dim else ""
        use = f"""
A generator is called once for each of its few noise levels, not along the ODE that their samplers walk:

    x0 = net({flow.sigma_max} * noise, torch.tensor({flow.sigma_max}){labels})

{MORE_STEPS}"""
    return f"""\
`model.safetensors` holds the weights by the official names, `network.json` the class and its arguments; neither holds
code. In a checkout of NVIDIA's {"edm2" if config.network.kind == "edm2" else "edm"}, this makes the network pickle that
its scripts take:

    import json, pickle, torch, dnnlib, safetensors.torch
    net = dnnlib.util.construct_class_by_name(**json.load(open("network.json")))
    net.load_state_dict(safetensors.torch.load_file("model.safetensors"))
{encoder}\
    with open("network.pkl", "wb") as file:
        pickle.dump({{"ema": net.eval().requires_grad_(False){entry}}}, file)
{use}"""


def write(folder: Path, flow: FlowNetwork, config: CheckpointConfig) -> tuple[Parity, ...]:
    """Writes WEIGHTS and NETWORK, and reads them as an official checkpoint is read."""
    arguments, tensors = official(flow, config)
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / NETWORK).write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
    reloaded = read(folder).requires_grad_(False)
    step = OneStep(reloaded.network, reloaded.preconditioning).eval()
    return compare(flow, config, step_sampler(flow, config, step))
