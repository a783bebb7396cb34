"""Every method at equal compute: FD after the same CPU-minutes of one thread. Prints a table in Markdown.

    python benchmarks/digits_methods.py [--methods scd cosim ...] [--seeds 0 1 2] [--minutes 4] [--out DIR] [--jobs 1]
    python benchmarks/digits_methods.py --data tiles                                   # the other embedded set
    python benchmarks/digits_methods.py --methods scd scd-unadapted --images 320000    # what adaptation is for
    python benchmarks/digits_methods.py --table                                        # of what is in DIR
    python benchmarks/digits_methods.py --plot docs/methods.md                         # methods-digits.svg beside it

Each method trains by its recipe, with as many images as the minutes hold: a short calibration in CPU-seconds finds how
many, and what a run really took, with its start-up, stands beside. All have the same network and data. Not counted are
the shipped teacher's own training, and the adaptation to read t, which the methods of sCM start from; its cost is
printed. A method whose recipe is for several steps is measured in 1, 2, 4 and 8, at the recipe's noise levels where it
has some, on EDM's curve elsewhere. On tiles a method without a recipe of its own goes by that for digits, but for its
tuned second level. On a busy machine a CPU-second holds fewer images: leave it alone while the methods are calibrated,
one after the other.

A training is a process of its own; its memory, in MiB, is what it took beyond Python and torch. What is finished is in
DIR/NAME-SEED.json, and is not done again unless its recipe has changed; a run that was broken off starts anew. Several
of these commands may share a DIR, as long as each has methods of its own.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from edmdistill.atomic import atomic_write
from edmdistill.defaults import defaults
from edmdistill.embedded import EMBEDDED
from edmdistill.machine.engine import Machine
from edmdistill.recipes.library import load_recipe
from edmdistill.recipes.schema import Recipe
from edmdistill.report.chart import Chart, Curve
from edmdistill.report.curves import Axis
from edmdistill.report.page import save_chart
from edmdistill.training.loop import rounds
from edmdistill.training.prepare import prepare

NFE = (1, 2, 4, 8)


class Contestant(NamedTuple):
    """A method, its recipe, whether it starts from the teacher that reads t, and values laid over the recipe.

    after: the contestant whose generator of the same seed it starts from; all stages have equal shares of the minutes.
    """

    method: str
    recipe: str
    adapted: bool
    sets: tuple[str, ...] = ()
    after: str | None = None


GAN = (  # in the last third, where the scores are on too
    "method.gan=0.1",
    'method.gan_loss="relativistic"',
    "method.gan_warmup_images=6400",
    "method.gan_channels=32",
    'method.gan_augment=["translation"]',
    "training.lr_by_role.discriminator=1e-3",
)
LAGRANGIAN = (  # over AYF's intervals, all of some length
    'method.objective="lagrangian"',
    'method.times="interval"',
    "method.P_mean=-0.8",
    "method.P_std=1.0",
    "method.share_still=0.0",
    "method.warmup_images=0",
)
CONTESTANTS = {
    "cosim": Contestant("cosim", "cosim/digits-quickstart", adapted=False),
    "cosim+gan": Contestant("cosim", "cosim/digits-quickstart", adapted=False, sets=GAN),
    "sid": Contestant("sid", "sid/digits", adapted=False),
    "vsd": Contestant("vsd", "vsd/digits", adapted=False),
    "kd": Contestant("kd", "kd/digits", adapted=False),
    "kd-two-steps": Contestant("kd", "kd/digits-two-steps", adapted=False),
    "kd-four-steps": Contestant("kd", "kd/digits-four-steps", adapted=False),
    "pd": Contestant("pd", "pd/digits", adapted=False, sets=("method.steps=1",), after="pd-2"),
    "scd": Contestant("scd", "scd/digits", adapted=True),
    "scd-multistep": Contestant("scd", "scd/digits-multistep", adapted=True),
    "scd+vsd": Contestant("scd", "scd/digits-vsd", adapted=True),
    "sct": Contestant("sct", "sct/digits", adapted=True),
    "dscd": Contestant("dscd", "dscd/digits", adapted=True),
    "ctm": Contestant("ctm", "ctm/digits", adapted=False),
    "fmd": Contestant("fmd", "fmd/digits", adapted=True),
    "fmd-tangents": Contestant("fmd", "fmd/digits-tangents", adapted=True),
    "fmd-lagrangian": Contestant("fmd", "fmd/digits-tangents", adapted=True, sets=LAGRANGIAN),
    "mean-flow": Contestant("mean-flow", "mean-flow/digits", adapted=True),
    "ect": Contestant("ect", "ect/digits", adapted=False),
    "cd": Contestant("cd", "cd/digits", adapted=False),
    "dmd2": Contestant("dmd2", "dmd2/digits", adapted=False),
    "dmd2-two-steps": Contestant("dmd2", "dmd2/digits-two-steps", adapted=False),
    "ladd": Contestant("ladd", "ladd/digits", adapted=False),
    "sida": Contestant("sida", "sida/digits", adapted=False),
    "tcm": Contestant("tcm", "tcm/digits", adapted=False, after="ect"),
    "imm": Contestant("imm", "imm/digits", adapted=True),
    "scd-unadapted": Contestant("scd", "scd/digits", adapted=False, sets=("method.allow_edm_time=true",)),
}
STAGES = {
    f"pd-{n}": Contestant("pd", "pd/digits", False, (f"method.steps={n}",), f"pd-{2 * n}" if n < 32 else None)
    for n in (32, 16, 8, 4, 2)
}
"""Those before a contestant that has its number of steps from theirs. What they reach is in its row."""
ON_TILES: dict[str, dict[str, Any]] = {
    "cosim": {"recipe": "cosim/tiles"},
    "cosim+gan": {"recipe": "cosim/tiles"},
    # The solver needs 16 steps there (see cosim/tiles); half the batch, so that a round costs the same.
    "fmd": {"sets": ("method.trajectory_steps=16", "training.batch=8")},
    "kd": {"sets": ("method.trajectory_steps=16",)},
}


class Race(NamedTuple):
    """The embedded set that all methods train on, and the folder of what is measured."""

    data: str
    out: Path

    @property
    def teacher(self) -> Path:
        return EMBEDDED[self.data].teacher

    @property
    def adapt(self) -> str:
        """The recipe that trains the shipped teacher further once it reads t."""
        return f"diffusion/{self.data}-adapt"

    @property
    def metrics(self) -> dict[str, str]:
        """What is measured, and how it is printed."""
        return {f"fd_{self.data}": ".3g", "class_accuracy": ".3f"}

    def contestant(self, name: str) -> Contestant:
        """A contestant with what differs on this set: on tiles, EDM's curve where the recipe has digits' levels."""
        contestant = (CONTESTANTS | STAGES)[name]
        if self.data != "tiles":
            return contestant
        contestant = contestant._replace(**ON_TILES.get(name, {}))
        tuned = "2" in load_recipe(contestant.recipe).sampling.sigmas
        return contestant._replace(sets=contestant.sets + ("sampling.sigmas.2=[80.0, 2.515]",) * tuned)

    def stages(self, name: str) -> list[str]:
        """The contestants that train one after the other, the named one last."""
        after = self.contestant(name).after
        return [*([] if after is None else self.stages(after)), name]


class Entry(NamedTuple):
    """A measurement in a JSON file of its own, made on a data set by certain recipes."""

    file: Path
    made_by: str

    def known(self) -> dict[str, Any] | None:
        """What is in the file, if it was made by these."""
        values: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        return values if values.get("made_by") == self.made_by else None

    def add(self, **values: Any) -> dict[str, Any]:
        values = {"made_by": self.made_by, "date": time.strftime("%Y-%m-%d"), **values}
        with atomic_write(self.file) as new:
            new.write_text(json.dumps(values, indent=2) + "\n")
        return values


def cpu_seconds_of(log: Path, *arguments: object) -> float:
    """Runs `edmdistill ARGUMENTS` on one thread and returns its CPU time; what it says goes to a file."""
    words = list(map(str, arguments))
    # A cache of its own, because two evaluations at a time refuse to measure one reference in the same folder.
    extra = {"OMP_NUM_THREADS": "1", "EDMDISTILL_CACHE": str(log.parent / "cache" / log.stem)}
    with log.open("a") as file:
        command = [sys.executable, "-m", "edmdistill", *words]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | extra)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"edmdistill {' '.join(words)} ended with {process.returncode}; {log} says why")
    return usage.ru_utime + usage.ru_stime


def recipe_of(race: Race, name: str, **training: int) -> tuple[Recipe, str, list[str]]:
    """A contestant's recipe, all that decides its results, and the overrides as words of a command.

    What a recipe's [method] counts in images, as warm-ups and ECT's stages, keeps its share of a run of other length.
    """
    method, recipe, adapted, values, _ = race.contestant(name)
    sets = [*values, *(f"training.{key}={value}" for key, value in training.items())]
    whole = load_recipe(recipe, method, values)
    share = training.get("images", whole.training.images) / whole.training.images
    counts = {key: value for key, value in defaults(whole.method).items() if key.endswith("_images")}
    counts = {
        key: getattr(whole.method, key) for key, usual in counts.items() if getattr(whole.method, key) not in (0, usual)
    }
    sets += [f"method.{key}={max(1, round(share * images))}" for key, images in counts.items()]
    resolved = load_recipe(recipe, method, sets)
    made_by = [race.data, resolved.hash, *([load_recipe(race.adapt).hash] if adapted else [])]
    return resolved, " ".join(made_by), [word for override in sets for word in ("--set", override)]


def adapted_teacher(race: Race) -> Path:
    """The shipped teacher, made to read t and trained on; made once."""
    recipe = load_recipe(race.adapt)
    run, converted, log = race.out / "adapted", race.out / "adapted-start", race.out / "adapted.log"
    entry = Entry(race.out / "adapted.json", recipe.hash)
    if (made := entry.known()) is None:
        print("adapted: convert --time-embedding positional, train diffusion", flush=True)
        for old in (run, converted):
            shutil.rmtree(old, ignore_errors=True)
        cpu_seconds_of(log, "convert", race.data, converted, "--time-embedding", "positional")
        options = "--data", race.data, "--recipe", race.adapt, "--run-dir", run, "--device", "cpu"
        spent = cpu_seconds_of(log, "train", "diffusion", converted, *options)
        made = entry.add(cpu_seconds=spent, images=recipe.training.images)
    print(f"adapted: {made['images']:,} images, {made['cpu_seconds']:.0f} CPU-seconds, not counted below", flush=True)
    return run


def images_per_second(race: Race, name: str, teacher: Path, seconds: float) -> float:
    """Images that a method sees in a CPU-second, once its first round is over."""
    recipe, made_by, _ = recipe_of(race, name)
    entry = Entry(race.out / f"{name}-calibration.json", made_by)
    if (made := entry.known()) is None:
        run = prepare(recipe, data=race.data, teacher=teacher, machine=Machine(device="cpu"))
        steps = rounds(run)
        next(steps)
        first, start = run.images, time.process_time()
        while (spent := time.process_time() - start) < seconds:
            next(steps)
        made = entry.add(images_per_second=(run.images - first) / spent)
    print(f"{name}: {made['images_per_second']:.0f} images a CPU-second", flush=True)
    return float(made["images_per_second"])


def trained(
    race: Race, name: str, seed: int, teacher: Path, images: int, run: Path, before: dict[str, Any]
) -> dict[str, Any]:
    """Trains a contestant in a folder and measures it, or knows it already.  before: what its first stage returned"""
    method, recipe, *_ = race.contestant(name)
    resolved, made_by, sets = recipe_of(race, name, images=images, seed=seed, snapshot_every=images)
    entry = Entry(run.with_suffix(".json"), made_by)
    if (made := entry.known()) is not None:
        return made
    print(f"{run.name}: {images:,} images", flush=True)
    log, evaluation = run.with_suffix(".log"), run / "eval.json"
    shutil.rmtree(run, ignore_errors=True)
    options = "--data", race.data, "--recipe", recipe, "--run-dir", run, "--device", "cpu"
    spent = before.get("cpu_seconds", 0) + cpu_seconds_of(log, "train", method, teacher, *options, *sets)
    nfe = [str(n) for n in (NFE if len(resolved.sampling.nfe) > 1 else resolved.sampling.nfe)]
    asked = "--protocol", race.data, "--nfe", ",".join(nfe), "--device", "cpu"
    cpu_seconds_of(log, "eval", run, *asked, "--out", evaluation)
    metrics = [result["metrics"] for result in json.loads(evaluation.read_text())["results"]]
    scores = {metric: dict(zip(nfe, (each[metric] for each in metrics), strict=True)) for metric in race.metrics}
    scores = {metric: before.get(metric, {}) | values for metric, values in scores.items()}
    values = ", ".join(f"{value:.3g} in {n}" for n, value in scores[f"fd_{race.data}"].items())
    memory = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["memory"] / 2**20
    print(f"{run.name}: {race.data}-FD {values}, after {spent / 60:.2f} CPU-minutes", flush=True)
    return entry.add(images=images, cpu_seconds=spent, memory=memory, **scores)


def cell(values: list[float], form: str, spread: bool = True) -> str:
    """The mean, and the standard deviation if asked for and there are two values or more; a dash if there is none."""
    if not values:
        return "-"
    deviation = f" ± {plain(statistics.stdev(values), '.2g')}" if spread and len(values) > 1 else ""
    return f"{plain(statistics.mean(values), form)}{deviation}"


def plain(value: float, form: str) -> str:
    """The number in this form, but without an exponent."""
    text = f"{value:{form}}"
    return f"{float(text):.0f}" if "e+" in text else text


def heading() -> list[str]:
    """The first two lines of the table."""
    scores = [f"{what}, {n}" for what in ("FD", "accuracy") for n in NFE]
    head = ["", "seeds", "images", "a CPU-second", "MiB", "CPU-minutes", *scores]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]


def row(name: str, runs: list[dict[str, Any]], metrics: dict[str, str]) -> str:
    """A contestant's line of the table."""
    seconds, memory = ([run[key] for run in runs] for key in ("cpu_seconds", "memory"))
    speed = sum(run["images"] for run in runs) / sum(seconds)
    cells = [f"`{name}`", f"{len(runs)}", f"{runs[0]['images']:,}", f"{speed:.0f}", f"{max(memory):.0f}"]
    cells.append(cell([each / 60 for each in seconds], ".2f", spread=False))
    for metric, form in metrics.items():
        values = ([run[metric][str(n)] for run in runs if str(n) in run[metric]] for n in NFE)
        cells += [cell(each, form, spread=metric.startswith("fd")) for each in values]
    return f"| {' | '.join(cells)} |"


def chart(page: str, data: str) -> Chart:
    """FD by number of steps, a curve a row of the table in Markdown above the picture methods-DATA.svg."""
    table = re.search(rf"^((?:\|.*\n)+)\n!\[.*\]\(methods-{data}\.svg\)$", page, re.MULTILINE)
    if table is None:
        sys.exit(f"no table stands above a picture methods-{data}.svg")
    head, _, *rows = ([cell.strip(" `") for cell in line[1:-1].split("|")] for line in table[1].splitlines())
    curves, styles = [], list(CONTESTANTS)  # so that a method looks the same on either set
    for cells in rows:
        known = dict(zip(head, cells, strict=True))
        values = {float(n): known[f"FD, {n}"].split(" ± ") for n in NFE if known[f"FD, {n}"] != "-"}
        points = [(n, float(mean)) for n, (mean, *_) in values.items()]
        deviations = {n: float(spread) for n, (_, *some) in values.items() for spread in some}
        curves.append(Curve(cells[0], points, deviations, styles.index(cells[0])))
    return Chart(f"{data}-FD by number of steps, at equal compute", curves, Axis([*map(float, NFE)], log=True))


def draw(page: Path, data: str) -> None:
    """Draws methods-DATA.svg beside a page from its table."""
    save_chart(chart(page.read_text("utf-8"), data), page.with_name(f"methods-{data}.svg"), ".svg")


def main() -> None:
    parser = argparse.ArgumentParser()
    usual = [name for name in CONTESTANTS if name != "scd-unadapted"]
    parser.add_argument("--methods", nargs="+", choices=CONTESTANTS, default=usual)
    parser.add_argument("--data", choices=EMBEDDED, default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=4, help="CPU-minutes of one training")
    parser.add_argument("--images", type=int, help="of one training, in the place of minutes")
    parser.add_argument("--out", type=Path, help="where runs and results lie; default: runs/DATA-methods")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--table", action="store_true", help="train nothing: the table of what --out holds")
    instead.add_argument("--plot", type=Path, metavar="PAGE", help="train nothing: draw FD of a Markdown page's table")
    options = parser.parse_args()
    if options.plot:
        draw(options.plot, options.data)
        return
    torch.set_num_threads(1)
    race = Race(options.data, options.out or Path(f"runs/{options.data}-methods"))
    race.out.mkdir(parents=True, exist_ok=True)
    if not options.table:
        measure(race, options)
    files = {name: [race.out / f"{name}-{seed}.json" for seed in options.seeds] for name in options.methods}
    by_name = {name: [json.loads(file.read_text()) for file in each if file.exists()] for name, each in files.items()}
    print("", *heading(), *(row(name, runs, race.metrics) for name, runs in by_name.items() if runs), sep="\n")


def measure(race: Race, options: argparse.Namespace) -> None:
    """Trains and measures what is not yet in DIR."""
    chains = {name: race.stages(name) for name in options.methods}
    adapted = {name: race.contestant(stages[0]).adapted for name, stages in chains.items()}
    teachers = {False: race.teacher} | ({True: adapted_teacher(race)} if any(adapted.values()) else {})

    def images(name: str, teacher: Path, stages: int) -> int:
        batch = recipe_of(race, name)[0].training.batch
        wanted = (options.images or 0) / stages
        if not wanted:
            seconds = options.minutes * 60 / stages
            wanted = seconds * images_per_second(race, name, teacher, seconds / 24)
        return max(1, round(wanted / batch)) * batch

    lengths = {name: images(name, teachers[adapted[name]], 1) for name, stages in chains.items() if len(stages) == 1}

    def run(name: str, seed: int) -> None:
        teacher, made, stages = teachers[adapted[name]], dict[str, Any](), chains[name]
        for stage in stages:
            folder = race.out / f"{name}-{seed}{'' if stage == name else f'-{stage}'}"
            length = lengths.get(name) or images(stage, teacher, len(stages))
            made, teacher = trained(race, stage, seed, teacher, length, folder, made), folder

    with ThreadPoolExecutor(options.jobs) as pool:
        # Seed by seed, so that a table of fewer seeds is there early.
        tasks = [pool.submit(run, name, seed) for seed in options.seeds for name in options.methods]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
