"""Recipes: the TOML that decides what a run computes, as typed tables.

A recipe is named METHOD/DATASET, or METHOD/DATASET-VARIANT where the file has a table [variants.VARIANT] that
is laid over the base. Variants join, METHOD/DATASET-SIZE-MODE, the later one on top; a file with `sizes = ["s", "m"]`
is not complete without one of these first. `load_recipe` checks everything before a run starts. The resolved recipe is
JSON with every default filled in: it loads back equal, and its hash names what was computed.
"""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import reduce
from itertools import accumulate, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from edmdistill.atomic import atomic_write
from edmdistill.errors import RecipeError, did_you_mean
from edmdistill.methods import METHODS

if TYPE_CHECKING:
    from edmdistill.methods.base import Method, Role

Count = Annotated[int, Meta(ge=0)]
PositiveCount = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
Rate = Annotated[float, Meta(gt=0, le=1e6)]
Images = Annotated[int, Meta(ge=1, lt=10**12)]
Share = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]

LARGEST = 1e15
"""Of any number in a recipe; images and seeds are counted exactly up to here."""

_PACKAGE = Path(__file__).parent.parent
# In a wheel the recipes are inside the package; in a checkout they are at the top, where people look.
LIST = "edmdistill recipes list"
SHIPPED = next(d for d in (_PACKAGE / "recipes_data", _PACKAGE.parent / "recipes") if d.is_dir())


class Training(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[training]: how much, how fast, and what is kept. Every amount and interval counts images seen."""

    images: Images
    """Total images seen: steps times batch; each turn of a method sees the same batch size."""
    batch: PositiveCount
    """Global batch size."""
    optimizer: Literal["adam", "radam", "adam8bit"] = "adam"
    """`adam8bit` keeps its states in 8 bits, by torchao."""
    lr: Rate
    """The optimiser's learning rate, before the factors below."""
    lr_by_role: dict[str, Rate] = {}
    """Learning rates of single roles, in place of `lr`: auxiliary = 1e-3."""
    lr_rampup_images: Count = 0
    """The learning rate grows linearly from 0 over so many images."""
    lr_decay: Literal["constant", "linear", "inverse_sqrt"] = "constant"
    """`linear`: to 0 over the last `decay_share` of the images; `inverse_sqrt`: by 1 / sqrt(images seen /
    decay_images) once that many are seen, as in EDM2."""
    decay_share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    decay_images: PositiveCount | None = None
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: Positive = 1e-8
    grad_clip: Positive | None = None
    """Largest norm of a role's whole gradient; left out: no clipping."""
    dropout: BelowOne | None = None
    """Dropout of the trained networks; left out: what the checkpoint says."""
    dropout_max_resolution: PositiveCount | None = None
    """Dropout only where features have so many pixels a side or fewer; left out: everywhere."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks; parameters, times and losses stay float32 or better. fp16 scales the losses."""
    seed: Count = 0
    log_every: PositiveCount
    """A line in metrics.jsonl."""
    snapshot_every: PositiveCount
    """A state to resume from, and a sample grid."""
    keep: PositiveCount = 2
    """How many of the last states are kept."""
    keep_every: PositiveCount | None = None
    """Of every so many images, the first state after them is kept for good."""

    def __post_init__(self) -> None:
        if (self.lr_decay == "inverse_sqrt") != (self.decay_images is not None):
            raise ValueError('lr_decay = "inverse_sqrt" and decay_images go together: give both or neither')
        if self.dropout is None and self.dropout_max_resolution is not None:
            raise ValueError("dropout_max_resolution says where the recipe's dropout is: give dropout too")
        if self.images < self.batch:
            raise ValueError(f"images = {self.images} is less than one batch of {self.batch}")


class Ema(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[ema]: the moving averages of the weights; sampling uses the first of them."""

    half_life_images: PositiveCount | None = None
    rampup_ratio: Positive | None = 0.05
    """The half-life is at most this share of the images seen so far.  Source: EDM's ema_rampup_ratio."""
    sigma_rel: tuple[Annotated[float, Meta(ge=0.001, lt=12**-0.5)], ...] = ()
    """Lengths of power-function averages, as in EDM2, to three decimals."""
    snapshot_every: PositiveCount | None = None
    """The power-function averages are kept in RUN/ema, for `edmdistill ema` to make others of."""

    def __post_init__(self) -> None:
        if self.half_life_images is None and not self.sigma_rel:
            raise ValueError("no average is asked for: give half_life_images or sigma_rel")
        if len({round(length, 3) for length in self.sigma_rel} & set(self.sigma_rel)) < len(self.sigma_rel):
            raise ValueError(f"sigma_rel = {list(self.sigma_rel)} must be different numbers of three decimals at most")
        if self.snapshot_every is not None and len(self.sigma_rel) < 2:
            raise ValueError("snapshot_every is for averages of which others are made: give two or more of sigma_rel")


class Sampling(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[sampling]: how the run's network is drawn from, in its grids and, by its checkpoint, afterwards."""

    nfe: tuple[PositiveCount, ...] = (1, 2, 4)
    """The numbers of steps that grids and measurements show."""
    gamma: Share = 1.0
    """Share of fresh noise in each step; 0 is deterministic."""
    sigmas: dict[str, tuple[Positive, ...]] = {}
    """Noise levels by NFE, "2" = [80.0, 2.515], descending, repeats allowed; others come from EDM's curve."""

    def __post_init__(self) -> None:
        for nfe, sigmas in self.sigmas.items():
            if nfe != str(len(sigmas)):
                raise ValueError(f'sigmas."{nfe}" lists {len(sigmas)} noise levels: give one for each step')
            if list(sigmas) != sorted(sigmas, reverse=True):
                raise ValueError(f'sigmas."{nfe}" = {list(sigmas)} must not rise: sampling goes from noise to data')


class Data(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[data]: what is taken of the data set that --data names."""

    split: str = "train"
    xflip: bool = False
    """Every image is there twice, the second time mirrored, as in EDM."""


class Network(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[network]: what a method without a frozen teacher builds, if none is named to start from. Image shape and classes
    come from the data."""

    kind: Literal["song", "adm", "edm2"]
    arguments: dict[str, Any] = {}
    """The constructor's own arguments, named as in the official class."""
    sigma_data: Positive = 0.5


class Recipe(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole recipe, resolved: the file, its variant and the overrides, with all defaults."""

    method: dict[str, Any]
    """`name`, and every field of that method's Config."""
    training: Training
    ema: Ema
    sampling: Sampling = Sampling()
    data: Data = Data()
    network: Network | None = None

    @property
    def method_class(self) -> type[Method]:
        return METHODS[self.method["name"]].load()

    @property
    def method_config(self) -> Any:
        """The method's typed Config."""
        own = {key: value for key, value in self.method.items() if key != "name"}
        return msgspec.convert(own, self.method_class.Config)

    @property
    def roles(self) -> dict[str, Role]:
        """The roles that play in it, by name."""
        return self.method_class.roles_for(self.method_config)

    @property
    def guidance(self) -> tuple[float, float]:
        """The least and the greatest weight of guidance that its product knows; (1, 1): none."""
        return self.method_class.guidance(self.method_config)

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON: equal for equal computations, whatever the file was called."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self)) + b"\n"

    @staticmethod
    def from_json(text: bytes) -> Recipe:
        """Raises: RecipeError: not a resolved recipe of this version."""
        try:
            tables = msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise RecipeError(f"the resolved recipe is not JSON ({error}); start a new run directory") from None
        return _resolve(tables, "the resolved recipe")


class RecipeFile(NamedTuple):
    """A recipe that ships with the package.

    Attributes:
        name: METHOD/DATASET.
        sizes: variants of which a name has one, before all others.
        modes: variants that a name may have as well.
    """

    name: str
    path: Path
    sizes: list[str]
    modes: list[str]

    @property
    def names(self) -> list[str]:
        """Every base or size, alone and with every mode."""
        first = [f"{self.name}-{size}" for size in self.sizes] or [self.name]
        return [name for base in first for name in (base, *(f"{base}-{mode}" for mode in self.modes))]


def recipe_files(method: str | None = None) -> list[RecipeFile]:
    """Returns the recipes that ship with the package, or those for a method.

    Raises: RecipeError: there are none for it.
    """
    files = []
    for name, path in _shipped().items():
        tables = _read(path)
        sizes = tables.get("sizes", [])
        files.append(RecipeFile(name, path, sizes, [mode for mode in tables.get("variants", {}) if mode not in sizes]))
    own = [file for file in files if method in (None, file.path.parent.name)]
    if not own:
        raise RecipeError(f"there are no recipes for {method!r}; {did_you_mean(str(method), METHODS, 5, LIST)}")
    return own


def recipe_names(method: str | None = None) -> list[str]:
    """Returns the names of `recipe_files`, with all sizes and modes."""
    return [name for file in recipe_files(method) for name in file.names]


def _shipped() -> dict[str, Path]:
    """Returns the files that ship with the package, by METHOD/DATASET."""
    return {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in sorted(SHIPPED.glob("*/*.toml"))}


def recipe_header(path: Path) -> str:
    """The comment at the head of a recipe's file: what it is, its command, the paper's result, what was measured."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def copy_recipe(name: str, to: Path) -> str:
    """Copies the file of a recipe, with all its variants, for its author to change.

    Returns: what the recipe is called there, `mine-s.toml` for variant s of `mine.toml`.
    Raises: RecipeError: no such recipe, or there is something at `to`, which must end in .toml.
    """
    path, variant = find_recipe(name)
    if to.suffix != ".toml":
        raise RecipeError(f"{to} must end in .toml, for that tells a file of yours from a recipe's name")
    if to.exists():
        raise RecipeError(f"{to} exists: choose another name")
    with atomic_write(to) as new:
        new.write_bytes(path.read_bytes())
    return str(to if variant is None else to.with_name(f"{to.stem}-{variant}.toml"))


def find_recipe(name: str) -> tuple[Path, str | None]:
    """The file and the variant that a name stands for: `cosim/imagenet512-s`, or a path `my/recipe.toml`.

    A name that ends in .toml is the user's file; where `my/recipe-s.toml` is none, it is variant s of that file.
    Raises: RecipeError: nothing of that name.
    """
    shipped = None if name.endswith(".toml") else _shipped()
    words = name.removesuffix(".toml").split("-")
    for cut in range(len(words), 0, -1):
        base = "-".join(words[:cut])
        path = Path(f"{base}.toml") if shipped is None else shipped.get(base)
        if path is None or not os.path.isfile(path):  # unlike Path's, also of names that are too long
            continue
        variant = "-".join(words[cut:]) or None
        variants = _table(_read(path), "variants", name)
        for part in _joined(variant, variants):
            if part not in variants:
                advice = did_you_mean(part, variants, 5) if variants else "it has none, so leave it out"
                raise RecipeError(f"{base if shipped else path} has no variant {part!r}; {advice}")
        return path, variant
    raise RecipeError(_unknown_recipe(name) if shipped else _unknown_file(name))


def _unknown_recipe(name: str) -> str:
    """Returns a sentence on a name that no recipe has: the nearest one, or some of its folder."""
    method, _, dataset = name.partition("/")
    own = [file for file in _shipped() if file.partition("/")[0] == method]
    some = did_you_mean("", own, 5, f"{LIST} {method}")
    if own and not dataset:
        return f"{name!r} is a method, and each data set has a recipe of its own; {some}"
    if near := get_close_matches(name[:100], recipe_names(), n=1):
        return f"there is no recipe {name!r}; did you mean {near[0]!r}?"
    if own:
        return f"there is no recipe {name[:200]!r}; {some}"
    if near := get_close_matches(method[:100], METHODS, n=1):
        return f"there are no recipes for {method!r}; did you mean {near[0]!r}?"
    return f"there is no recipe {name[:200]!r}; `{LIST}` lists all, and a file of yours has a name that ends in .toml"


def _unknown_file(name: str) -> str:
    """Returns a sentence on a file that is not there: the nearest one, or the recipe of that name."""
    path, stem = Path(name), name.removesuffix(".toml")
    if stem in recipe_names():
        return f"there is no file {name}; the recipe that ships with the package is {stem!r}"
    names = [file for file in os.listdir(path.parent) if file.endswith(".toml")] if os.path.isdir(path.parent) else []
    near = get_close_matches(path.name[:100], names, n=1)
    advice = f"did you mean {path.parent / near[0]}?" if near else f"`{LIST}` lists those that ship with the package"
    return f"there is no file {name[:300]}; {advice}"


def load_recipe(name: str, method: str | None = None, sets: Iterable[str] = ()) -> Recipe:
    """Reads a recipe, lays its variant and the overrides over it, and checks all of it.

    Args:
        name: a shipped recipe's name, or the path of a .toml file.
        method: the method that is about to run; the recipe must be for it.
        sets: overrides `table.key=value`, the value as in TOML; a bare word is a string.
    Raises: RecipeError: no such recipe, an unknown key, a value out of range, another method's recipe.
    """
    path, variant = find_recipe(name)
    tables = _read(path)
    variants = _table(tables, "variants", name)
    parts, sizes = _joined(variant, variants), tables.get("sizes", [])
    if not isinstance(sizes, list) or not all(isinstance(size, str) for size in sizes):
        raise RecipeError(f"{name}: sizes = {sizes!r} must be a list of variants' names")
    if sizes and not set(parts[:1]) & set(sizes):
        base = name.removesuffix(".toml").removesuffix(f"-{variant}")
        raise RecipeError(f"{name} needs a size: one of {', '.join('-'.join([base, size, *parts]) for size in sizes)}")
    tables = reduce(_merge, _layers(tables, parts, sets, name).values())
    tables["method"] = own = {"name": method} | _table(tables, "method", name)
    if method is not None and own["name"] != method:
        raise RecipeError(f"{name} is a recipe for {own['name']}, not for {method}; choose another --recipe")
    return _resolve(tables, name)


def origins(recipe: Recipe, text: str, name: str, sets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Where every value of a recipe comes from that is not the default, for `load_recipe(name, method, sets)`.

    Args:
        text: of the recipe's file, for name may stand for another one by now.
    Returns: values by key, table.key, then by who says so, the last of whom counts: `default`, where there is one,
        `file`, the variants, `--set`; and `later`, where the recipe itself says otherwise than all of them.
    """
    tables = tomllib.loads(text)
    variants, words = tables.get("variants", {}), name.removesuffix(".toml").split("-")
    tails = ("-".join(words[at:]) for at in range(1, len(words)))
    parts = next((own for own in (_joined(tail, variants) for tail in tails) if variants.keys() >= set(own)), [])
    layers = {"default": _defaults(recipe), **_layers(tables, parts, sets, name)}
    stacks = dict(zip(layers, accumulate(layers.values(), _merge), strict=True))
    found: dict[str, dict[str, Any]] = {}
    for table, values in msgspec.json.decode(recipe.to_json()).items():
        for key, value in (values or {}).items():
            said = {who: stacks[who][table][key] for who, layer in layers.items() if key in layer.get(table, {})}
            if (table, key) == ("method", "name"):
                continue
            if not said or [*said.values()][-1] != value:
                said["later"] = value
            if any(own != said.get("default", said) for own in said.values()):
                found[f"{table}.{key}"] = said
    return found


def _defaults(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The defaults of every table, as JSON has them."""
    found: dict[str, dict[str, Any]] = {}
    for table, type_ in {"method": recipe.method_class.Config, **_TABLES}.items():
        for field in msgspec.structs.fields(type_):
            if field.default_factory is not msgspec.NODEFAULT:
                found.setdefault(table, {})[field.name] = field.default_factory()
            elif field.default is not msgspec.NODEFAULT:
                found.setdefault(table, {})[field.name] = field.default
    return dict(msgspec.json.decode(msgspec.json.encode(found)))


def _layers(
    tables: Mapping[str, Any], parts: Iterable[str], sets: Iterable[str], name: str
) -> dict[str, dict[str, Any]]:
    """What a recipe is made of, from the bottom to the top: the file's own tables, its variants, the overrides."""
    layers = {"file": {key: value for key, value in tables.items() if key not in ("variants", "sizes")}}
    variants = _table(tables, "variants", name)
    for part in parts:
        layers[f"variant {part}"] = _table(variants, part, f"{name}: variants")
    overrides: dict[str, Any] = {}
    for override in sets:
        overrides = _merge(overrides, _parse_override(override))
    return layers | {"--set": overrides}


_TABLES: dict[str, type[Struct]] = {
    "training": Training,
    "ema": Ema,
    "sampling": Sampling,
    "data": Data,
    "network": Network,
}


def _joined(variant: str | None, variants: Mapping[str, Any]) -> list[str]:
    """The variants that a name asks for: `m-vsd` is m with vsd laid over it, unless there is one of that very name."""
    return [] if variant is None else [variant] if variant in variants else variant.split("-")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as TOML: {error}") from None


def _resolve(tables: Mapping[str, Any], source: str) -> Recipe:
    """Types every table and fills in the defaults; `source` begins the sentence of every error."""
    for table in tables:
        if table not in Recipe.__struct_fields__:
            raise RecipeError(f"{source}: no table [{table}]; {did_you_mean(table, Recipe.__struct_fields__)}")
    own = dict(_table(tables, "method", source))
    name = own.pop("name", None)
    if not isinstance(name, str) or name not in METHODS:
        raise RecipeError(f"{source}: method.name = {name!r}; {did_you_mean(str(name), METHODS)}")
    method = METHODS[name].load()
    config = _typed(own, method.Config, source, "method")
    typed: dict[str, Any] = {
        table: _typed(_table(tables, table, source), type_, source, table)
        for table, type_ in _TABLES.items()
        if table != "network" or tables.get("network") is not None
    }
    trained = [role for role, part in method.roles_for(config).items() if part.trained]
    if "network" in typed and any(part.frozen for part in method.roles_for(config).values()):
        raise RecipeError(f"{source}: {name} takes its network from the teacher: remove the table [network]")
    if "network" not in typed and method.product == "teacher":
        raise RecipeError(f"{source}: {name} has no teacher: add the table [network]")
    for role in typed["training"].lr_by_role:
        if role not in trained:
            hint = did_you_mean(role, trained)
            raise RecipeError(f"{source}: training.lr_by_role: no trained role {role!r}; {hint}")
    return Recipe(method={"name": name, **msgspec.to_builtins(config)}, **typed)


def _table(tables: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """The table of that name, empty if there is none."""
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise RecipeError(f"{source}: {name} = {table!r} must be a table, [{name}]")
    return table


def _typed(table: dict[str, Any], type_: type[Struct], source: str, name: str) -> Struct:
    """A table as its Struct, or one sentence."""
    for key in table:
        if key not in type_.__struct_fields__:
            raise RecipeError(f"{source}: no key {name}.{key}; {did_you_mean(key, type_.__struct_fields__)}")
    try:
        typed = msgspec.convert(table, type_)
        absurd = next((key for key in table if not _is_sane(getattr(typed, key))), None)
        if absurd is None:
            return typed
        problem, key = f"expected finite numbers of at most {LARGEST:g}", absurd
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        key = re.split(r"\W", place)[0]
    where = f"{name}.{key} = {table[key]!r}" if key in table else f"[{name}]"
    raise RecipeError(f"{source}: {where}: {problem[0].lower()}{problem[1:]}")


def _is_sane(value: object) -> bool:
    """Whether all numbers in a value are finite and of a size that training can count in."""
    if isinstance(value, dict):
        return all(map(_is_sane, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_sane, value))
    return not isinstance(value, int | float) or abs(value) <= LARGEST


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, table by table, key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    """`a.b=v` as the nested table {a: {b: v}}."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise RecipeError(f"--set {override}: write table.key=value, as in training.lr=1e-4")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except RecursionError:
        raise RecipeError(f"--set {override}: {text} is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        parsed = {"value": text.strip()}
        if not re.fullmatch(r"([A-Za-z_]|\.{0,2}/)[\w./-]*", text.strip()):
            raise RecipeError(f"--set {override}: {text!r} is no TOML value; quote a string") from None
    if list(parsed) != ["value"]:
        raise RecipeError(f"--set {override}: one value only")
    value = parsed["value"]
    for key in reversed(keys):
        value = {key: value}
    return dict(value)
