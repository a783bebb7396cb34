import numpy as np
import torch

from edmdistill.sampling.grid import GAP, image_grid, named_rows, thumbnails, to_uint8


def test_to_uint8_is_the_official_rounding() -> None:
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_bytes_survive() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels)


def test_grid_places_images_row_by_row() -> None:
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 4, 4)
    grid = np.asarray(image_grid(images, scale=2))
    step = 8 + GAP
    assert grid.shape == (2 * step - GAP, 3 * step - GAP, 3)
    assert [int(grid[i // 3 * step, i % 3 * step, 0]) for i in range(5)] == [0, 1, 2, 3, 4]
    assert (grid[step:, 2 * step :] == 255).all()  # no sixth image
    assert (grid[8:step] == 255).all()


def test_grid_gives_every_class_a_row() -> None:
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 1, 32, 32)
    grid = image_grid(images, labels=[7, 2, 7, 2, 7, 5])
    assert grid.mode == "L"
    step = 32 + GAP
    pixels = np.asarray(grid)[::step, ::step]
    assert pixels.tolist() == [[1, 3, 255], [5, 255, 255], [0, 2, 4]]


def test_small_images_are_enlarged() -> None:
    assert image_grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).size == (32, 32)
    assert image_grid(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).size == (64, 64)


def test_thumbnails_are_rounded_means() -> None:
    pixels = torch.tensor([[0, 1, 10, 10], [1, 1, 10, 11]], dtype=torch.uint8).expand(5, 3, 2, 4)
    assert thumbnails(pixels, 2).tolist() == torch.tensor([[1, 10]]).expand(5, 3, 1, 2).tolist()
    assert thumbnails(pixels, 3).shape == (5, 3, 1, 2)  # by a whole factor
    assert thumbnails(pixels, 4) is pixels


def test_rows_have_their_names_at_the_left() -> None:
    rows = [("", torch.zeros(3, 1, 32, 32)), ("generator", torch.full((3, 1, 32, 32), 100))]
    page = np.asarray(named_rows([(name, images.to(torch.uint8)) for name, images in rows]))
    grid = np.asarray(image_grid(torch.cat([images.to(torch.uint8) for _, images in rows]), columns=3))
    left = page[:, : -grid.shape[1]]
    assert np.array_equal(page[:, -grid.shape[1] :], grid)
    assert (left[:32] == 255).all()
    assert left[34:].min() < 100
