"""kill -9 at random moments of every command that writes: nothing is lost, and the next good run leaves nothing behind.

After a kill, all that the command is not making anew is what it was, and what it replaces is the old or the new, whole.
After the same command has come to its end, the folder is the one that a life without kills leaves, and the folder for
temporary files is empty.
"""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from golden_set import GOLDEN
from hub_server import TOKEN, Hub, hub
from picture_files import encoded, write_folder
from safetensors.numpy import load as load_tensors

LIVES = Path(__file__).with_name("lives.py")
PROBE = re.compile(r"[a-z0-9_]{8}")
SCRATCH = re.compile(r"(^|/)\.[^/]+\.([0-9a-f]{8}\.new|parts)|^tmp:")
"""What a killed command may leave for the next to remove."""
REPLACED = re.compile(r"^new/generator/")
"""What a run writes anew at every snapshot: it may be that of any of them, but is never missing."""
PRUNED = re.compile(r"^new/(state|.*\.jsonl)")
"""What a run prunes and cuts back."""
VOLATILE = {"images_per_second", "memory", "seconds", "window"}
"""Keys of what differs from run to run: times and memory; a state's window holds some."""
RECIPE = """
[method]
name = "sid"

[training]
images = 48
batch = 8
lr = 1e-2
log_every = 8
snapshot_every = 16
keep = 3
dropout = 0.1

[ema]
half_life_images = 50

[sampling]
nfe = [1]
"""
TRAIN = "train sid teacher --data digits --recipe recipe.toml --device cpu --run-dir"
COMMANDS = {
    "train": f"{TRAIN} new",
    "convert": "convert edm-tiny-cond.pkl converted --overwrite",
    "sample": "sample run --nfe 1 --seeds 0-63 --batch 16 --device cpu --out drawn",
    "sample-npz": "sample run --nfe 1 --seeds 0-63 --batch 16 --device cpu --out drawn.npz",
    "eval": "eval run --protocol digits --nfe 1 --n 50 --device cpu --save --out result.json",
    "export": "export run --to nvidia --out exported --overwrite",
    "report": "report run",
    "sweep": "sweep run --protocol digits --nfe 1 --n 50 --device cpu --out swept.json --plot swept.svg",
    "push-to-hub": "push-to-hub run me/it",
    "prepare": "data prepare pictures prepared.zip --resolution 8 --transform center-crop --workers 1 --overwrite",
}
NEW = {"train": "new", "sample": "drawn", "sample-npz": "drawn.npz"}
"""What a command makes that would not make it again."""
KILLS = {"train": 24, "sample": 12, "sample-npz": 8, "convert": 12, "eval": 10, "export": 10, "report": 8, "sweep": 8}
KILLS |= {"push-to-hub": 8, "prepare": 12}


class Life(NamedTuple):
    status: int
    touches: int
    seconds: float


class World:
    """A folder in which commands live; `hub` is its Hub."""

    def __init__(self, folder: Path, process: subprocess.Popen[str], hub: Hub) -> None:
        self.folder, self.process, self.hub = folder, process, hub

    def live(self, command: str, touches: int | None = None, seconds: float | None = None) -> Life:
        wish = {"argv": command.split(), "touches": touches, "seconds": seconds}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(wish), file=self.process.stdin, flush=True)
        return Life(**json.loads(self.process.stdout.readline()))

    def good(self, command: str) -> Life:
        life = self.live(command)
        assert life.status == 0, f"{command}: {(self.folder.parent / 'said.txt').read_text()}"
        return life

    def holds(self) -> dict[str, Any]:
        """Returns all that is in the folder, on the Hub, and among temporary files, without times and versions."""
        paths = {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*"))}
        left_out = ".lock", "sessions.jsonl"  # about the process
        found = {name: content(name, path) for name, path in paths.items() if path.name not in left_out}
        for name, repository in self.hub.repositories.items():
            head = repository.commits[repository.branches["main"]]
            found |= {f"hub:{name}/{file}": parsed(file, data) for file, data in head.items()}
        # Python itself tries a temporary folder by a file of eight letters, which a kill at that moment leaves there.
        temporary = [path for path in (self.folder.parent / "tmp").iterdir() if not PROBE.fullmatch(path.name)]
        return found | {f"tmp:{path.name}": None for path in temporary}


def content(name: str, path: Path) -> Any:
    return None if SCRATCH.search(name) or path.is_dir() else parsed(name, path.read_bytes())


def parsed(name: str, data: bytes) -> Any:
    """Returns what a file says, but what differs between two runs of the same command; fails if it is not whole."""
    if name.endswith(".safetensors"):
        return {key: array.tobytes() for key, array in load_tensors(data).items()}
    if name.endswith(".npz"):
        return {key: array.tobytes() for key, array in np.load(io.BytesIO(data)).items()}
    if name.endswith(".json"):
        return steady(json.loads(data))
    if name.endswith(".jsonl"):
        return [steady(json.loads(line)) if line.endswith(b"}") else line for line in data.splitlines()]
    if name.endswith((".html", ".svg", ".md")):
        assert data.endswith(b"\n") or data.rstrip().endswith((b"</html>", b"</svg>")), f"{name} is cut"
        return "whole"
    return data


def steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: steady(part) for key, part in value.items() if key not in VOLATILE}
    return [steady(part) for part in value] if isinstance(value, list) else value


@contextmanager
def world(folder: Path, teacher: Path) -> Iterator[World]:
    (folder / "world").mkdir(parents=True)
    (folder / "tmp").mkdir()
    (folder / "world" / "recipe.toml").write_text(RECIPE)
    (folder / "world" / "edm-tiny-cond.pkl").write_bytes((GOLDEN / "edm-tiny-cond.pkl").read_bytes())
    (folder / "world" / "teacher").symlink_to(teacher)
    write_folder(folder / "world" / "pictures", {f"{i % 3}/{i:02}.png": encoded(i, 12, 9) for i in range(40)})
    with hub() as server:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONWARNINGS": "ignore",
            "TMPDIR": str(folder / "tmp"),
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, str(LIVES), str(folder / "world")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as process:
            try:
                yield World(folder / "world", process, server)
            finally:
                process.kill()


def kill(world: World, name: str, kills: int, numbers: random.Random) -> None:
    """Kills a command so often, with a good run after one to three times."""
    command = COMMANDS[name]
    world.good(command)  # imports
    forget(world, name)
    whole = world.good(command)
    expected = world.holds()
    while kills:
        forget(world, name)
        for _ in range(numbers.randint(1, 3)):
            before = world.holds()
            moment = {"touches": numbers.randint(1, whole.touches)}
            if numbers.random() < 0.5:
                moment = {"seconds": numbers.uniform(0, whole.seconds)}
            life = world.live(command, **moment)
            assert life.status in (0, -signal.SIGKILL), (world.folder.parent / "said.txt").read_text()
            kills -= bool(life.status and kills)
            now = world.holds()
            kept = {file: what for file, what in before.items() if not (SCRATCH.search(file) or PRUNED.search(file))}
            lost = [
                file
                for file, what in kept.items()
                if now.get(file) not in (what, expected.get(file)) and not (file in now and REPLACED.search(file))
            ]
            assert not lost, f"{name}, {moment}: {lost}"
            assert newest_state(now) >= newest_state(before)
        world.good(command)
        now = world.holds()
        assert now.keys() == expected.keys(), f"{name}, {moment}"
        assert now == expected, f"{name}, {moment}"


def newest_state(holds: dict[str, Any]) -> str:
    return max((file for file in holds if re.fullmatch(r"new/state/\d+/progress.json", file)), default="")


def forget(world: World, name: str) -> None:
    if name in NEW:
        shutil.rmtree(world.folder / NEW[name], ignore_errors=True)
        (world.folder / NEW[name]).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("killed"), teacher) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_hundred_kills(name: str, place: World) -> None:
    if not (place.folder / "run").exists():
        place.good(f"{TRAIN} run")
    kill(place, name, KILLS[name], random.Random(name))


@pytest.mark.slow  # tests/test_atomic.py kills a write at each of its system calls
def test_five_kills(place: World) -> None:
    kill(place, "convert", 5, random.Random(1))
