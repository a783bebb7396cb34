"""Trains the classifier behind the feature space of an embedded set: python scripts/make_features.py SET OUT

A minute on one core at most. The same seed, release of torch and kind of CPU give the same file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from edmdistill.checkpoints.store import save_tensors
from edmdistill.data.datasets import open_dataset
from edmdistill.data.order import indices
from edmdistill.embedded import EMBEDDED, EmbeddedSet
from edmdistill.features.spaces import SmallClassifier, small_classifier

SEED, STEPS, BATCH, LR = 0, 1500, 128, 1e-3
BANDS = {"digits": 1, "tiles": 5}
"""Tiles of a class are in the order of their picture. The classifier also learns in which fifth of them one is, by a
second head that is not kept, so that the features tell more than the six classes."""


def shift(x: Tensor, random: torch.Generator) -> Tensor:
    """Moves each image by up to one pixel each way; what comes in is background (-1) or, in color, its edge."""
    size = x.shape[-1]
    mode = {"value": -1.0} if x.shape[1] == 1 else {"mode": "replicate"}
    padded = functional.pad(x, (1, 1, 1, 1), **mode)
    corners = torch.randint(3, (len(x), 2), generator=random).tolist()
    return torch.stack([p[:, i : i + size, j : j + size] for p, (i, j) in zip(padded, corners, strict=True)])


def train(embedded: EmbeddedSet) -> tuple[SmallClassifier, float]:
    """The trained classifier, and its accuracy on the images that it has not seen."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    data, held_out = open_dataset(embedded.name, split="train"), open_dataset(embedded.name, split="test")
    net, bands = small_classifier(embedded), BANDS[embedded.name]
    band_head = nn.Linear(64, data.label_dim * bands) if bands > 1 else None
    parameters = [*net.parameters(), *(() if band_head is None else band_head.parameters())]
    optimizer = torch.optim.Adam(parameters)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    per_band = len(data) // (data.label_dim * bands)
    for step in range(STEPS):
        rows = indices(SEED, step * BATCH, BATCH, len(data))
        x, labels = data.tensors(rows)
        assert labels is not None
        x = shift(x, random)
        features = net.features(x)
        loss = functional.cross_entropy(net.head(features), labels)
        if band_head is not None:
            loss = loss + functional.cross_entropy(band_head(features), rows // per_band)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    x, labels = held_out.tensors(range(len(held_out)))
    assert labels is not None
    with torch.no_grad():
        return net, (net(x).argmax(1) == labels.argmax(1)).float().mean().item()


def main() -> None:
    name, out = sys.argv[1], Path(sys.argv[2])
    net, accuracy = train(EMBEDDED[name])
    how = f"{STEPS} steps of {BATCH}, shifts of one pixel, seed {SEED}"
    made = {
        "by": f"python scripts/make_features.py {name}",
        "from": f"{name}, train split, {how}",
        "held_out_accuracy": round(accuracy, 4),
        "torch": torch.__version__,
    }
    # One entry, because safetensors writes several in random order and the file is known by its hash.
    save_tensors(out, net.state_dict(), {"made": json.dumps(made)})
    print(f"{out}: {out.stat().st_size} bytes, held-out accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
