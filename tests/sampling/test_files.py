from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edmdistill.errors import EdmDistillError
from edmdistill.sampling.files import check_output, write_samples
from edmdistill.sampling.grid import to_uint8

SEEDS = [0, 1, 100]


def images(channels: int = 3) -> torch.Tensor:
    return torch.rand(3, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz(tmp_path: Path, channels: int) -> None:
    out = tmp_path / "new" / "a.npz"
    write_samples(out, images(channels), SEEDS, [4, 4, 2], latent=False)
    with np.load(out) as file:
        assert {name: file[name].dtype.name for name in file} == {
            "images": "uint8",
            "seeds": "int64",
            "labels": "int64",
        }
        assert np.array_equal(file["images"], to_uint8(images(channels)).permute(0, 2, 3, 1))
        assert file["seeds"].tolist() == SEEDS
        assert file["labels"].tolist() == [4, 4, 2]
    assert [path.name for path in out.parent.iterdir()] == ["a.npz"]


def test_npz_of_latents(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.npz", images(4), SEEDS, None, latent=True)
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["latents"], images(4))
        assert file["labels"].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("channels", [1, 3])
def test_folder(tmp_path: Path, channels: int) -> None:
    out = tmp_path / "frogs"
    write_samples(out, images(channels), SEEDS, None, latent=False)
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "000100.png", "grid.png"]
    pixels = to_uint8(images(channels)).permute(0, 2, 3, 1).squeeze(-1).numpy()
    for i, seed in enumerate(SEEDS):
        assert np.array_equal(picture(out / f"{seed:06d}.png"), pixels[i])
    # A second time: same names are replaced, others stay.
    write_samples(out, -images(channels), [1, 2, 3], None, latent=False)
    assert len(list(out.iterdir())) == 6
    assert np.array_equal(picture(out / "000000.png"), pixels[0])
    assert not np.array_equal(picture(out / "000001.png"), pixels[1])


def test_grid(tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    write_samples(out, images().repeat(2, 1, 1, 1), [*range(6)], [0, 1, 0, 1, 0, 0], latent=False)
    assert picture(out).shape == (2 * 34 - 2, 4 * 34 - 2, 3)  # two classes, two rows


@pytest.mark.parametrize(
    ("name", "latent", "message"),
    [
        ("a.png", True, "latents"),
        ("folder", True, "latents"),
        ("a.jpg", False, ".jpg is not written"),
        ("taken", False, "is a file already"),
        ("taken/below", False, "no folder"),
        ("held.npz", False, "is a folder already"),
    ],
)
def test_check_output(tmp_path: Path, name: str, latent: bool, message: str) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "held.npz").mkdir()
    with pytest.raises(EdmDistillError, match=message):
        check_output(tmp_path / name, latent=latent)


@pytest.mark.parametrize("name", ["a.npz", "deep/er/a.png", "folder", "run.v2"])
def test_good_outputs_pass_and_leave_nothing(tmp_path: Path, name: str) -> None:
    check_output(tmp_path / name, latent=False)
    assert not list(tmp_path.iterdir())
