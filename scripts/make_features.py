"""Trains the classifier behind the feature space `digits`: python scripts/make_features.py OUT

Some fifteen seconds on one core. The same seed, release of torch and kind of CPU give the same file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from edmdistill.checkpoints.store import save_tensors
from edmdistill.data.datasets import indices, open_dataset
from edmdistill.features.spaces import DigitsNet

SEED, STEPS, BATCH, LR = 0, 1500, 128, 1e-3


def shift(x: Tensor, random: torch.Generator) -> Tensor:
    """Moves each image by up to one pixel each way; what comes in is background (-1).  [N,1,8,8]"""
    padded = functional.pad(x, (1, 1, 1, 1), value=-1.0)
    corners = torch.randint(3, (len(x), 2), generator=random).tolist()
    return torch.stack([p[:, i : i + 8, j : j + 8] for p, (i, j) in zip(padded, corners, strict=True)])


def train() -> tuple[DigitsNet, float]:
    """The trained classifier, and its accuracy on the 297 digits that it has not seen."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    data, held_out = open_dataset("digits", split="train"), open_dataset("digits", split="test")
    net = DigitsNet()
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    for step in range(STEPS):
        x, labels = data.tensors(indices(SEED, step * BATCH, BATCH, len(data)))
        assert labels is not None
        loss = functional.cross_entropy(net(shift(x, random)), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    x, labels = held_out.tensors(range(len(held_out)))
    assert labels is not None
    with torch.no_grad():
        return net, (net(x).argmax(1) == labels.argmax(1)).float().mean().item()


def main() -> None:
    out = Path(sys.argv[1])
    net, accuracy = train()
    how = f"{STEPS} steps of {BATCH}, shifts of one pixel, seed {SEED}"
    made = {
        "by": "python scripts/make_features.py",
        "from": f"scikit-learn digits, train split, {how}",
        "held_out_accuracy": round(accuracy, 4),
        "torch": torch.__version__,
    }
    # One entry, because safetensors writes several in random order and the file is known by its hash.
    save_tensors(out, net.state_dict(), {"made": json.dumps(made)})
    print(f"{out}: {out.stat().st_size} bytes, held-out accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
