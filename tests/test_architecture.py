"""docs/architecture.md names only what exists, and every room."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "edmdistill"
TEXT = (ROOT / "docs" / "architecture.md").read_text()
NAMES = {
    node.name
    for path in PACKAGE.rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
}


def test_paths_exist() -> None:
    paths = set(re.findall(r"`([\w/]+(?:/|\.py))`", TEXT)) - {"surgery/"}
    missing = [path for path in paths if not (PACKAGE / path).exists() and not (ROOT / path).exists()]
    assert len(paths) > 25
    assert missing == []


def test_functions_and_classes_exist() -> None:
    steps = TEXT[TEXT.index("\n## ") :]
    names = {name for name in re.findall(r"`(\w+)`", steps) if name not in ("eval",)}
    assert len(names) > 15
    assert sorted(names - NAMES) == []


def test_every_room_is_listed() -> None:
    table = TEXT[: TEXT.index("\n## ")]
    rooms = {path.stem if path.suffix else f"{path.name}/" for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    listed = {name.removesuffix(".py") for name in re.findall(r"`([\w/]+(?:/|\.py))`", table)}
    assert rooms - {"__init__", "__main__", "__pycache__/", "version"} - listed == set()
