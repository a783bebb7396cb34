"""OpenAI's ADM weights against a plain transcription of what their code computes with them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as f
from openai_weights import Weights, weights_of
from torch import Tensor

from edmdistill.checkpoints.class_names import dataset_class_names
from edmdistill.checkpoints.config import NetworkSpec, Provenance
from edmdistill.checkpoints.load import load_generator
from edmdistill.checkpoints.openai import PRECONDITIONING, RESOLUTIONS, UnknownNetwork, read_openai, to_adm
from edmdistill.checkpoints.published_generators import convert_generator
from edmdistill.checkpoints.store import build_flow, fill
from edmdistill.errors import CheckpointError
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.spec import SamplerSpec


def openai_denoiser(w: Weights, num_blocks: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """D(x, sigma, class numbers) as cm/unet.py and cm/karras_diffusion.py compute it, in the weights' precision."""

    def conv(name: str, x: Tensor) -> Tensor:
        return f.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def linear(name: str, x: Tensor) -> Tensor:
        return f.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return f.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    def residual(name: str, x: Tensor, emb: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        h = conv(f"{name}.in_layers.2", change(f.silu(norm(f"{name}.in_layers.0", x))))
        condition = linear(f"{name}.emb_layers.1", f.silu(emb))[:, :, None, None]
        if condition.shape[1] > h.shape[1]:
            scale, shift = condition.chunk(2, dim=1)
            h = f.silu(norm(f"{name}.out_layers.0", h) * (1 + scale) + shift)
        else:
            h = f.silu(norm(f"{name}.out_layers.0", h + condition))
        x = change(x)
        if f"{name}.skip_connection.weight" in w:
            x = conv(f"{name}.skip_connection", x)
        return x + conv(f"{name}.out_layers.3", h)

    def attention(name: str, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        q, k, v = conv(f"{name}.qkv", norm(f"{name}.norm", x)).reshape(B, 3, C // 64, 64, H * W).unbind(1)
        weight = torch.einsum("bhdq,bhdk->bhqk", q, k).div(8).softmax(-1)
        return x + conv(f"{name}.proj_out", torch.einsum("bhqk,bhdk->bhdq", weight, v).reshape(B, C, H, W))

    def sequence(name: str, x: Tensor, emb: Tensor, changes: list[Callable[[Tensor], Tensor]]) -> Tensor:
        for layer in range(3):
            if f"{name}.{layer}.qkv.weight" in w:
                x = attention(f"{name}.{layer}", x)
            elif f"{name}.{layer}.in_layers.0.weight" in w:
                x = residual(f"{name}.{layer}", x, emb, changes.pop(0))
        return x

    def same(x: Tensor) -> Tensor:
        return x

    def down(x: Tensor) -> Tensor:
        return f.avg_pool2d(x, 2)

    def up(x: Tensor) -> Tensor:
        return f.interpolate(x, scale_factor=2, mode="nearest")

    def count(stem: str) -> int:
        return len({name.split(".")[1] for name in w if name.startswith(stem)})

    def unet(x: Tensor, timesteps: Tensor, y: Tensor | None) -> Tensor:
        half = w["time_embed.0.weight"].shape[1] // 2
        freqs = (1e-4 ** (torch.arange(half) / half)).to(x.dtype)
        angle = timesteps[:, None] * freqs
        emb = torch.cat([angle.cos(), angle.sin()], dim=1)
        emb = linear("time_embed.2", f.silu(linear("time_embed.0", emb)))
        if y is not None:
            emb = emb + w["label_emb.weight"][y]
        x = conv("input_blocks.0.0", x)
        skips = [x]
        for at in range(1, count("input_blocks")):
            x = sequence(f"input_blocks.{at}", x, emb, [down if at % (num_blocks + 1) == 0 else same])
            skips.append(x)
        x = sequence("middle_block", x, emb, [same, same])
        for at in range(count("output_blocks")):
            x = sequence(f"output_blocks.{at}", torch.cat([x, skips.pop()], dim=1), emb, [same, up])
        return conv("out.2", f.silu(norm("out.0", x)))

    def denoise(x: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        s = sigma[:, None, None, None]
        variance = s**2 + 0.25
        raw = unet(x / variance.sqrt(), 1000 * 0.25 * sigma.log(), y)
        return s * 0.5 / variance.sqrt() * raw + 0.25 / variance * x

    return denoise


@pytest.mark.parametrize(
    ("mults", "num_blocks", "attending", "classes", "ch", "adaptive"),
    [((1, 2), 1, (1,), 10, 128, True), ((1, 2), 2, (0,), 0, 128, True), ((1, 2), 1, (1,), 0, 32, False)],
    ids=["cond", "uncond", "LSUN, narrow"],
)
def test_same_function(
    mults: tuple[int, ...], num_blocks: int, attending: tuple[int, ...], classes: int, ch: int, adaptive: bool
) -> None:
    weights = weights_of(mults, num_blocks, attending, classes, ch, adaptive=adaptive)
    arguments, tensors = to_adm(weights, resolution=4)
    assert (arguments["label_dim"], arguments["adaptive_scale"]) == (classes, adaptive)
    assert arguments["attn_resolutions"] == [4 >> level for level in attending]
    flow = build_flow(NetworkSpec("adm", arguments), PRECONDITIONING, "weights")
    fill(flow.network, tensors, "weights")
    flow.double().eval()
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64) * (sigma**2 + 0.25).sqrt()[:, None, None, None]
    labels = torch.tensor([0, 3, 9]) if classes else None
    with torch.no_grad():
        expected = openai_denoiser({name: w.double() for name, w in weights.items()}, num_blocks)(x, sigma, labels)
        found = Denoiser(flow)(x, sigma, labels)
    error = (found - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))
    assert error.max() < 1e-13


def test_the_published_network() -> None:
    arguments, tensors = to_adm(weights_of((1, 2, 3, 4), 3, (1, 2, 3), classes=1000, ch=192, device="meta"))
    assert arguments == {
        "img_resolution": 64,
        "in_channels": 3,
        "out_channels": 3,
        "label_dim": 1000,
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
        "adaptive_scale": True,
        "group_channels": 1,
    }
    network = build_flow(NetworkSpec("adm", arguments), PRECONDITIONING, "weights").network
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes == {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert sum(tensor.numel() for tensor in network.parameters()) == 295_899_267  # as theirs


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_are_gray_or_of_three_colors(channels: int) -> None:
    """The statistics of latents are not known."""
    weights = weights_of((1,), attending=(), ch=64)
    weights["input_blocks.0.0.weight"] = torch.zeros(64, channels, 3, 3)
    weights |= {"out.2.weight": torch.zeros(channels, 64, 3, 3), "out.2.bias": torch.zeros(channels)}
    if channels in (1, 3):
        arguments, _ = to_adm(weights, resolution=4)
        assert (arguments["in_channels"], arguments["out_channels"]) == (channels, channels)
    else:
        with pytest.raises(UnknownNetwork, match=f"takes {channels} channels and gives {channels}"):
            to_adm(weights, resolution=4)


def test_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision, and saved under DistributedDataParallel, as some of theirs are."""
    monkeypatch.setitem(RESOLUTIONS, (1,), 4)
    path = tmp_path / "edm_imagenet64_ema.pt"
    weights = {name: tensor.half() for name, tensor in weights_of((1,), attending=(), classes=1000).items()}
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, path)
    flow, config = read_openai(path, "0" * 64)
    assert torch.equal(flow.network.map_layer0.weight, weights["time_embed.0.weight"].float())
    assert torch.equal(flow.network.map_label.weight, weights["label_emb.weight"].t().float())
    assert {tensor.dtype for tensor in flow.network.state_dict().values()} == {torch.float32}
    assert config.c_noise == "250 ln(sigma)"
    assert config.label_names == dataset_class_names("imagenet")
    assert config.provenance == Provenance(source=path.name, sha256="0" * 64, licence="mit")
    torch.save(weights | {"module.time_embed.0.bias": weights["time_embed.0.bias"]}, path)  # twice
    with pytest.raises(CheckpointError, match=r"holds no plain dict of tensors \(two have the same name"):
        read_openai(path, "")
    weights["out.0.bias"][3] = torch.nan
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match=r"holds NaN or infinity in out_norm\.bias, at 1 of 128 numbers"):
        read_openai(path, "")


def test_other_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    weights = weights_of(device="meta")
    with pytest.raises(UnknownNetwork, match="image size is not known"):
        to_adm(weights)
    extra = weights | {"time_embed_s.0.weight": torch.zeros(1)}  # CTM's students have a second time
    with pytest.raises(UnknownNetwork, match=r"holds time_embed_s\.0\.weight"):
        to_adm(extra, resolution=4)
    path = tmp_path / "edm.pt"
    path = tmp_path / "cd_imagenet64_l2.pt"
    torch.save({}, path)
    with pytest.raises(CheckpointError, match="by its name a consistency model"):
        read_openai(path, "")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, pytest.raises], ids=["list", "no tensors", "code"])
def test_other_files_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "x.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
        read_openai(path, "")


@torch.no_grad()
def test_consistency_models_of_the_same_kind_have_their_boundary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their first step, from sigma 80, by cm/karras_diffusion.py: the network's output under other coefficients."""
    monkeypatch.setitem(RESOLUTIONS, (1, 2), 8)
    weights = weights_of()
    torch.save(weights, tmp_path / "cd_imagenet64_lpips.pt")
    with pytest.raises(CheckpointError, match="one-step generator and not a teacher"):
        read_openai(tmp_path / "cd_imagenet64_lpips.pt", "")
    convert_generator(tmp_path / "cd_imagenet64_lpips.pt", tmp_path / "cd", "consistency-model")
    generator = load_generator(tmp_path / "cd")
    assert generator.config.provenance.licence == "mit"
    assert generator.flow.sigma_min == 0.002
    noise, labels, sigma = torch.randn(2, 3, 8, 8), torch.tensor([1, 7]), torch.tensor(80.0)
    x = 80 * noise
    teacher = openai_denoiser(weights, 1)(x, sigma.expand(2), labels)
    F = (teacher - x * 0.25 / (6400 + 0.25)) / (40 / (6400 + 0.25) ** 0.5)
    expected = x * 0.25 / ((80 - 0.002) ** 2 + 0.25) + (80 - 0.002) * 0.5 / (6400 + 0.25) ** 0.5 * F
    sampler = build_sampler(generator, SamplerSpec(nfe=1))
    torch.testing.assert_close(sampler.draw(noise, labels, randn_like=torch.randn_like), expected, rtol=1e-3, atol=1e-4)
