"""Sentences of the library name options of the command that meets them, or the command whose options they are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edmdistill.cli import main

PACKAGE = Path(__file__).parent.parent.parent / "edmdistill"
MEASURE = "eval", "sweep", "tune-schedule"
SAMPLE = "sample", "eval", "sweep"
RUN = "train", "plan"
MEETS: dict[str, tuple[str, ...]] = {
    "atomic.py": ("sample", "data prepare", "data encode", "data stats", "recipes copy"),
    "checkpoints/config.py": SAMPLE,
    "checkpoints/conversion_report.py": ("convert",),
    "checkpoints/convert.py": ("convert",),
    "checkpoints/encoder.py": ("sample",),
    "checkpoints/official_files.py": SAMPLE,
    "checkpoints/posthoc_ema.py": ("ema",),
    "checkpoints/store.py": ("convert", "ema"),
    "checkpoints/vae.py": ("train", "sample", *MEASURE, "data encode"),
    "data/encode.py": ("data encode",),
    "data/inspect.py": ("data inspect",),
    "data/latent_zip.py": ("data encode",),
    "data/": ("data prepare",),
    "evaluation/compare.py": ("compare",),
    "evaluation/diagnosis.py": ("diagnose",),
    "evaluation/image_arrays.py": ("eval", "sweep"),
    "evaluation/measurements.py": ("eval", "sweep"),
    "evaluation/official.py": (),
    "evaluation/protocol.py": (*MEASURE, "diagnose"),
    "evaluation/references.py": ("data stats",),
    "evaluation/results.py": ("eval", "sweep"),
    "evaluation/shards.py": (*MEASURE, "data stats"),
    "evaluation/tune.py": ("tune-schedule",),
    "export/": ("export",),
    "export/remote/": (),
    "machine/checks/": ("doctor",),
    "machine/compile.py": ("train", "sample", *MEASURE, "plan"),
    "machine/devices.py": ("train", "sample", *MEASURE, "diagnose", "loss", "data encode", "data stats"),
    "machine/engine.py": ("train",),
    "machine/gpu_options.py": ("train",),
    "machine/launch.py": ("train", *MEASURE, "data encode", "data stats"),
    "methods/": ("train",),
    "networks/surgery/adapt.py": ("convert",),
    "planning/outlines.py": ("plan",),
    "planning/": RUN,
    "publish/card.py": (),
    "publish/hub.py": ("push-to-hub",),
    "recipes/library.py": ("train", "plan", "recipes show", "recipes validate"),
    "report/comparison.py": ("compare",),
    "report/sections.py": (),
    "report/summary.py": (),
    "sampling/build.py": SAMPLE,
    "sampling/decode.py": ("train", "sample", *MEASURE, "export", "push-to-hub"),
    "sampling/files.py": ("sample",),
    "sampling/guidance.py": SAMPLE,
    "sampling/job.py": ("sample",),
    "sampling/labels.py": ("sample",),
    "sampling/reference.py": ("sample",),
    "sampling/seeds.py": SAMPLE,
    "sampling/single_file.py": ("sample",),
    "sampling/times.py": SAMPLE,
    "sampling/tune.py": ("tune-schedule",),
    "training/": ("train",),
}
"""The commands that can meet the sentences of a file or room; the longest name counts. None: what it writes says."""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*(?![\w-])")


def options(group: click.Group, above: str = "") -> Iterator[tuple[str, set[str]]]:
    """Every command's name with the options that it has."""
    for name, command in ((name, group.get_command(click.Context(group), name)) for name in group.list_commands(None)):
        if isinstance(command, click.Group):
            yield from options(command, f"{above}{name} ")
        elif command is not None:
            yield f"{above}{name}", {word for param in command.params for word in (*param.opts, *param.secondary_opts)}


COMMANDS = dict(options(main))


def sentences(path: Path) -> Iterator[str]:
    """The texts of a file that name options; a value that is put into one is {}."""
    tree = ast.parse(path.read_text())
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            inside.add(node.value)  # a docstring
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        if (node in inside and not isinstance(node, ast.JoinedStr)) or not any(map(is_text, parts)):
            continue
        text = "".join(str(part.value) if is_text(part) else "{}" for part in parts)
        if OPTION.search(text) and not text.lstrip().startswith("#"):  # a comment of a recipe that is written
            yield text


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def wrong(text: str, met_by: tuple[str, ...]) -> list[str]:
    """The options in a text that a command which can meet it lacks, and that no command named before them has."""
    found = []
    for match in OPTION.finditer(text):
        named = [name for name in COMMANDS if re.search(rf"(?<![\w-]){name}(?![\w-])", text[: match.start()])]
        known = {option for option in set().union(*COMMANDS.values()) if option == match[0]}
        lacking = [name for name in met_by if match[0] not in COMMANDS[name]]
        if known and lacking and not any(match[0] in COMMANDS[name] for name in named):
            found.append(f"{match[0]}: not of {', '.join(lacking)}")
    return found


FILES = {
    str(path.relative_to(PACKAGE)): texts
    for path in sorted(PACKAGE.rglob("*.py"))
    if "cli" not in path.parts and (texts := list(sentences(path)))
}


@pytest.mark.parametrize("file", FILES)
def test_an_option_that_is_named_is_one_of_the_command(file: str) -> None:
    met_by = MEETS.get(max((name for name in MEETS if file.startswith(name)), key=len, default=""), tuple(COMMANDS))
    assert [(text, mistakes) for text in FILES[file] if (mistakes := wrong(text, met_by))] == []


def test_a_mistake_is_found() -> None:
    assert wrong("give a file by --weights X=FILE", ("eval",)) == []
    assert wrong("give a file by --weights X=FILE", ("eval", "train")) == ["--weights: not of train"]
    assert wrong("`edmdistill eval --weights X=FILE`", ("train",)) == []


def test_the_table_names_what_is_there() -> None:
    assert [name for name in MEETS if not any(file.startswith(name) for file in FILES)] == []
    assert {command for commands in MEETS.values() for command in commands} <= COMMANDS.keys()


def endings(path: Path) -> Iterator[tuple[str, str]]:
    """The class and the last words of every error that a file raises with a text of its own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text, name = node.exc.args[0], ast.unparse(node.exc.func).rpartition(".")[2]
            last = text.values[-1] if isinstance(text, ast.JoinedStr) else text
            if is_text(last) and name != "Interrupted":  # which says a sentence of its own
                yield name, last.value


def test_an_error_ends_as_those_beside_it() -> None:
    """Ours without a full stop, so that other sentences can hold them; click's with one."""
    every = [(path.name, *ending) for path in sorted(PACKAGE.rglob("*.py")) for ending in endings(path)]
    assert len(every) > 400
    assert [each for each in every if each[2].endswith(".") != (each[1] in ("UsageError", "BadParameter"))] == []


OURS = {
    "checkpoints/official_files.py": {"file.name"},
    "checkpoints/store.py": {"vae"},
    "cli/train.py": {"source", "nfe", "decoding", "out"},
    "data/fit.py": {"encoder.range"},
    "evaluation/official.py": {"preset.net", "guide", "preset.metric", "name", "published['nfe']"},
    "evaluation/references.py": {"space.name", "options"},
    "features/weights.py": {"name"},
    "training/sources.py": {"name", "instead"},
}
"""Values in printed commands that need no quotes: they are not the user's, or were quoted before."""


def put_into_commands(path: Path) -> Iterator[str]:
    """The expressions whose values a file's texts put into commands of ours, up to the end of the command."""
    command = re.compile(rf"edmdistill (?:{'|'.join(main.list_commands(None))}) (?:\0[^\0]*\0|[^`;\n\0])*")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value if is_text(part) else f"\0{ast.unparse(part.value)}\0" for part in node.values)
            for match in command.finditer(text):
                yield from re.findall(r"\0(.*?)\0", match[0])


def test_a_command_that_is_printed_runs_whatever_names_hold() -> None:
    """Spaces, as in `edmdistill loss RUN 'my teacher' --data DATA`."""
    found = {str(path.relative_to(PACKAGE)): set(put_into_commands(path)) for path in sorted(PACKAGE.rglob("*.py"))}
    plain = {file: {each for each in put if not each.startswith("shlex.quote(")} for file, put in found.items()}
    assert {file: put for file, put in plain.items() if put} == OURS
