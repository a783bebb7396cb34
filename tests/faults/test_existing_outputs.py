"""One rule for all commands: what a command makes replaces nothing unasked; what it prints is written anew."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from golden_set import GOLDEN
from tiny_generator import tiny_generator

from edmdistill.cli import main
from edmdistill.cli.types import OutputPath

PRODUCTS = {
    "convert": "convert TEACHER OUT",
    "sample": "sample GENERATOR --nfe 1 --seeds 0-1 --device cpu --out OUT.npz",
    "ema": "ema SNAPSHOTS --sigma-rel .075 --out OUT",
    "export": "export GENERATOR --to nvidia --out OUT",
    "data prepare": "data prepare PICTURES OUT.zip --resolution 8 --transform center-crop",
    "data encode": "data encode PICTURES OUT.zip --vae VAE --device cpu",
    "data stats": "data stats digits OUT.npz --features pixels --split test --device cpu",
    "recipes copy": "recipes copy cosim/digits OUT.toml",
}
PRINTED = {"eval", "sweep", "compare", "report"}
"""Results, tables, plots and pages: also shown, or made again in a moment."""
GROWS = {"train"}
"""A run, which the same command continues, and no other may touch: training/test_run_dir.py."""


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        assert found is not None
        if isinstance(found, click.Group):
            yield from commands(found, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", found


def test_every_command_that_writes_is_of_one_kind() -> None:
    writing = {
        name: {parameter.name for parameter in command.params}
        for name, command in commands(main)
        if any(isinstance(parameter.type, OutputPath) for parameter in command.params)
    }
    work = {"tune-schedule"}  # its --work alone
    assert set(writing) - work == {*PRODUCTS, *PRINTED, *GROWS}
    assert {name for name, parameters in writing.items() if "overwrite" in parameters} == set(PRODUCTS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    generator = tiny_generator(tmp_path_factory.mktemp("source") / "generator")
    return {
        "GENERATOR": str(generator),
        "TEACHER": str(GOLDEN / "edm-tiny-cond.pkl"),
        "SNAPSHOTS": str(generator),
        "PICTURES": str(GOLDEN / "prepare" / "source"),
        "VAE": str(GOLDEN / "evaluation" / "latents" / "tiny-vae"),
    }


@pytest.mark.parametrize("line", PRODUCTS.values(), ids=PRODUCTS)
def test_what_a_command_makes_replaces_nothing_unasked(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [sources.get(word, word) for word in line.split()]
    (out,) = (Path(word) for word in words if word.startswith("OUT"))
    out.write_text("mine")
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2, refused.output
    assert "choose another" in refused.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {out.name: "mine"}
    if out.suffix in (".npz", ".toml"):  # the others are tested beside their commands
        assert CliRunner().invoke(main, [*words, "--overwrite", "--quiet"]).exit_code == 0
        assert out.read_bytes() != b"mine"


@pytest.mark.parametrize("name", ["data prepare", "data encode"])
@pytest.mark.parametrize(
    ("mark", "offset", "value"),
    [(b"PK\1\2", 8, 1), (b"PK\1\2", 10, 99), (b"dataset.json", 12, 0xFF)],
    ids=["encrypted", "unknown method", "damaged"],
)
def test_a_zip_that_cannot_be_read_is_not_ours(
    sources: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mark: bytes,
    offset: int,
    value: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("OUT.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset.json", '{"labels": null}')
    content = bytearray(Path("OUT.zip").read_bytes())
    content[content.index(mark) + offset] = value
    Path("OUT.zip").write_bytes(content)
    refused = CliRunner().invoke(main, [sources.get(word, word) for word in PRODUCTS[name].split()])
    assert (refused.exit_code, refused.stderr) == (
        2,
        "Error: OUT.zip already exists: choose another name, or add --overwrite\n",
    )
    assert Path("OUT.zip").read_bytes() == content
