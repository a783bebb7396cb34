"""The recipes that ship with the package and the user's own: finding, listing, copying and reading them.

A recipe is named METHOD/DATASET, or METHOD/DATASET-VARIANT where the file has a table [variants.VARIANT] that
overrides the base. Variants combine, METHOD/DATASET-SIZE-MODE, and the later one wins. A file with
`sizes = ["s", "m"]` is complete only with one of these as its first variant.
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import reduce
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edmdistill.atomic import atomic_write, require_free, require_no_pipe
from edmdistill.defaults import defaults
from edmdistill.errors import RecipeError, did_you_mean
from edmdistill.recipes.schema import TABLES, Recipe, table, table_defaults

_PACKAGE = Path(__file__).parent.parent
# In a wheel the recipes are inside the package; in a checkout they are at the top, where people look.
SHIPPED = next(d for d in (_PACKAGE / "recipes_data", _PACKAGE.parent / "recipes") if d.is_dir())
LIST = "edmdistill recipes list"


class RecipeFile(NamedTuple):
    """A recipe that ships with the package.

    Attributes:
        name: METHOD/DATASET.
        sizes: variants of which a name has exactly one, before all others.
        modes: the other variants.
    """

    name: str
    path: Path
    sizes: list[str]
    modes: list[str]

    @property
    def names(self) -> list[str]:
        """The base or every size, alone and with every mode."""
        bases = [f"{self.name}-{size}" for size in self.sizes] or [self.name]
        return [name for base in bases for name in (base, *(f"{base}-{mode}" for mode in self.modes))]


def recipe_files(method: str | None = None) -> list[RecipeFile]:
    """Returns the recipes that ship with the package, all or those for a method.

    Raises: RecipeError: there are none for it.
    """
    files = []
    for name, path in _shipped().items():
        if method in (None, path.parent.name):
            tables = _parse(path, _read(path))
            sizes = tables.get("sizes", [])
            modes = [variant for variant in tables.get("variants", {}) if variant not in sizes]
            files.append(RecipeFile(name, path, sizes, modes))
    if not files:
        raise RecipeError(f"there are no recipes for {method!r}; {did_you_mean(str(method), _methods(), 5, LIST)}")
    return files


def recipe_names() -> list[str]:
    """Returns the names of the recipes that ship with the package, with all sizes and modes."""
    return [name for file in recipe_files() for name in file.names]


def _shipped() -> dict[str, Path]:
    """Returns the files that ship with the package, by METHOD/DATASET."""
    return {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in sorted(SHIPPED.glob("*/*.toml"))}


def _methods() -> list[str]:
    """Returns the methods that have shipped recipes."""
    return list(dict.fromkeys(name.partition("/")[0] for name in _shipped()))


def recipe_header(path: Path) -> str:
    """Returns the comment at the top of a recipe's file: its purpose, command, published and measured results."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def copy_recipe(name: str, to: Path, *, overwrite: bool = False) -> str:
    """Copies the file of a recipe, with all its variants, for the user to change.

    Returns: the name of the recipe in the copy, `mine-s.toml` for variant s of `mine.toml`.
    Raises: EdmDistillError: no such recipe; or `to` exists, and not `overwrite`; or it does not end in .toml.
    """
    source = find_recipe(name)
    if to.suffix != ".toml":
        raise RecipeError(f"{to} must end in .toml, which distinguishes a file from a recipe's name")
    require_free(to, overwrite)
    with atomic_write(to) as new:
        new.write_bytes(source.path.read_bytes())
    return str(to if source.variant is None else to.with_name(f"{to.stem}-{source.variant}.toml"))


class RecipeSource(NamedTuple):
    """A recipe as its author wrote it.

    Attributes:
        name: as the user gave it.
        variant: what follows the file's own name; None: nothing.
        text, tables: of the file, with all its variants.
    """

    name: str
    path: Path
    variant: str | None
    text: str
    tables: dict[str, Any]

    @property
    def variants(self) -> list[str]:
        """The variants that the name asks for."""
        return _split_variant(self.variant, self.tables.get("variants", {}))

    def resolve(self, method: str | None = None, sets: Iterable[str] = ()) -> Recipe:
        """Returns the recipe with its variants and the overrides, checked; see `load_recipe`."""
        name, sizes = self.name, self.tables.get("sizes", [])
        if not isinstance(sizes, list) or not all(isinstance(size, str) for size in sizes):
            raise RecipeError(f"{name}: sizes = {sizes!r} must be a list of variants' names")
        if sizes and not set(self.variants[:1]) & set(sizes):
            base = name.removesuffix(".toml").removesuffix(f"-{self.variant}")
            complete = ", ".join("-".join([base, size, *self.variants]) for size in sizes)
            raise RecipeError(f"{name} needs a size: one of {complete}")
        tables = reduce(_merge, _layers(self.tables, self.variants, sets, name).values())
        tables["method"] = {"name": method} | table(tables, "method", name)
        if method is not None and tables["method"]["name"] != method:
            raise RecipeError(
                f"{name} is a recipe for {tables['method']['name']}, not for {method}; choose another recipe"
            )
        return Recipe.from_tables(tables, name)

    def text_with_command(self, sets: Sequence[str]) -> str:
        """Returns the file's text below a comment with the options that the recipe was loaded by."""
        overrides = "".join(f"\n{_SET}{shlex.quote(override)}" for override in sets)
        return f"{_TRAINED_BY}{self.name}{overrides}\n\n{self.text}"


_TRAINED_BY, _SET = "# Trained by --recipe ", "#   --set "


def noted_command(text: str) -> tuple[str, list[str]] | None:
    """Returns the name and the overrides of `RecipeSource.text_with_command`.

    Returns: None where there is no such comment, as above a recipe that a library call was given.
    """
    first, *lines = text.splitlines() or [""]
    if not first.startswith(_TRAINED_BY):
        return None
    notes = takewhile(lambda line: line.startswith(_SET), lines)
    return first.removeprefix(_TRAINED_BY), [_unquoted(note.removeprefix(_SET)) for note in notes]


def _unquoted(note: str) -> str:
    """Returns what shlex.quote was given; the note itself, if it is of a run from before they were quoted."""
    with suppress(ValueError):
        if shlex.quote(word := "".join(shlex.split(note))) == note:
            return word
    return note


def find_recipe(name: str) -> RecipeSource:
    """Reads the file that a name stands for: `cosim/imagenet512-s`, or a path `my/recipe.toml`.

    A name that ends in .toml is the user's file; without `my/recipe-s.toml`, that is variant s of `my/recipe.toml`.
    Raises: RecipeError: there is no such recipe, or it is not TOML.
    """
    shipped = None if name.endswith(".toml") else _shipped()
    words = name.removesuffix(".toml").split("-")
    for cut in range(len(words), 0, -1):
        base = "-".join(words[:cut])
        path = Path(f"{base}.toml") if shipped is None else shipped.get(base)
        if path is None or not os.path.isfile(path):  # unlike Path.is_file, also False for names that are too long
            continue
        text = _read(path)
        tables = _parse(path, text)
        source = RecipeSource(name, path, "-".join(words[cut:]) if cut < len(words) else None, text, tables)
        variants = table(tables, "variants", name)
        for variant in source.variants:
            if variant not in variants:
                advice = did_you_mean(variant, variants, 5) if variants else "it has none, so leave it out"
                raise RecipeError(f"{base if shipped else path} has no variant {variant!r}; {advice}")
        return source
    raise RecipeError(_unknown_recipe(name) if shipped else _unknown_file(name))


def load_recipe(name: str, method: str | None = None, sets: Iterable[str] = ()) -> Recipe:
    """Reads a recipe, applies its variants and the overrides, and checks all of it.

    Args:
        name: a shipped recipe's name, or the path of a .toml file.
        method: the method to train by, which must be the recipe's.
        sets: overrides `table.key=value`, with a value as in TOML; a bare word is a string.
    Raises: RecipeError: no such recipe, an unknown key, a value out of range, another method's recipe.
    """
    return find_recipe(name).resolve(method, sets)


def origins(recipe: Recipe, text: str, name: str, sets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns where every value comes from that is not the default, for `load_recipe(name, method, sets)`.

    Args:
        text: of the recipe's file, because the name may stand for another file by now.
    Returns: by table.key, the values by layer, of which the last one wins: `default`, if there is one, `file`, the
        variants, `--set`; and `later`, if the recipe itself has another value than all of them.
    """
    tables = tomllib.loads(text)
    variants, words = tables.get("variants", {}), name.removesuffix(".toml").split("-")
    tails = ("-".join(words[at:]) for at in range(1, len(words)))
    candidates = (_split_variant(tail, variants) for tail in tails)
    chosen = next((names for names in candidates if variants.keys() >= set(names)), [])
    layers = {"default": _defaults(recipe), **_layers(tables, chosen, sets, name)}
    merged = dict(zip(layers, accumulate(layers.values(), _merge), strict=True))
    sources: dict[str, dict[str, Any]] = {}
    for section, values in msgspec.json.decode(recipe.to_json()).items():
        for key, value in (values or {}).items():
            by_layer = {
                name: merged[name][section][key] for name, layer in layers.items() if key in layer.get(section, {})
            }
            if (section, key) == ("method", "name"):
                continue
            if not by_layer or [*by_layer.values()][-1] != value:
                by_layer["later"] = value
            if any(given != by_layer.get("default", by_layer) for given in by_layer.values()):
                sources[f"{section}.{key}"] = by_layer
    return sources


def _defaults(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Returns the defaults of every table, as in JSON."""
    usual = {name: table_defaults(name, recipe.method_class, recipe.method) for name in TABLES}
    return dict(msgspec.json.decode(msgspec.json.encode({"method": defaults(recipe.method_class.Config), **usual})))


def _layers(
    tables: Mapping[str, Any], chosen: Iterable[str], sets: Iterable[str], source: str
) -> dict[str, dict[str, Any]]:
    """Returns what a recipe is made of, lowest first: the file's own tables, the chosen variants, the overrides."""
    layers = {"file": {key: value for key, value in tables.items() if key not in ("variants", "sizes")}}
    variants = table(tables, "variants", source)
    for variant in chosen:
        layers[f"variant {variant}"] = table(variants, variant, f"{source}: variants")
    overrides: dict[str, Any] = {}
    for override in sets:
        overrides = _merge(overrides, _parse_override(override))
    return layers | {"--set": overrides}


def _split_variant(variant: str | None, variants: Mapping[str, Any]) -> list[str]:
    """Returns the names in `m-vsd`, m and then vsd, unless there is one variant of that very name."""
    return [] if variant is None else [variant] if variant in variants else variant.split("-")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as TOML: {error}") from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (RecursionError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as TOML: {error}") from None


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` overridden by `over`, table by table, key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    """Returns `a.b=v` as the nested table {a: {b: v}}."""
    path, equals, text = override.partition("=")
    keys = [key.strip().strip("\"'") for key in path.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        raise RecipeError(f"--set {override}: write table.key=value, as in training.lr=1e-4")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except RecursionError:
        raise RecipeError(f"--set {override}: {text} is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        parsed = {"value": text.strip()}
        if not re.fullmatch(r"([A-Za-z_]|\.{0,2}/)[\w./-]*", text.strip()):
            raise RecipeError(
                f"--set {override}: {text!r} is not a TOML value; put strings in quotes, and lists in brackets"
            ) from None
    if list(parsed) != ["value"]:
        raise RecipeError(f"--set {override}: one value only")
    value = parsed["value"]
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _unknown_recipe(name: str) -> str:
    """Returns the error for a name that no recipe has, with the nearest name or others of the same method."""
    method, _, dataset = name.partition("/")
    of_method = [file for file in _shipped() if file.partition("/")[0] == method]
    some = did_you_mean("", of_method, 5, f"{LIST} {method}")
    if of_method and not dataset:
        return f"{name!r} is a method, and each data set has a recipe of its own; {some}"
    if near := get_close_matches(name[:100], recipe_names(), n=1):
        return f"there is no recipe {name!r}; did you mean {near[0]!r}?"
    if of_method:
        return f"there is no recipe {name[:200]!r}; {some}"
    if near := get_close_matches(method[:100], _methods(), n=1):
        return f"there are no recipes for {method!r}; did you mean {near[0]!r}?"
    return f"there is no recipe {name[:200]!r}; `{LIST}` lists all, and a file of yours has a name that ends in .toml"


def _unknown_file(name: str) -> str:
    """Returns the error for a file that does not exist, with the nearest file or the shipped recipe of that name."""
    path, stem = Path(name), name.removesuffix(".toml")
    if os.path.exists(path):
        require_no_pipe(path, RecipeError)
        return f"{name[:300]} is a folder and no file: give a recipe's file"
    if stem in recipe_names():
        return f"there is no file {name}; the recipe that ships with the package is {stem!r}"
    names = [file for file in os.listdir(path.parent) if file.endswith(".toml")] if os.path.isdir(path.parent) else []
    near = get_close_matches(path.name[:100], names, n=1)
    advice = f"did you mean {path.parent / near[0]}?" if near else f"`{LIST}` lists those that ship with the package"
    return f"there is no file {name[:300]}; {advice}"
