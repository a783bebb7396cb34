"""Images a second of `edmdistill eval` on the digits, beside a plain loop in the same run.

    python benchmarks/evaluation.py [--images 2560] [--nfe 3] [--batch 256] [--repeats 3] [--device cpu]

The loop draws a batch, computes its features and then its classes, one after another, each with all cores. `evaluate`
draws blocks ahead by threads of one core each, and computes features and classes in one pass. Both update the
same metrics. The best of the repeats, which alternate.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from edmdistill.checkpoints.load import load_model
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.evaluation.base import Measured
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.frechet import FrechetDistance, statistics
from edmdistill.evaluation.metrics import ClassAccuracy
from edmdistill.evaluation.shards import batches
from edmdistill.features.spaces import load_features
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.generate import generate_images
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.spec import SamplerSpec

TEACHER = Path(__file__).parents[1] / "edmdistill" / "assets" / "digits-teacher.pkl"


def plain_loop(model: Denoiser, data: Dataset, spec: SamplerSpec, images: int, batch: int, device: str) -> None:
    """Measures FD and class accuracy step by step."""
    space = load_features("digits", device=device)
    metrics = FrechetDistance(statistics(space(data.images(range(len(data)))))), ClassAccuracy()
    for rows in batches(range(images), batch):
        labels = torch.tensor(rows) % 10
        pixels = to_uint8(generate_images(model, spec, rows, labels, batch=batch))
        features = space(pixels)
        measured = Measured(features, space.logits(pixels), labels)
        for metric in metrics:
            metric.update(measured)
    for metric in metrics:
        metric.finish()


def main() -> None:
    """Prints the images a second of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 2560), ("nfe", 3), ("batch", 256), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model, data = load_model(TEACHER, options.device), open_dataset("digits")
    assert isinstance(model, Denoiser)
    spec, count, batch, device = SamplerSpec(nfe=options.nfe), options.images, options.batch, options.device
    runs: dict[str, Callable[[], object]] = {
        "plain loop": lambda: plain_loop(model, data, spec, count, batch, device),
        "evaluate": lambda: evaluate(model, data, protocol="digits", sampler=spec, seeds=range(count), device=device),
    }
    best = dict.fromkeys(runs, float("inf"))
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first warms up
                best[name] = min(best[name], time.perf_counter() - start)
    print(f"{torch.get_num_threads()} cores, the loop in batches of {batch}, NFE {options.nfe}, {count} images")
    for name, seconds in best.items():
        print(f"{name:<12} {count / seconds:8.0f} images/s")
    print(f"{'ratio':<12} {best['plain loop'] / best['evaluate']:8.2f}")


if __name__ == "__main__":
    main()
