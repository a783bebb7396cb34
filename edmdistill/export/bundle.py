"""Bundles a module into one file that does not need this package: its definitions, and all that they use.

For programs that load code from single files. The text of a definition stays as it is, except for checks of arguments:
those in an exported folder have been checked, so it does not need msgspec; and for branches that run a Triton kernel.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = __name__.partition(".")[0]
CHECK = "check_arguments"
"""The function whose calls are dropped."""
BRANCH = "uses_triton"
"""The function of the conditions whose branches are dropped."""
RANGE = "Meta"
"""The name that gives annotations their ranges, which are dropped too."""


class ModuleSource:
    """The top level of a module of this package.

    Attributes:
        docstring: the module's.
        definitions: text and syntax tree of each definition, by name, in order.
        ours: the origin of each name that is imported from this package, as (module, name).
        others: the statement that imports each other name.
    """

    def __init__(self, module: str) -> None:
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        text = Path(spec.origin).read_text(encoding="utf-8")
        lines, tree = text.splitlines(), ast.parse(text)
        self.docstring = ast.get_docstring(tree) or ""
        self.definitions: dict[str, tuple[str, ast.stmt]] = {}
        self.ours: dict[str, tuple[str, str]] = {}
        self.others: dict[str, str] = {}
        for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._imported(node)
            elif names := _names(node):
                # A string after a constant is its docstring.
                constant = isinstance(node, ast.Assign | ast.AnnAssign)
                last = after if after is not None and constant and _is_string(after) else node
                first = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", []))])
                dropped = {line for call in ast.walk(node) if _is_dropped(call) for line in _lines(call)}
                kept = [i for i in range(first, (last.end_lineno or first) + 1) if i not in dropped]
                self.definitions |= dict.fromkeys(names, ("\n".join(lines[i - 1] for i in kept), node))

    def _imported(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
                self.ours[name] = node.module or "", alias.name
            elif not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
                self.others[name] = ast.unparse(
                    ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], 0)
                )


def _names(node: ast.stmt) -> list[str]:
    """Returns the names that a statement defines."""
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _is_dropped(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Call(func=ast.Name(id=name))):
            return name == CHECK
        case ast.If(test=condition):
            return any(isinstance(part, ast.Name) and part.id == BRANCH for part in ast.walk(condition))
    return False


def _lines(node: ast.AST) -> range:
    return range(getattr(node, "lineno", 0), (getattr(node, "end_lineno", None) or 0) + 1)


def _used(node: ast.AST, annotates: bool = False) -> Iterator[tuple[str, bool]]:
    """Yields the names that a definition uses, and whether an annotation does."""
    if isinstance(node, ast.Name):
        yield node.id, annotates
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_dropped(child):
                yield from _used(child, annotates or field in ("annotation", "returns"))


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def _module_source(module: str) -> ModuleSource:
    return ModuleSource(module)


def bundle(module: str) -> str:
    """Returns the text of that file: imports, then definitions, each after what it uses.

    Raises: ValueError: two definitions or imports share a name, which a single file cannot hold.
    """
    imports: dict[str, str] = {}
    definitions: dict[ast.stmt, str] = {}
    seen: set[ast.stmt] = set()

    def visit(home: str, name: str, annotates: bool = False) -> None:
        source = _module_source(home)
        if name in source.ours:
            visit(*source.ours[name], annotates)
        elif annotates and RANGE in (source.others.get(name) or source.definitions.get(name, ("",))[0]):
            return  # annotations are not evaluated
        elif name in source.others:
            if imports.setdefault(name, source.others[name]) != source.others[name]:
                raise ValueError(f"{home} imports another {name} than what it is bundled with")
        elif name in source.definitions and (definition := source.definitions[name])[1] not in seen:
            text, node = definition
            seen.add(node)
            for used in _used(node):
                visit(home, *used)
            definitions[node] = text

    root = _module_source(module)
    for name in root.definitions:
        visit(module, name)
    names = [name for node in definitions for name in _names(node)]
    if twice := {name for name in names if names.count(name) > 1 or name in imports}:
        raise ValueError(f"{module} is bundled with two of the name {min(twice)}")
    head = (
        f'"""{root.docstring}\n\nBundled by edmdistill from its own source; this file does not need the package. '
        'Licence: Apache-2.0.\n"""'
    )
    statements = "\n".join(sorted(set(imports.values()), key=lambda text: (text.startswith("from"), text)))
    top = "\n\n".join([head, "from __future__ import annotations", statements])
    return "\n\n\n".join([top, *definitions.values()]) + "\n"
