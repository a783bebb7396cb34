"""What `edmdistill plan` says against what a round takes: CoSIM with random weights.

    python benchmarks/plan_memory.py [--networks edm2-img512-s ...] [--batch 4] [--micro-batch 4]
        [--checkpoint-activations] [--loss-pieces 4] [--offload ema teacher optimizer]

On a GPU the peak is torch.cuda.max_memory_allocated, on a CPU what the profiler sees come and go; there, nothing can be
offloaded, and networks are thinned out to a quarter of their channels.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.machine.engine import Machine
from edmdistill.networks import new_network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.published import PUBLISHED
from edmdistill.planning.plan import make_plan, measure
from edmdistill.recipes.schema import Recipe
from edmdistill.training.loop import rounds
from edmdistill.training.prepare import prepare
from edmdistill.training.run import Run

ENCODER = {"kind": "StabilityVAEEncoder", "scale": [0.12] * 4, "bias": [0.0] * 4}


def make_data(folder: Path, resolution: int, channels: int, classes: int) -> Path:
    """A few random latents, or images in their place as arrays of moments."""
    generator = np.random.default_rng(0)
    (folder / "data").mkdir()
    labels = []
    for index in range(4):
        moments = np.abs(generator.standard_normal((2 * channels, resolution, resolution), dtype=np.float32))
        np.save(folder / "data" / f"{index}.npy", moments)
        labels.append([f"{index}.npy", max(0, classes - 1 - index)])
    if classes:
        (folder / "data" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder / "data"


def peak_of(run: Run) -> float:
    """Bytes of the second round at most."""
    steps = rounds(run)
    next(steps)
    if run.engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        next(steps)
        return float(torch.cuda.max_memory_allocated())
    adam = [state for optimizer in run.optimizers.values() for state in optimizer.state.values()]
    moments = [value for state in adam for value in state.values()]
    for network in (*run.networks.values(), *(average.network for average in run.averages)):
        moments += list(network.state_dict().values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        next(steps)
    assert profiler.profiler is not None
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak + sum(tensor.numel() * tensor.element_size() for tensor in moments)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=["edm2-img512-s", "adm-imagenet64", "ddpmpp-cifar10"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--loss-pieces", type=int, default=1)
    parser.add_argument("--offload", nargs="+", default=[], choices=["ema", "teacher", "optimizer"])
    options = parser.parse_args()
    thin = not torch.cuda.is_available()
    if thin and options.offload:
        parser.error("--offload needs a GPU: on a CPU, all is in the host's memory")
    training = {"images": 2 * options.batch, "batch": options.batch, "lr": 1e-5, "log_every": 10**9}
    tables = {
        "method": {"name": "cosim"},
        "training": training | {"snapshot_every": 10**9, "precision": options.precision, "betas": [0.0, 0.99]},
        "ema": {"half_life_images": 500_000},
    }
    recipe = Recipe.from_json(json.dumps(tables).encode())
    rows = min(options.micro_batch or options.batch, options.batch)
    machine = Machine(
        micro_batch=rows,
        offload=tuple(options.offload),
        checkpointing=options.checkpoint_activations,
        loss_pieces=options.loss_pieces,
    )
    print("network             plan GB  measured GB   ratio")
    for name in options.networks:
        kind, (resolution, channels, classes), arguments = PUBLISHED[name]
        if thin:
            arguments = arguments | {"model_channels": max(32, arguments.get("model_channels", 128) // 4)}
        torch.manual_seed(0)
        flow = FlowNetwork(new_network(kind, resolution, channels, classes, **arguments), EDM())
        planned = make_plan(measure(recipe, flow, machine), machine).peak(rows, accumulates=rows < options.batch)
        with tempfile.TemporaryDirectory() as scratch:
            encoder = ENCODER | {"scale": [0.12] * channels, "bias": [0.0] * channels}
            provenance = Provenance(source="random weights")
            config = CheckpointConfig(stage="teacher", provenance=provenance, encoder=encoder, **describe(flow))
            save_checkpoint(Path(scratch) / "teacher", flow, config)
            data = make_data(Path(scratch), resolution, channels, classes)
            real = peak_of(prepare(recipe, data=data, teacher=Path(scratch) / "teacher", machine=machine))
        print(f"{name:<18} {planned / 1e9:8.3f} {real / 1e9:12.3f} {planned / real:7.3f}", flush=True)


if __name__ == "__main__":
    main()
