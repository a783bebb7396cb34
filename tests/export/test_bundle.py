"""A module with all that it uses, in one file."""

import ast
import builtins
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from golden_set import NETWORKS
from tolerance import assert_rounded, depth

from edmdistill.checkpoints.load import load_flow
from edmdistill.export.bundle import bundle
from edmdistill.export.diffusers import FILES
from edmdistill.networks.base import Conditioning


def imported(text: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(text)))
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize("module", FILES.values())
def test_remote_code_needs_nothing_of_ours(module: str):
    assert imported(bundle(module)) <= sys.stdlib_module_names | {"PIL", "diffusers", "numpy", "torch"}


def unbound(text: str) -> set[str]:
    """Names that a file reads, but in annotations, which are not evaluated, and that nothing in it binds."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        vars(node).update(dict.fromkeys(vars(node).keys() & {"annotation", "returns"}))
    nodes = list(ast.walk(tree))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = (
        {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        | set(dir(builtins))
        | {"__file__", "__name__"}
    )
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler | ast.MatchAs) and node.name
    }
    bound |= {
        (alias.asname or alias.name).partition(".")[0]
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    return {node.id for node in names} - bound


@pytest.mark.parametrize("module", [*FILES.values(), "edmdistill.networks"])
def test_every_name_is_bound(module: str):
    assert unbound(bundle(module)) == set()


def test_an_assignment_of_several_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pairs.py").write_text("a, (b, c) = 1, (2, 3)\nd = e = b + c\n\ndef f():\n    return a + d + e\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = bundle("pairs")
    assert text.count("a, (b, c) =") == text.count("d = e =") == 1
    names: dict[str, Any] = {}
    exec(text, names)
    assert names["f"]() == 11


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("remote")
    (folder / "bundled.py").write_text(bundle("edmdistill.networks"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield import_module("bundled")


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_a_bundled_network_is_the_network(golden: Path, copy: ModuleType, name: str):
    flow, config = load_flow(golden / name)
    network = copy.NETWORKS[config.network.kind](**flow.network.arguments).eval()
    assert type(network).__module__ != type(flow.network).__module__
    network.load_state_dict(flow.network.state_dict())
    x = torch.randn(2, flow.img_channels, flow.img_resolution, flow.img_resolution)
    condition = Conditioning(torch.tensor([0.3, -0.2]))
    assert_rounded(network(x, condition), flow.network.eval()(x, condition), depth(network))  # other memory addresses


def test_two_definitions_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "from edmdistill.kernels.linear import linear as other\n\ndef linear(x):\n    return other(x, x)\n"
    (tmp_path / "twice.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="twice is bundled with two of the name linear"):
        bundle("twice")


def test_two_imports_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "import numpy as torch\nfrom edmdistill.schedules import edm_sigmas\n\n"
    (tmp_path / "mixed.py").write_text(f"{text}def double(x):\n    return edm_sigmas(x, torch.ones(1), x)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="imports another torch than what it is bundled with"):
        bundle("mixed")
