"""Every method at equal compute: digits-FD after the same CPU-minutes of one thread. Prints a table in Markdown.

    python benchmarks/digits_methods.py [--methods scd cosim ...] [--seeds 0 1 2] [--minutes 4] [--out DIR] [--jobs 1]
    python benchmarks/digits_methods.py --methods scd scd-unadapted --images 320000    # what adaptation is for

Each method trains by its recipe, with as many images as the minutes hold: a short calibration in CPU-seconds finds how
many, and what a run really took, with its start-up, stands beside. All have the same network and data. Not counted are
the shipped teacher's own training, and the adaptation to read t, which the methods of sCM start from; its cost is
printed. A method is measured in the steps that its recipe is for. On a busy machine a CPU-second holds fewer images:
leave it alone while the methods are calibrated, one after the other.

What is finished in DIR is not done again, unless its recipe has changed; a run that was broken off starts anew.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch

import edmdistill
from edmdistill.atomic import atomic_write
from edmdistill.machine.engine import Machine
from edmdistill.recipes.library import load_recipe
from edmdistill.recipes.schema import Recipe
from edmdistill.training.loop import rounds
from edmdistill.training.prepare import prepare

SHIPPED = Path(edmdistill.__file__).parent / "assets/digits-teacher.pkl"
ADAPT = "diffusion/digits-adapt"
NFE = (1, 2, 4)
METRICS = {"fd_digits": ".3g", "class_accuracy": ".3f"}


class Contestant(NamedTuple):
    """A method, its recipe, whether it starts from the teacher that reads t, and values laid over the recipe."""

    method: str
    recipe: str
    adapted: bool
    sets: tuple[str, ...] = ()


CONTESTANTS = {
    "cosim": Contestant("cosim", "cosim/digits-quickstart", adapted=False),
    "sid": Contestant("sid", "sid/digits", adapted=False),
    "vsd": Contestant("vsd", "vsd/digits", adapted=False),
    "scd": Contestant("scd", "scd/digits", adapted=True),
    "scd-multistep": Contestant("scd", "scd/digits-multistep", adapted=True),
    "scd+vsd": Contestant("scd", "scd/digits-vsd", adapted=True),
    "sct": Contestant("sct", "sct/digits", adapted=True),
    "dscd": Contestant("dscd", "dscd/digits", adapted=True),
    "ctm": Contestant("ctm", "ctm/digits", adapted=False),
    "scd-unadapted": Contestant("scd", "scd/digits", adapted=False, sets=("method.allow_edm_time=true",)),
}


class Results:
    """DIR/results.json: written whole after every entry, by one thread at a time."""

    def __init__(self, file: Path) -> None:
        self.file, self.lock = file, Lock()
        self.entries: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def known(self, name: str, made_by: str) -> dict[str, Any] | None:
        """The entry of that name, if it was made by these recipes."""
        entry = self.entries.get(name)
        return entry if entry is not None and entry["made_by"] == made_by else None

    def add(self, name: str, made_by: str, **values: Any) -> dict[str, Any]:
        with self.lock:
            self.entries[name] = {"made_by": made_by, **values}
            with atomic_write(self.file) as new:
                new.write_text(json.dumps(self.entries, indent=2) + "\n")
        return self.entries[name]


def cpu_seconds(log: Path, *arguments: object) -> float:
    """Runs `edmdistill ARGUMENTS` on one thread; what it says goes to a file.  Returns: its CPU time."""
    words = list(map(str, arguments))
    with log.open("a") as file:
        command = [sys.executable, "-m", "edmdistill", *words]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"edmdistill {' '.join(words)} ended with {process.returncode}; {log} says why")
    return usage.ru_utime + usage.ru_stime


def recipe_of(name: str, **training: int) -> tuple[Recipe, str, list[str]]:
    """A contestant's recipe, the recipes that decide its results, and the overrides as words of a command."""
    method, recipe, adapted, values = CONTESTANTS[name]
    sets = [*values, *(f"training.{key}={value}" for key, value in training.items())]
    resolved = load_recipe(recipe, method, sets)
    made_by = [resolved.hash, load_recipe(ADAPT).hash] if adapted else [resolved.hash]
    return resolved, " ".join(made_by), [word for override in sets for word in ("--set", override)]


def adapted_teacher(folder: Path, results: Results) -> Path:
    """The shipped teacher, made to read t and trained on; made once."""
    recipe = load_recipe(ADAPT)
    run, converted, log = folder / "adapted", folder / "adapted-start", folder / "adapted.log"
    entry = results.known("adapted", recipe.hash)
    if entry is None:
        print("adapted: convert --time-embedding positional, train diffusion", flush=True)
        for old in (run, converted):
            shutil.rmtree(old, ignore_errors=True)
        cpu_seconds(log, "convert", SHIPPED, converted, "--time-embedding", "positional", "--licence", "apache-2.0")
        options = "--data", "digits", "--recipe", ADAPT, "--run-dir", run, "--device", "cpu"
        seconds = cpu_seconds(log, "train", "diffusion", converted, *options)
        entry = results.add("adapted", recipe.hash, cpu_seconds=seconds, images=recipe.training.images)
    print(f"adapted: {entry['images']:,} images, {entry['cpu_seconds']:.0f} CPU-seconds, not counted below", flush=True)
    return run


def images_per_second(name: str, teacher: Path, results: Results, seconds: float = 10) -> float:
    """Images that a method sees in a CPU-second, once its first round is over."""
    recipe, made_by, _ = recipe_of(name)
    entry = results.known(f"{name} calibration", made_by)
    if entry is None:
        run = prepare(recipe, data="digits", teacher=teacher, machine=Machine(device="cpu"))
        steps = rounds(run)
        next(steps)
        first, start = run.images, time.process_time()
        while (spent := time.process_time() - start) < seconds:
            next(steps)
        entry = results.add(f"{name} calibration", made_by, images_per_second=(run.images - first) / spent)
    print(f"{name}: {entry['images_per_second']:.0f} images a CPU-second", flush=True)
    return float(entry["images_per_second"])


def trained(name: str, seed: int, teacher: Path, images: int, folder: Path, results: Results) -> dict[str, Any]:
    """Trains a contestant and measures it, or knows it already."""
    method, recipe, *_ = CONTESTANTS[name]
    resolved, made_by, sets = recipe_of(name, images=images, seed=seed, snapshot_every=images)
    entry = results.known(f"{name} {seed}", made_by)
    if entry is not None:
        return entry
    print(f"{name} {seed}: {images:,} images", flush=True)
    run = folder / f"{name}-{seed}"
    log, evaluation = run.with_suffix(".log"), run / "eval.json"
    shutil.rmtree(run, ignore_errors=True)
    options = "--data", "digits", "--recipe", recipe, "--run-dir", run, "--device", "cpu"
    seconds = cpu_seconds(log, "train", method, teacher, *options, *sets)
    nfe = [str(n) for n in NFE if n in resolved.sampling.nfe]
    asked = "--protocol", "digits", "--nfe", ",".join(nfe), "--device", "cpu"
    cpu_seconds(log, "eval", run, *asked, "--out", evaluation)
    metrics = [result["metrics"] for result in json.loads(evaluation.read_text())["results"]]
    scores = {metric: dict(zip(nfe, (each[metric] for each in metrics), strict=True)) for metric in METRICS}
    values = ", ".join(f"{value:.3g} in {n}" for n, value in scores["fd_digits"].items())
    print(f"{name} {seed}: digits-FD {values}, after {seconds / 60:.2f} CPU-minutes", flush=True)
    return results.add(f"{name} {seed}", made_by, images=images, cpu_seconds=seconds, **scores)


def cell(values: list[float], form: str) -> str:
    """Mean and standard deviation, if there are two or more."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def row(name: str, rate: float, runs: list[dict[str, Any]]) -> str:
    """A contestant's line of the table."""
    cells = [name, f"{runs[0]['images']:,}", f"{rate:.0f}", cell([run["cpu_seconds"] / 60 for run in runs], ".2f")]
    for metric, form in METRICS.items():
        cells += [cell([run[metric][str(n)] for run in runs if str(n) in run[metric]], form) for n in NFE]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--methods", nargs="+", choices=CONTESTANTS, default=[name for name in CONTESTANTS if name != "scd-unadapted"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=4, help="CPU-minutes of one training")
    parser.add_argument("--images", type=int, help="of one training, in the place of minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/digits-methods"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.json")
    teachers = {False: SHIPPED}
    if any(CONTESTANTS[name].adapted for name in options.methods):
        teachers[True] = adapted_teacher(options.out, results)
    rates = {name: images_per_second(name, teachers[CONTESTANTS[name].adapted], results) for name in options.methods}

    def run(name: str, seed: int) -> dict[str, Any]:
        batch = recipe_of(name)[0].training.batch
        images = max(1, round((options.images or rates[name] * options.minutes * 60) / batch)) * batch
        return trained(name, seed, teachers[CONTESTANTS[name].adapted], images, options.out, results)

    with ThreadPoolExecutor(options.jobs) as pool:
        # Seed by seed, so that a table of fewer seeds is there early.
        tasks = {(name, seed): pool.submit(run, name, seed) for seed in options.seeds for name in options.methods}
        try:
            runs = {key: task.result() for key, task in tasks.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    head = ["", "images", "a CPU-second", "CPU-minutes", *(f"{what}, {n}" for what in ("FD", "accuracy") for n in NFE)]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name in options.methods:
        print(row(name, rates[name], [runs[name, seed] for seed in options.seeds]))


if __name__ == "__main__":
    main()
