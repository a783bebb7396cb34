"""Run directories with all that a report reads, and the outline and tables of its page."""

import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edmdistill.checkpoints.config import CheckpointConfig, NetworkSpec, Provenance
from edmdistill.recipes.library import find_recipe, load_recipe

SMALL = {"img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_channels": 8, "channel_mult": [1]} | {
    "num_blocks": 1,
    "attn_resolutions": [],
}
SESSION = {
    "images": 0,
    "began": "2026-11-21T09:10:11+00:00",
    "edmdistill": "0.1",
    "revision": "a" * 40,
    "python": "3.11",
    "torch": "2.13",
    "cuda": "13.0",
    "system": "Linux",
    "device": "NVIDIA H100 80GB HBM3",
    "device_memory": 85_000_000_000,
    "processes": 1,
    "micro_batch": None,
    "shard": False,
    "offload": [],
    "checkpointing": False,
}


VOID = {"meta", "img", "path", "circle", "polygon", "polyline"}


class Outline(HTMLParser):
    """Every tag with its attributes; fails where tags do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.page = page
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def require_nothing_else(self) -> None:
        """Fails where the page loads something or runs a script."""
        assert self.count("script") == self.count("link") == 0
        for tag, attributes in self.tags:
            assert not attributes.keys() & {"href", "srcset", "onload", "onclick", "style"}
            assert (attributes.get("src", "data:") or "").startswith("data:"), tag
        assert "url(" not in self.page
        assert "@import" not in self.page


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A run directory before its first round."""
    run = tmp_path / "my run"
    (run / "samples").mkdir(parents=True)
    recipe = load_recipe("cosim/digits-quickstart", "cosim", ["training.images=1000"])
    (run / "recipe.resolved.json").write_bytes(recipe.to_json())
    source = find_recipe("cosim/digits-quickstart")._replace(text="# if a < b & c: <script>\n[method]\n")
    text = source.text_with_command(["training.images=1000", "training.betas=[0.0, 0.9]"])
    (run / "recipe.toml").write_text(text)
    data = {"name": "digits", "images": 1500, "resolution": 8, "channels": 1, "classes": 10}
    (run / "run.json").write_text(json.dumps({"teacher_sha256": "ab" * 32, "data": data}))
    return run


@pytest.fixture
def full(bare: Path) -> Path:
    """A finished one: metrics, samples, a checkpoint."""
    lines = [
        {"images": i * 10, "step": i, "seconds": i / 10, "images_per_second": 100.0, "loss/generator": (-1.0) ** i}
        | {"memory": 250_000_000, "score_gap": 1 / i, "own_signal": math.nan if i == 3 else 1.0}
        for i in range(1, 101)
    ]
    (bare / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for images in (0, 250, 500, 750, 1000):
        Image.fromarray(np.full((270, 338), images // 4, np.uint8)).save(bare / "samples" / f"{images:09d}.png")
    Image.fromarray(np.zeros((100, 3000, 3), np.uint8)).save(bare / "images-grid.png")
    config = CheckpointConfig(
        stage="generator",
        network=NetworkSpec("edm2", SMALL),
        preconditioning={"kind": "edm"},
        c_noise="log(sigma)/4",
        sigma_data=0.5,
        sigma_min=0.002,
        sigma_max=80.0,
        label_dim=10,
        two_time=False,
        images_seen=1000,
        provenance=Provenance(source="https://a.b/<teacher>.pkl", sha256="12" * 32, licence="cc-by-nc-sa-4.0"),
    )
    sessions = [SESSION, SESSION | {"images": 500}, SESSION | {"images": 800, "revision": None, "micro_batch": 8}]
    (bare / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sessions))
    (bare / "generator").mkdir()
    (bare / "generator" / "config.json").write_bytes(msgspec.json.encode(config))
    return bare


def cells(page: str, section: str) -> dict[str, list[str]]:
    """The rows of a section's table, by their first cell."""
    body = page.partition(f"<h2>{section}</h2>")[2].partition("</section>")[0]
    rows = [re.findall("<td>(.*?)</td>", row, re.DOTALL) for row in re.findall("<tr>(.*?)</tr>", body, re.DOTALL)]
    return {unescape(first): [unescape(cell) for cell in rest] for first, *rest in rows}
