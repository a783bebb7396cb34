"""Checks the arrays that a program makes a data set of: each image when it is read, and the classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edmdistill.errors import DatasetError, counted


def require_stored(image: Any, where: str) -> None:
    """Checks that an image is stored as data sets store it; else pixels would be taken for latents.

    Raises: DatasetError: it is no array of numpy, or neither pixels, uint8 [C,H,W], nor latents, float32 [2C,H,W].
    """
    kind = type(image).__name__
    if isinstance(image, np.ndarray):
        kind = f"{image.dtype} {list(image.shape)}"
        latents = image.dtype == np.float32 and image.ndim == 3 and len(image) % 2 == 0
        if latents or (image.dtype == np.uint8 and image.ndim == 3):
            return
    raise DatasetError(
        f"{where} is {kind}, but a data set reads numpy arrays: pixels are uint8 [C,H,W] in 0 to 255, latents float32 "
        "[2C,H,W], their mean and then their standard deviation"
    )


def checked_classes(labels: Any, count: int, name: str) -> NDArray[np.int64] | None:
    """Returns the classes of `count` images, or None.  int64 [N]

    Raises: DatasetError: they are not a whole number from 0 for each.
    """
    if labels is None:
        return None
    classes = np.asarray(labels)
    if classes.shape != (count,) or not np.issubdtype(classes.dtype, np.integer):
        raise DatasetError(
            f"{name} has {counted(count, 'image')}, but its classes are {classes.dtype} {list(classes.shape)}: give a "
            "whole number for each image"
        )
    if classes.min() < 0:
        raise DatasetError(
            f"{name} has the class {classes.min()}, but classes are counted from 0; None stands for none"
        )
    return classes.astype(np.int64, copy=False)
