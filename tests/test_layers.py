"""Who imports whom, read from the source: downwards only, and each outside library only where it is at home."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from edmdistill.methods import METHODS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "edmdistill"
LAYERS = (
    ("errors", "version"),
    ("optional", "progress", "pickles", "assets"),
    ("torch_state", "atomic", "defaults", "embedded", "jsonl"),
    ("arguments",),
    ("stored_tensors",),
    ("archives",),
    ("transfer", "threads"),
    ("trigflow",),
    ("draws",),
    ("schedules",),
    ("kernels",),
    ("networks",),
    ("checkpoints",),
    ("features",),
    ("methods", "sampling", "data"),
    ("evaluation",),
    ("recipes",),
    ("machine",),
    ("training",),
    ("planning",),
    ("report", "export"),
    ("publish",),
    ("cli",),
)
DEPTH = {part: depth for depth, parts in enumerate(LAYERS) for part in parts}
HOMES = {
    "accelerate": {"machine", "training"},
    "click": {"cli"},
    "safetensors": {"checkpoints", "publish"},
    "huggingface_hub": {"checkpoints", "publish"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "onnxscript": {"export"},
}
EXTRAS = "quickstart", "lowbit", "plot", "parquet", "diffusers", "onnx"
"""Optional packages that are imported here; what the others hold is used by torch or by name alone."""
ELSEWHERE = {"gradio", "triton"}
"""What only an exported folder imports, in an environment of its own; and what comes with torch for CUDA."""
IMPORT_NAMES = {"pillow": "PIL", "scikit-learn": "sklearn"}
METHOD_MODULES = {entry.path.partition(":")[0] for entry in METHODS.values()}
SOURCES = {path.relative_to(ROOT).with_suffix("").parts: path.read_text() for path in PACKAGE.rglob("*.py")}


def imports(module: tuple[str, ...], source: str) -> Iterator[tuple[str, ...]]:
    """Every imported name as its dotted parts, wherever in the file it stands, relative ones made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from .a import b` in p/q.py and in p/q/__init__.py alike: module is (p, q) and (p, q, __init__).
            base = module[: len(module) - node.level] if node.level else ()
            stem = base + tuple((node.module or "").split(".") if node.module else ())
            yield from ((*stem, alias.name) for alias in node.names)


def violations(module: tuple[str, ...], source: str) -> list[str]:
    """What this module imports and must not."""
    found = []
    part = module[1]
    for target in imports(module, source):
        if target[0] != "edmdistill":
            if part not in HOMES.get(target[0], {part}):
                found.append(f"{'.'.join(module)} knows {target[0]}")
            continue
        other = target[1] if len(target) > 1 else ""
        if other not in DEPTH or part not in DEPTH:
            continue  # the package itself: __version__, and the public names, which are imported on first use
        if other != part and DEPTH[other] >= DEPTH[part]:
            found.append(f"{'.'.join(module)} imports upwards: {'.'.join(target)}")
        elif (
            part == "methods"
            and module[-1] != "__init__"
            and ".".join(target[:3]) in METHOD_MODULES - {".".join(module)}
        ):
            found.append(f"{'.'.join(module)} imports another method: {'.'.join(target)}")
    return found


@pytest.mark.parametrize("module", SOURCES, ids=".".join)
def test_imports_go_downwards_and_libraries_stay_at_home(module: tuple[str, ...]):
    assert violations(module, SOURCES[module]) == []


def test_every_part_has_a_layer():
    parts = {module[1] for module in SOURCES} - {"__init__", "__main__"}
    assert parts <= set(DEPTH)


@pytest.mark.parametrize(
    ("module", "source", "violation"),
    [
        ("edmdistill.networks.song", "from edmdistill.checkpoints import store", "imports upwards"),
        ("edmdistill.networks.song", "def f():\n    from ..training.loop import train", "imports upwards"),
        ("edmdistill.networks.__init__", "from ..cli import main", "imports upwards"),
        ("edmdistill.networks.__init__", "from .. import training", "imports upwards"),
        ("edmdistill.sampling.heun", "import edmdistill.data.datasets", "imports upwards"),
        ("edmdistill.methods.cosim", "from .sid import SiD", "imports another method"),
        ("edmdistill.methods.cosim", "from . import diffusion", "imports another method"),
        ("edmdistill.methods.cosim", "import accelerate", "knows accelerate"),
        ("edmdistill.training.loop", "from safetensors.torch import save_file", "knows safetensors"),
        ("edmdistill.report", "import click", "knows click"),
    ],
)
def test_a_violation_is_seen(module: str, source: str, violation: str):
    (found,) = violations(tuple(module.split(".")), source)
    assert violation in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("edmdistill.methods.cosim", "from .base import Method\nfrom ..trigflow import diffuse"),
        ("edmdistill.methods.__init__", "from .cosim import CoSIM"),
        ("edmdistill.cli.train", "import click\nfrom edmdistill import __version__"),
        ("edmdistill.training.loop", "import accelerate\nfrom edmdistill.training.state import State"),
    ],
)
def test_what_is_right_passes(module: str, source: str):
    assert violations(tuple(module.split(".")), source) == []


def test_dependencies_are_what_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def import_name(requirement: str) -> str:
        name = requirement.split(">")[0]
        return IMPORT_NAMES.get(name, name)

    core = {import_name(requirement) for requirement in project["dependencies"]}
    extras = project["optional-dependencies"]
    optional = {import_name(requirement) for extra in EXTRAS for requirement in extras[extra]}
    imported = {target[0] for module, source in SOURCES.items() for target in imports(module, source)}
    assert imported - set(sys.stdlib_module_names) - {"edmdistill"} - ELSEWHERE == core | optional


def test_every_dependency_has_an_oldest_version():
    """Which `make test-lowest` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(name for extra in extras.keys() - {"dev"} for name in extras[extra])]
    assert [name for name in needed if ">=" not in name] == []
