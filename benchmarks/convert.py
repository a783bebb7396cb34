"""What `edmdistill convert` costs beside loading the same file: EDM2-S's pickle, 280M random weights in float16.

    python benchmarks/convert.py [--rounds 3] [--width 192] [--parity quick|full|none]

In each round one fresh process loads the pickle for sampling (`load_model`), another converts it, and a third loads the
result. CPU seconds are without imports; peaks of memory (Linux's VmHWM) are with libraries and mapped files. It needs
3 GB of disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np


def make_pickle(path: Path, width: int) -> dict[str, float]:
    """Writes an official pickle of EDM2 for latents of 64x64, at width 192 EDM2-S.  Returns: its GB in float32"""
    sys.path.append(str(Path(__file__).parents[1] / "scripts"))
    import torch
    from make_teacher import to_pickle

    from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
    from edmdistill.networks.edm2 import UNet
    from edmdistill.networks.flow import FlowNetwork
    from edmdistill.networks.magnitude import gained_layers
    from edmdistill.networks.preconditioning import EDM

    torch.manual_seed(0)
    network = UNet(64, 4, 1000, model_channels=width)
    for _, gain in gained_layers(network):
        if gain is not None:
            torch.nn.init.constant_(gain, 0.3)
    provenance = Provenance(source="random weights")
    config = CheckpointConfig(stage="teacher", provenance=provenance, **describe(FlowNetwork(network, EDM())))
    path.write_bytes(to_pickle(network, config))
    return {"weights": sum(parameter.nbytes for parameter in network.parameters()) / 1e9}


def measure(what: str, path: Path, parity: str) -> dict[str, float]:
    """Returns what loading or converting the pickle takes: CPU seconds by stage and in all, peak of memory in GB.

    what: load, convert, or load-converted.
    """
    from edmdistill.checkpoints.convert import convert
    from edmdistill.checkpoints.load import load_model
    from edmdistill.machine.host import keep_freed_memory

    keep_freed_memory()  # as every command does
    marks = [("", time.process_time())]

    def mark(stage: str) -> None:
        marks.append((stage, time.process_time()))

    if what.startswith("load"):
        load_model(path if what == "load" else path.with_suffix(""))
    else:
        convert(path, path.with_suffix(""), overwrite=True, parity=parity, on_progress=mark)
    mark("")
    stages: dict[str, float] = {}
    for (stage, start), (_, end) in pairwise(marks):
        stages[stage] = stages.get(stage, 0) + end - start
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    return {"seconds": marks[-1][1] - marks[0][1], "peak": peak} | {name: s for name, s in stages.items() if name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--parity", choices=["full", "quick", "none"], default="quick")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, path = options.child[0], Path(options.child[1])
        figures = make_pickle(path, options.width) if what == "make" else measure(what, path, options.parity)
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pkl"

        def child(what: str) -> dict[str, float]:
            words = [sys.executable, __file__, "--child", what, str(path)]
            words += ["--width", str(options.width), "--parity", options.parity]
            figures: dict[str, float] = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
            return figures

        weights = child("make")["weights"]
        whats = "load", "convert", "load-converted"
        rounds = [tuple(map(child, whats)) for _ in range(options.rounds)]
    for what, runs in zip(whats, zip(*rounds, strict=True), strict=True):
        for name in runs[0]:
            values = np.array([run[name] for run in runs])
            print(f"{what}, {name}: {np.median(values):.2f} [{values.min():.2f}, {values.max():.2f}]")
    ratios = np.array([converted["seconds"] / loaded["seconds"] for loaded, converted, _ in rounds])
    print(f"convert / load: {np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]")
    print(f"peak / weights ({weights:.2f} GB): {max(converted['peak'] for _, converted, _ in rounds) / weights:.2f}")


if __name__ == "__main__":
    main()
