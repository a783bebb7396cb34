"""Random weights in the layout of OpenAI's ADM files, and of CTM's."""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def weights_of(
    mults: tuple[int, ...] = (1, 2),
    num_blocks: int = 1,
    attending: tuple[int, ...] = (1,),
    classes: int = 10,
    ch: int = 128,
    device: str = "cpu",
    two_time: bool = False,
    adaptive: bool = True,
) -> Weights:
    """Random weights by OpenAI's names, with two_time by CTM's.

    Args:
        attending: levels with attention.
        adaptive: whether the embedding scales and shifts; otherwise it is added, as in the networks for LSUN.
    """
    rng = torch.Generator().manual_seed(0) if device == "cpu" else None
    w: Weights = {}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    def layer(name: str, cout: int, cin: int, *kernel: int) -> None:
        w[f"{name}.weight"] = normal(cout, cin, *kernel) / math.sqrt(cin * math.prod(kernel))
        w[f"{name}.bias"] = normal(cout) * 0.1

    def norm(name: str, channels: int) -> None:
        w[f"{name}.weight"] = 1 + normal(channels) * 0.1
        w[f"{name}.bias"] = normal(channels) * 0.1

    def residual(name: str, cin: int, cout: int) -> None:
        norm(f"{name}.in_layers.0", cin)
        layer(f"{name}.in_layers.2", cout, cin, 3, 3)
        layer(f"{name}.emb_layers.1", cout * (2 if adaptive else 1), 4 * ch)
        if two_time:
            layer(f"{name}.emb_layers_s.1", 2 * cout, 4 * ch)
        norm(f"{name}.out_layers.0", cout)
        layer(f"{name}.out_layers.3", cout, cout, 3, 3)
        if cin != cout:
            layer(f"{name}.skip_connection", cout, cin, 1, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        layer(f"{name}.qkv", 3 * channels, channels, 1, 1)
        layer(f"{name}.proj_out", channels, channels, 1, 1)

    layer("time_embed.0", 4 * ch, ch)
    layer("time_embed.2", 4 * ch, 4 * ch)
    if two_time:
        layer("time_embed_s.0", 4 * ch, ch)
        layer("time_embed_s.2", 4 * ch, 4 * ch)
    if classes:
        w["label_emb.weight"] = normal(classes, 4 * ch)
    layer("input_blocks.0.0", ch, 3, 3, 3)
    skips, cout, at = [ch], ch, 1
    for level, mult in enumerate(mults):
        if level:
            residual(f"input_blocks.{at}.0", cout, cout)
            skips.append(cout)
            at += 1
        for _ in range(num_blocks):
            residual(f"input_blocks.{at}.0", cout, ch * mult)
            cout = ch * mult
            if level in attending:
                attention(f"input_blocks.{at}.1", cout)
            skips.append(cout)
            at += 1
    residual("middle_block.0", cout, cout)
    attention("middle_block.1", cout)
    residual("middle_block.2", cout, cout)
    at = 0
    for level, mult in reversed(list(enumerate(mults))):
        for i in range(num_blocks + 1):
            residual(f"output_blocks.{at}.0", cout + skips.pop(), ch * mult)
            cout = ch * mult
            if level in attending:
                attention(f"output_blocks.{at}.1", cout)
            if level and i == num_blocks:
                residual(f"output_blocks.{at}.{1 + (level in attending)}", cout, cout)
            at += 1
    norm("out.0", cout)
    layer("out.2", 3, cout, 3, 3)
    return w
