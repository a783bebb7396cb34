"""`edmdistill data encode`: what it writes and says, again after it is done, and after a kill in the middle."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from waiting import wait_until

from edmdistill.cli import main
from edmdistill.data.datasets import open_dataset


def make_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:04d}.png")
    (folder / "dataset.json").write_text(json.dumps({"labels": [[f"{i:04d}.png", i % 2] for i in range(count)]}))
    return folder


def test_another_precision_overwrites(golden: Path, tmp_path: Path) -> None:
    images, out = make_images(tmp_path / "images", 2), tmp_path / "a.zip"
    (images / "notes.txt").touch()
    words = ["data", "encode", images, out, "--vae", golden / "evaluation/latents/tiny-vae", "--device", "cpu"]
    first = CliRunner().invoke(main, [*map(str, words)])
    assert "left out 1 file: not an image (notes.txt)" in first.stderr
    exact = open_dataset(out).tensors(range(2))[0]
    assert CliRunner().invoke(main, [*map(str, words), "--dtype", "bf16", "--overwrite"]).exit_code == 0
    rounded = open_dataset(out).tensors(range(2))[0]
    assert 0 < (exact - rounded).abs().max() < 0.1


def test_encode(golden: Path, tmp_path: Path) -> None:
    images, vae = make_images(tmp_path / "images", 3), str(golden / "evaluation/latents/tiny-vae")
    arguments = ["data", "encode", str(images), str(tmp_path / "a.zip"), "--vae", vae, "--xflip", "--dtype", "bf16"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "Latents of the first 6 images, by channel: mean" in result.stderr
    assert "They differ much" in result.stderr
    assert "a.zip: 6 latents of 2x2 with 4 channels" in result.stderr
    assert open_dataset(tmp_path / "a.zip").class_counts == [4, 2]
    assert "already holds 6 latents of this set" in CliRunner().invoke(main, arguments).stderr
    refused = CliRunner().invoke(main, [*arguments, "--range", "scm"])
    assert (refused.exit_code, "exists and holds something else" in refused.stderr) == (2, True)
    for options in [], ["--processes", "8", "--device", "cpu"]:  # before any process is started
        none = CliRunner().invoke(main, [*arguments[:3], str(tmp_path / "b.zip"), "--vae", "nothing", *options])
        assert (none.exit_code, len(none.stderr.splitlines())) == (2, 1)
        assert "there is no VAE nothing" in none.stderr


@pytest.mark.slow  # four processes import torch and diffusers
def test_a_killed_command_goes_on(golden: Path, tmp_path: Path) -> None:
    images, vae = make_images(tmp_path / "images", 400), str(golden / "evaluation/latents/tiny-vae")

    def arguments(name: str) -> list[str]:
        return ["data", "encode", str(images), str(tmp_path / name), "--vae", vae, "--device", "cpu"]

    command = [sys.executable, "-m", "edmdistill", *arguments("a.zip"), "--processes", "2"]
    process = subprocess.Popen(command, start_new_session=True)
    journal = tmp_path / ".a.zip.parts" / "journal"
    wait_until(lambda: process.poll() is not None or (journal.exists() and np.fromfile(journal, np.uint64).any()))
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)  # the two others die with it
    process.wait()
    for name in ("a.zip", "b.zip"):
        result = CliRunner().invoke(main, arguments(name))
        assert result.exit_code == 0, result.output
    resumed, whole = open_dataset(tmp_path / "a.zip"), open_dataset(tmp_path / "b.zip")
    moments, expected = (data.tensors(range(400))[0].numpy() for data in (resumed, whole))
    np.testing.assert_allclose(moments, expected, rtol=0, atol=1e-5)
    assert resumed.labels_sha256 == whole.labels_sha256
