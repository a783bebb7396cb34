"""The commands in README.md and docs/ are commands: their options, recipes and official files exist."""

import json
import re
import shlex
import tomllib
from contextlib import suppress
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edmdistill.checkpoints.official_files import is_official, presets
from edmdistill.cli import main
from edmdistill.recipes.library import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The commands that stand on lines of their own, without `edmdistill`."""
    lines = re.sub(r"\\\n\s*", "", page.read_text()).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in map(str.strip, lines) if line.startswith("edmdistill ")]


def quoted(page: Path) -> list[list[str]]:
    """The commands with options inside a sentence, which may leave out what is not its subject."""
    found = re.findall(r"`edmdistill ([a-z-]+ [^`\n]*--[^`\n]*)`", page.read_text().replace("\n", " "))
    return [shlex.split(words) for words in found if "TARGET" not in words]


def parsed(words: list[str]) -> click.Context:
    """A command line after its options and arguments were read, and before it does anything."""
    command: click.Command | None = main
    context = click.Context(main)
    while isinstance(command, click.Group):
        name, *words = words
        command = command.get_command(context, name)
    assert command is not None, f"there is no command {name}"
    return command.make_context(name, words, context)


def check(words: list[str]) -> None:
    """Fails if a command line has other options, recipes or official files than there are."""
    for word in words:
        if word.endswith(".json"):  # of the commands before, some of which must exist
            Path(word).touch()
    parameters = parsed(words).params
    if words[0] in ("train", "plan") and "/" in parameters["recipe"]:
        assert load_recipe(parameters["recipe"], parameters.get("method"), parameters["sets"])
    if words[0] == "fetch":
        unknown = [name for name in parameters["names"] if not is_official(name) and name not in presets()]
        assert unknown in ([], ["NAME"], ["list"])


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_are_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        check(words)
    for words in quoted(page):
        with suppress(click.MissingParameter):
            check(words)


def test_the_walks_have_their_commands() -> None:
    for name, last in (("imagenet.md", "edm2-s.json"), ("cifar10.md", "edm.json")):
        (report,) = (words for words in commands(ROOT / "docs" / name) if words[0] == "report")
        assert report[-1] == last


@pytest.mark.slow  # four plans of real networks
@pytest.mark.parametrize(
    ("page", "recipe", "network", "row"),
    [
        ("cifar10", "cosim/cifar10", "ddpmpp-cifar10", "| L40S (48 GB) | {l40s} | {l40s_days} "),
        *(
            (
                "imagenet",
                f"cosim/imagenet512-{size}",
                f"edm2-img512-{size}",
                "| {one} GB | {l40s} | {h100} | {l40s_days} | {h100_days} |",
            )
            for size in "sml"
        ),
    ],
)
def test_the_pages_say_what_the_plan_says(page: str, recipe: str, network: str, row: str) -> None:
    words = ["plan", recipe, "--network", network, "--processes", "8", "--gpu", "l40s", "--gpu", "h100", "--json"]
    plan = json.loads(CliRunner().invoke(main, words).stdout)
    values = {"one": f"{plan['peak']['one_image'] / 1e9:.1f}"}
    for gpu in plan["gpus"]:
        values |= {gpu["gpu"]: str(gpu["largest_micro_batch"]), f"{gpu['gpu']}_days": f"{gpu['days']:#.2g}"}
    assert row.format(**values) in (ROOT / "docs" / f"{page}.md").read_text()


def test_the_ci_tries_every_python_that_the_package_claims() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    tried = re.search(r"python: \[(.*)\]", workflow)
    assert tried is not None
    assert claimed == re.findall(r"3\.\d+", tried[1])
    assert project["requires-python"] == f">={claimed[0]}"
    listed = f"on Python {', '.join(claimed[:-1])} and {claimed[-1]}"
    assert listed in (ROOT / "CONTRIBUTING.md").read_text()
