"""What is claimed about speed, measured: tables in Markdown, and all rows as JSON.

    make bench [PEERS="--fastgen DIR --edm2 DIR --edm DIR --sid DIR"]
    python benchmarks/bench.py [--only SECTION ...] [--device cuda] [--rounds 7] [--compile] [--json bench.json]

DIR is a clone of NVlabs/FastGen, NVlabs/edm2, NVlabs/edm (whose licenses forbid commercial use) or mingyuanzhou/SiD.
Calls that are compared take turns; a ratio is the median over the rounds, with its range but for the extreme ones. On a
CPU, all but `cores` run on one thread, and a time is CPU time; memory that is freed goes back to the system but in the
last three.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
import warnings
from pathlib import Path

import torch
from timing import table

from edmdistill.progress import set_quiet

SECTIONS = (
    "training",
    "sampling",
    "tangents",
    "growth",
    "memory",
    "random_numbers",
    "likelihood",
    "cores",
    "half_precision",
    "convolutions",
    "peers",
)
PEERS = ("fastgen", "edm2", "edm", "sid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    parser.add_argument("--compile", action="store_true", help="compiled networks too: some minutes")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", type=Path, help="its checkout")
    options = parser.parse_args()
    options.peers = {peer: path for peer in PEERS if (path := getattr(options, peer)) is not None}
    torch.set_num_threads(1)
    set_quiet(True)
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on first use of jvp
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = Path(scratch)
        for name in options.only:
            section, start = importlib.import_module(f"sections.{name}"), time.process_time()
            rows = results[name] = list(section.measure(options))
            if rows:
                took = time.process_time() - start
                print(f"## {name}\n\n{section.__doc__}\n{table(rows)}\n\nThis took {took:.0f} CPU s.\n", flush=True)
            options.json.write_text(json.dumps({"torch": torch.__version__, **results}, indent=1))


if __name__ == "__main__":
    main()
