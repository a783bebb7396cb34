"""Commands on the emulated device, beside the same on the CPU, in a process of its own.

commands.py '[[word, ...], ...]' prints what each command says on both, as pairs. TEACHER, GUIDE and GENERATOR are
checkpoints of tiny networks, picture.png is as large as their images, and OUT.npz stands for a file of each device.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
from click.testing import CliRunner
from emulated_device import DEVICE, emulated
from PIL import Image
from solvers import make_model

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.cli import main


def save(kind: str, folder: Path) -> None:
    model = make_model("generator" if kind == "generator" else "teacher", "edm")
    if kind == "guide":
        with torch.no_grad():
            next(model.flow.parameters()).mul_(0.5)
    teacher = CheckpointConfig(stage="teacher", provenance=Provenance(source="a test"), **describe(model.flow))
    save_checkpoint(folder, model.flow, model.config if isinstance(model, Generator) else teacher)


def said(words: list[str], device: str) -> str:
    result = CliRunner().invoke(main, [*words, "--device", device])
    if result.exit_code:
        raise RuntimeError(result.output + "".join(traceback.format_exception(result.exception)))
    return result.stdout


def compare(number: int, words: list[str]) -> list[str]:
    outputs = []
    for device in ("cpu", DEVICE):
        names = {"OUT.npz": f"{device}-{number}.npz"}
        words_here = [names.get(word, word) for word in words]
        if device == "cpu":
            outputs.append(said(words_here, device))
        else:
            with emulated():
                outputs.append(said(words_here, device))
    return outputs


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in ("teacher", "guide", "generator"):
        save(kind, Path(kind.upper()))
    Image.linear_gradient("L").resize((8, 8)).save("picture.png")
    print(json.dumps([compare(number, words) for number, words in enumerate(json.loads(sys.argv[1]))]))
