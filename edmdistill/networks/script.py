"""TorchScript files: networks of the user's that come with their own code."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from edmdistill.errors import CheckpointError


def load_script(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The network of a TorchScript file, in evaluation mode, not to be trained.

    Raises: CheckpointError: it cannot be read.
    """
    try:
        with warnings.catch_warnings():  # torch deprecates the format, in which such networks are still handed round
            warnings.simplefilter("ignore", DeprecationWarning)
            network: nn.Module = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as TorchScript ({reason}): write it by torch.jit.save."
        ) from error
    for parameter in network.parameters():  # a script has no requires_grad_ of its own
        parameter.requires_grad_(False)
    return network.eval()
