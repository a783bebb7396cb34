"""Images of an evaluation: their parts, seeds and classes, and what a block takes of a GPU's memory."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edmdistill.errors import DatasetError
from edmdistill.evaluation.images import Images, _drawn, _sampler, block_size, is_images, open_images
from edmdistill.networks import new_network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.published import PUBLISHED
from edmdistill.planning.ledger import Ledger, fused_attention

ADM_256 = "adm", (256, 3, 1000), {"model_channels": 256, "channel_mult": [1, 1, 2, 2, 4, 4], "num_blocks": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "picture", "half", "single"),
    [
        (PUBLISHED["ddpmpp-cifar10"], 32, 0.7, 1.4),
        (PUBLISHED["adm-imagenet64"], 64, 0.7, 1.4),
        (PUBLISHED["edm2-img64-xl"], 64, 1.3, 2.5),
        (PUBLISHED["edm2-img512-xxl"], 512, 0.7, 0.9),
        (ADM_256, 256, 2.4, 4.8),
    ],
    ids=["ddpmpp", "adm-64", "edm2-64", "edm2-512", "adm-256"],
)
def test_a_block_takes_the_memory_that_docs_state(network, picture: int, half: float, single: float) -> None:
    """In GB, in float16 and float32, of one pass, beside the weights."""
    kind, (side, channels, classes), arguments = network
    with torch.device("meta"), torch.no_grad(), fused_attention():
        flow = FlowNetwork(new_network(kind, side, channels, classes, **arguments), EDM()).eval().requires_grad_(False)
        x, labels = torch.empty(block_size(picture), channels, side, side), torch.empty(block_size(picture), classes)
        for dtype, expected in ((torch.float16, half), (torch.float32, single)):
            flow.compute_dtype = dtype
            with Ledger() as ledger:
                flow(x, torch.empty(len(x)), labels if classes else None)
            assert max(ledger.live) / 1e9 == pytest.approx(expected, abs=0.06)


def test_a_part_of_a_part_has_its_own_rows() -> None:
    rows = torch.arange(20, dtype=torch.uint8).reshape(20, 1, 1, 1)
    whole = Images(
        20, (1, 1, 1), lambda piece: rows[piece.start : piece.stop], torch.arange(20), range(100, 120), "given"
    )
    part = whole.part(range(3, 15)).part(range(2, 6))
    assert part.count == 4
    assert part.read(range(1, 3)).flatten().tolist() == [6, 7]
    assert part.classes is not None
    assert part.classes.tolist() == [5, 6, 7, 8]
    assert list(part.seeds or ()) == [105, 106, 107, 108]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, True) for name in ("a.NPZ", "a.npy", "a.zip", "a.tar.gz", "a.tgz", "a.png", "a.WebP", "plain/")),
        *((name, False) for name in ("a.pkl", "a.safetensors", "me/generator", "digits")),
        *((f"folder/{name}", False) for name in ("config.json", "recipe.toml", "progress.json")),
    ],
)
def test_what_are_images_and_what_a_network(
    name: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is a checkpoint, a run or a state by the file in it, whatever its own name."""
    monkeypatch.chdir(tmp_path)
    folder, _, file = name.rpartition("/")
    if folder in ("plain", "folder"):
        Path(folder).mkdir()
    if folder == "folder":
        (Path(folder) / file).touch()
        name = folder
        with pytest.raises(DatasetError, match=r"^folder holds no images; of a network, give what load_generator or"):
            open_images(folder, 0)
    assert is_images(name) == expected


def label_source(path: Path, seeds: object, labels: object, label_dim: int = 10) -> str:
    count = len(labels if labels is not None else seeds)  # type: ignore[arg-type]
    arrays = {"images": np.zeros((count, 2, 2, 1), np.uint8), "seeds": seeds, "labels": labels}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})  # type: ignore[arg-type]
    return open_images(path, label_dim).label_source


def test_how_classes_were_chosen_is_read_off_them(tmp_path: Path) -> None:
    file, seeds = tmp_path / "a.npz", np.arange(300) * 7
    drawn = torch.cat([_drawn(seeds[at : at + 100].tolist(), 10, (1, 2, 2)) for at in range(0, 300, 100)]).numpy()
    almost = drawn.copy()
    almost[-1] = (almost[-1] + 1) % 10
    assert label_source(file, seeds, seeds % 10) == "balanced"
    assert label_source(file, seeds, seeds % 10, label_dim=0) == "balanced", "of as many as there are"
    assert label_source(file, seeds, drawn) == "drawn"
    assert label_source(file, seeds, almost) == "given"
    assert label_source(file, None, drawn) == "given"
    assert label_source(file, seeds, None) == "unknown"
    assert label_source(file, np.array([0, 1, 13]), np.array([0, 1, 3])) == "balanced", "of ten, not of four"


def test_images_in_memory_are_bytes() -> None:
    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    found = open_images(pixels, 0)
    assert (found.count, found.size, found.classes, found.seeds) == (5, (3, 4, 4), None, None)
    assert torch.equal(found.read(range(2, 4)), pixels[2:4])
    for wrong in (pixels.float(), pixels[0]):
        with pytest.raises(DatasetError, match=r"images to be measured are uint8 \[N,C,H,W\], but these are torch\."):
            open_images(wrong, 0)


def test_a_file_is_another_when_it_is_written_again(tmp_path: Path) -> None:
    file, other = tmp_path / "a.npz", tmp_path / "b.npz"
    seen = set()
    for path, count in ((file, 2), (file, 3), (other, 3)):
        np.savez(path, images=np.zeros((count, 2, 4, 3), np.uint8))
        os.utime(path, (0, 0))
        found = open_images(path, 0)
        assert found.size == (3, 2, 4)
        seen.add(found.identity())
    os.utime(other, (0, 1))
    assert len(seen | {open_images(other, 0).identity()}) == 4
    assert open_images(other, 0).identity() == open_images(other, 0).identity()
    assert open_images(other, 0).readers == 1, "one file, one place in it"


def test_files_named_by_numbers_are_of_seeds(tmp_path: Path) -> None:
    for name in ("3", "000011"):
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    assert sorted(open_images(tmp_path, 0).seeds or ()) == [3, 11]
    Image.new("L", (4, 4)).save(tmp_path / "cat.png")
    assert open_images(tmp_path, 0).seeds is None


def test_a_sampler_is_known_if_the_request_says_all_of_it() -> None:
    said = {"solver": "gamma", "nfe": 2, "gamma": 0.5}
    known = _sampler({"sampler": said})
    assert known is not None
    assert (known.solver, known.nfe, known.gamma) == ("gamma", 2, 0.5)
    assert _sampler({"sampler": said, "reject": 0.1}) is None, "which images were kept is not in it"
    assert _sampler({"sampler": {"solver": 5}}) is None
    assert _sampler({}) is None
