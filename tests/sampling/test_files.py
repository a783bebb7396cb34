import fcntl
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edmdistill.errors import CheckpointError, EdmDistillError
from edmdistill.evaluation.images import open_images
from edmdistill.sampling.files import Samples, check_output
from edmdistill.sampling.grid import to_uint8

SEEDS = [0, 1, 100]


def images(channels: int = 3) -> torch.Tensor:
    return torch.rand(3, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def write(out: Path, samples: torch.Tensor, seeds: list[int], classes: list[int] | None, **options: Any) -> Samples:
    """All at once."""
    request = {"seeds": seeds, "sum": float(samples.nan_to_num().sum())}
    made = Samples(out, request, len(seeds), seeds, classes, **options)
    for positions in made.batches(2):
        made.put(positions, samples[positions])
    made.finish()
    return made


@pytest.mark.parametrize("channels", [1, 3])
def test_npz(tmp_path: Path, channels: int) -> None:
    out = tmp_path / "new" / "a.NPZ"
    write(out, images(channels), SEEDS, [4, 4, 2])
    with np.load(out) as file:
        assert {name: file[name].dtype.name for name in file} == {
            "images": "uint8",
            "seeds": "int64",
            "labels": "int64",
        }
        assert np.array_equal(file["images"], to_uint8(images(channels)).permute(0, 2, 3, 1))
        assert file["seeds"].tolist() == SEEDS
        assert file["labels"].tolist() == [4, 4, 2]
    assert [path.name for path in out.parent.iterdir()] == ["a.NPZ"]


def test_npz_of_latents(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", images(4), SEEDS, None, decoder=None)
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["latents"], images(4))
        assert file["labels"].tolist() == [-1, -1, -1]


def test_latents_are_decoded_as_they_are_drawn(tmp_path: Path) -> None:
    """Into pictures of another size, and without those that are not finite."""

    def decode(latents: torch.Tensor) -> torch.Tensor:
        assert latents.isfinite().all()
        return to_uint8(latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3))

    latents = images(4)
    latents[1] = float("nan")
    made = write(tmp_path / "frogs", latents, SEEDS, None, decoder=decode)
    assert made.broken == [1]
    assert np.array_equal(picture(tmp_path / "frogs" / "000100.png"), decode(latents[2:])[0].permute(1, 2, 0))
    assert picture(tmp_path / "frogs-grid.png").shape == (32, 2 * 34 - 2, 3)  # two of 16x16, enlarged twice


@pytest.mark.parametrize(("channels", "classes"), [(1, [4, 4, 2]), (3, None)])
def test_the_layout_of_adm(tmp_path: Path, channels: int, classes: list[int] | None) -> None:
    out = tmp_path / "a.npz"
    write(out, images(channels), SEEDS, classes, layout="adm")
    with np.load(out) as file:
        assert set(file) == {"arr_0"} | ({"arr_1"} if classes else set())
        assert np.array_equal(file["arr_0"], to_uint8(images(channels)).expand(3, 3, 8, 8).permute(0, 2, 3, 1))
        assert not classes or file["arr_1"].tolist() == classes
    read = open_images(out, 5)
    assert torch.equal(read.read(range(3)), to_uint8(images(channels)).expand(3, 3, 8, 8))
    with pytest.raises(EdmDistillError, match="already exists"):
        write(out, images(channels), SEEDS, classes)  # in the other layout it is another file


@pytest.mark.parametrize("channels", [1, 3])
def test_folder(tmp_path: Path, channels: int) -> None:
    out = tmp_path / "frogs"
    write(out, images(channels), SEEDS, None)
    assert sorted(path.name for path in out.iterdir()) == [*("000000.png", "000001.png", "000100.png", "samples.json")]
    pixels = to_uint8(images(channels)).permute(0, 2, 3, 1).squeeze(-1).numpy()
    for i, seed in enumerate(SEEDS):
        assert np.array_equal(picture(out / f"{seed:06d}.png"), pixels[i])


def test_grid(tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    write(out, images().repeat(2, 1, 1, 1), [*range(6)], [0, 1, 0, 1, 0, 0])
    assert picture(out).shape == (2 * 34 - 2, 4 * 34 - 2, 3)  # two classes, two rows
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("classes", [None, [0, 1, 2, 3, 3, 3]])
def test_the_grid_of_no_class_or_of_many_is_nearly_square(classes: list[int] | None, tmp_path: Path) -> None:
    write(tmp_path / "grid.png", torch.zeros(6, 1, 32, 32), [*range(6)], classes)
    assert picture(tmp_path / "grid.png").shape == (2 * 34 - 2, 3 * 34 - 2)


def test_a_grid_of_more_pixels_than_pillow_opens_is_known_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of 1,024 images of 512x512."""
    request = write(tmp_path / "grid.png", images(), SEEDS, None).request
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert Samples(tmp_path / "grid.png", request, 3, SEEDS, None).finished
    with pytest.raises(EdmDistillError, match="already exists"):
        Samples(tmp_path / "grid.png", {}, 3, SEEDS, None)


@settings(max_examples=15)
@given(st.permutations(range(12)), st.integers(0, 12), st.sampled_from([1, 2, 5]), st.sampled_from(["a.npz", "a"]))
def test_in_whatever_parts_it_is_drawn_the_whole_is_the_same(
    order: list[int], done: int, batch: int, name: str
) -> None:
    samples, seeds = torch.rand(12, 1, 8, 8) * 2 - 1, [3 * i for i in range(12)]
    with TemporaryDirectory() as folder:
        out = Path(folder) / name
        first = Samples(out, {}, 12, seeds, None)
        for position in order[:done]:
            first.put([position], samples[position : position + 1])
        first.close()
        second = Samples(out, {}, 12, seeds, None)
        assert second.missing == sorted(order[done:])
        for positions in second.batches(batch):
            assert positions == [*range(positions[0], positions[0] + len(positions))]
            second.put(positions, samples[positions])
        second.finish()
        assert Samples(out, {}, 12, seeds, None).finished
        if name == "a":
            drawn = np.stack([picture(out / f"{seed:06d}.png") for seed in seeds])
        else:
            with np.load(out) as file:
                drawn = file["images"][..., 0]
                assert file["seeds"].tolist() == seeds
        assert np.array_equal(drawn, to_uint8(samples)[:, 0].numpy())


@pytest.mark.parametrize(
    ("name", "latent", "message"),
    [
        ("a.png", True, "latents"),
        ("folder", True, "latents"),
        ("a.jpg", False, ".jpg is not supported"),
        ("S.pt", False, "use a file name that ends in .npz or .png"),
        ("S.PT", False, "use a file name that ends in .npz or .png"),
        ("taken", False, "is a file, but"),
        ("held.npz", False, "is a folder, but"),
    ],
)
def test_check_output(tmp_path: Path, name: str, latent: bool, message: str) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "held.npz").mkdir()
    with pytest.raises(EdmDistillError, match=message):
        check_output(tmp_path / name, latent=latent)


@pytest.mark.parametrize(("name", "latent"), [("a.png", False), ("frogs", False), ("a.npz", True)])
def test_the_layout_of_adm_is_for_images_in_an_npz(tmp_path: Path, name: str, latent: bool) -> None:
    with pytest.raises(EdmDistillError, match="leave out --layout"):
        check_output(tmp_path / name, latent=latent, layout="adm")
    check_output(tmp_path / "a.npz", layout="adm")


@pytest.mark.parametrize("name", ["a.npz", "deep/er/a.PNG", "folder", "run.v2", "frogs-2.5"])
def test_good_outputs_pass_and_leave_nothing(tmp_path: Path, name: str) -> None:
    check_output(tmp_path / name, latent=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_grows_takes_only_its_own(tmp_path: Path) -> None:
    """Not a number of somebody's, and not the samples that were not finite, which keep their seeds."""
    first = Samples(tmp_path / "a", {"seeds": "5,7"}, 2, [5, 7], None)
    first.put([0, 1], torch.stack([images()[0], images()[0] * torch.nan]))
    first.finish()
    shutil.copy(tmp_path / "a" / "000005.png", tmp_path / "a" / "000009.png")
    grown = Samples(tmp_path / "a", {"seeds": "0,5,7,9"}, 4, [0, 5, 7, 9], None)
    assert (grown.missing, grown.broken, grown.finished) == ([0, 3], [2], False)
    with pytest.raises(EdmDistillError, match="another process is drawing into"):
        Samples(tmp_path / "a", {"seeds": "5,7"}, 2, [5, 7], None)
    grown.close()
    assert Samples(tmp_path / "a", {"seeds": "5,7"}, 2, [5, 7], None).finished  # nothing was changed yet


def test_parts_beside_a_whole_file_go(tmp_path: Path) -> None:
    """Of a process that was killed when the file was whole and its parts were still there."""
    out, parts = tmp_path / "a.npz", tmp_path / ".a.npz.parts"
    request = write(out, images(), SEEDS, None).request
    parts.mkdir()
    (parts / "00000000.npz").touch()
    (tmp_path / ".a.npz.0123abcd.new").mkdir()
    assert Samples(out, request, 3, SEEDS, None).finished
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_parts_without_their_request_are_in_nobodys_way(tmp_path: Path) -> None:
    Samples(tmp_path / "a.npz", {"seeds": SEEDS}, 3, SEEDS, None).put([0], images()[:1])
    (tmp_path / ".a.npz.parts" / "samples.json").unlink()
    write(tmp_path / "a.npz", images(), SEEDS, None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


OUTPUTS = pytest.mark.parametrize("name", ["a.npz", "a.png", "a"])


@OUTPUTS
@pytest.mark.parametrize(("request_", "overwrite"), [({}, False), ({"other": 1}, True)], ids=["same", "overwrite"])
def test_one_process_at_a_time_draws_into_an_output(
    name: str, request_: dict[str, int], overwrite: bool, tmp_path: Path
) -> None:
    out = tmp_path / name
    first, idle = (Samples(out, {}, 3, SEEDS, None) for _ in range(2))
    first.put([0], images()[:1])
    with pytest.raises(EdmDistillError, match="another process is drawing into"):
        Samples(out, request_, 3, SEEDS, None, overwrite=overwrite)
    with pytest.raises(EdmDistillError, match="another process is drawing into"):
        idle.put([0], images()[:1])
    first.put([1, 2], images()[1:])
    first.finish()
    with pytest.raises(EdmDistillError, match="run this command again"):
        idle.put([0], images()[:1])
    idle.close()
    assert Samples(out, {}, 3, SEEDS, None).finished
    assert Samples(out, {}, 3, SEEDS, None).finished  # which keeps no lock


@OUTPUTS
def test_the_lock_outlives_what_is_overwritten(name: str, tmp_path: Path) -> None:
    begun = Samples(tmp_path / name, {"other": 1}, 3, SEEDS, None)
    begun.put([0], images()[:1])
    begun.close()
    mine = Samples(tmp_path / name, {}, 3, SEEDS, None, overwrite=True)
    mine.put([0], images()[:1])
    with pytest.raises(EdmDistillError, match="another process is drawing into"):
        Samples(tmp_path / name, {}, 3, SEEDS, None)


@pytest.mark.parametrize("name", ["a.npz", "a.png"])
def test_without_locks_a_file_that_another_process_finished_stays_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    out = tmp_path / name
    first = Samples(out, {}, 3, SEEDS, None)
    first.put([0], images()[:1])
    second = Samples(out, {}, 3, SEEDS, None)
    first.put([1, 2], images()[1:])
    first.finish()
    content = out.read_bytes()
    second.put([1, 2], images()[1:])
    with pytest.raises(CheckpointError, match="has 2 of the 3 images that were drawn"):
        second.finish()
    assert out.read_bytes() == content
