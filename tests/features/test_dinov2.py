"""DINOv2 against what facebookresearch/dinov2 computes on the same tiny weights, under both input rules."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_files import EVALUATION, TINY_DINOV2, save_pth, sizes
from PIL import Image
from safetensors.torch import load_file, save_file

from edmdistill import load_features
from edmdistill.atomic import sha256_file
from edmdistill.errors import CheckpointError, DatasetError, EdmDistillError
from edmdistill.features.dinov2 import Mlp, VisionTransformer

GOLDEN = load_file(EVALUATION / "dinov2" / "expected.safetensors")
TENSORS = torch.load(TINY_DINOV2, weights_only=True)


@pytest.mark.parametrize("size", sizes(GOLDEN))
@pytest.mark.parametrize(("name", "case"), [("dinov2", "torch"), ("dinov2-dgm", "pil")])
def test_both_rules_give_the_official_features(name: str, case: str, size: str):
    space = load_features(name, TINY_DINOV2)
    images, expected = GOLDEN[f"u8.{size}"], GOLDEN[f"{case}.{size}"]
    features, logits = space.features_and_logits(images)
    assert logits is None
    assert (space.dim, space.official, features.dtype) == (48, False, torch.float32)
    assert float((features - expected).abs().max() / expected.abs().max()) < 1e-5
    torch.testing.assert_close(space(images[:1]), features[:1], rtol=0, atol=1e-5)


def test_the_rules_differ():
    images = GOLDEN["u8.32"]
    one, other = (load_features(name, TINY_DINOV2)(images) for name in ("dinov2", "dinov2-dgm"))
    assert (one - other).abs().max() > 1e-5


LAYER = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}


def transformers_tensors() -> dict[str, torch.Tensor]:
    """Returns the weights by the names of transformers' Dinov2Model."""
    found = {}
    for name, tensor in TENSORS.items():
        if name.startswith("blocks."):
            theirs = name.replace("blocks.", "encoder.layer.")
            for ours, their_part in LAYER.items():
                theirs = theirs.replace(ours, their_part)
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            split = {theirs.replace("attn.qkv", f"attention.attention.{part}"): rows for part, rows in parts}
            found |= split if ".attn.qkv." in name else {theirs: tensor}
        else:
            start = next(start for start in OUTSIDE if name.startswith(start))
            found[OUTSIDE[start] + name.removeprefix(start)] = tensor
    return found


def test_a_folder_of_transformers_gives_the_same_features(tmp_path: Path):
    save_file({name: tensor.clone() for name, tensor in transformers_tensors().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2", "num_attention_heads": 3}))
    space = load_features("dinov2", tmp_path)
    assert space.sha256 == sha256_file(tmp_path / "model.safetensors")
    images = GOLDEN["u8.32"]
    torch.testing.assert_close(space(images), load_features("dinov2", TINY_DINOV2)(images), rtol=0, atol=1e-6)


def test_large_images_are_resized_as_pil_does_it():
    """With antialiasing: by one rule in floating point, by the other in bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (500, 300), dtype=np.uint8)
    images = torch.from_numpy(pixels)[None, None].expand(1, 3, -1, -1)
    exact = np.asarray(Image.fromarray(pixels.astype(np.float32)).resize((224, 224), Image.Resampling.BICUBIC))
    floats, rounded = (load_features(name, TINY_DINOV2).resize(images)[0] for name in ("dinov2", "dinov2-dgm"))
    for channel in range(3):
        np.testing.assert_allclose(floats[channel], exact, atol=0.01)
        assert np.abs(np.asarray(rounded[channel]) - exact.clip(0, 255)).mean() < 0.5  # rounded in both directions
    assert torch.equal(rounded, rounded.round())


@pytest.mark.parametrize("name", ["dinov2", "dinov2-dgm"])
def test_what_are_no_images_are_refused(name: str):
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 8, 8, dtype=torch.uint8)):
        with pytest.raises(DatasetError, match=f"the feature space {name} takes "):
            load_features(name, TINY_DINOV2)(images)


def test_the_layers_are_those_of_the_official_network():
    """In closed form, where rounding and the tiny network's small numbers hide nothing: an exact GELU, and eps 1e-6."""
    x = torch.linspace(-4, 4, 12, dtype=torch.float64).reshape(1, 4, 3)
    mlp = Mlp(3, 3).double()
    mlp.load_state_dict({f"fc{i}.{part}": one for i in (1, 2)
                         for part, one in (("weight", torch.eye(3)), ("bias", torch.zeros(3)))})  # fmt: skip
    torch.testing.assert_close(mlp(x), x * (1 + (x / 2**0.5).erf()) / 2, rtol=1e-12, atol=1e-12)
    network = VisionTransformer(width=16, depth=1, heads=1, hidden=4, patch=112, positions=2).double()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.LayerNorm)]
    small = 1e-3 * torch.tensor([-1.0, 1.0] * 8, dtype=torch.float64)
    assert [float(norm(small).detach().abs().max()) for norm in norms] == pytest.approx([0.5**0.5] * 3)


def test_the_file_may_state_the_number_of_heads(tmp_path: Path):
    for stated, made in (("6", 6), (None, 3)):
        save_file(TENSORS, tmp_path / "w.safetensors", None if stated is None else {"num_heads": stated})
        assert load_features("dinov2", tmp_path / "w.safetensors")._net.blocks[0].attn.heads == made
    save_file(TENSORS, tmp_path / "w.safetensors", {"num_heads": "5"})  # which do not share 48 channels evenly
    with pytest.raises(CheckpointError, match="does not hold the weights of a DINOv2"):
        load_features("dinov2", tmp_path / "w.safetensors")


def test_it_does_not_classify():
    with pytest.raises(EdmDistillError, match="dinov2 does not classify"):
        load_features("dinov2", TINY_DINOV2).logits(GOLDEN["u8.32"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cls_token": None}, "lacks cls_token"),
        ({"patch_embed.proj.weight": None}, "does not hold the weights of a DINOv2"),
        ({"pos_embed": torch.ones(1, 7, 48)}, "holds pos_embed in shape"),
        ({"register_tokens": torch.ones(1, 4, 48)}, "holds register_tokens, for which its network has no place"),
        ({"norm.bias": torch.full((48,), torch.nan)}, "holds NaN or infinity in norm.bias"),
        ({"blocks.999999.norm1.bias": torch.ones(48)}, "does not hold the weights of a DINOv2"),
        ({"blocks.100.norm1.bias": torch.ones(48)}, "does not hold the weights of a DINOv2"),
        ({"blocks.99.norm1.bias": torch.ones(48)}, "lacks blocks"),
        ({"blocks.x.norm1.bias": torch.ones(48)}, "does not hold the weights of a DINOv2"),
        ({"patch_embed.proj.weight": torch.ones(48, 3, 15, 15)}, "does not hold the weights of a DINOv2"),
    ],
)
def test_other_weights_are_refused_in_one_sentence(
    change: dict[str, torch.Tensor | None], sentence: str, tmp_path: Path
):
    tensors = {name: tensor for name, tensor in (TENSORS | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=sentence) as refused:
        load_features("dinov2", save_pth(tmp_path / "w.pth", tensors))
    assert "\n" not in str(refused.value)
