"""The tables of a recipe, their ranges, and the resolved recipe.

The resolved recipe is JSON with every default filled in: it loads back equal, and its hash names what was computed.
`recipes.library` finds recipes and reads them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from edmdistill.defaults import defaults, refuse_idle
from edmdistill.errors import RecipeError, counted, did_you_mean, validation_in_words
from edmdistill.methods import METHODS

if TYPE_CHECKING:
    from edmdistill.methods.base import Method, Role

Count = Annotated[int, Meta(ge=0)]
PositiveCount = Annotated[int, Meta(ge=1)]
Steps = Annotated[tuple[PositiveCount, ...], Meta(min_length=1)]
Positive = Annotated[float, Meta(gt=0)]
Levels = Annotated[tuple[Positive, ...], Meta(min_length=1)]
LearningRate = Annotated[float, Meta(gt=0, le=1e6)]
TotalImages = Annotated[int, Meta(ge=1, lt=10**12)]
Share = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
CompileMode = Literal["off", "default", "reduce-overhead", "max-autotune"]

LARGEST = 1e15
"""Largest number in a recipe. Images and seeds are exact up to here."""


class TrainingTable(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[training]: length, learning rates, and what is saved. Every amount and interval counts images seen."""

    images: TotalImages
    """Total images seen: steps times batch. Each turn of a method has the same batch size."""
    batch: PositiveCount
    """Global batch size."""
    optimizer: Literal["adam", "radam", "adam8bit"] = "adam"
    """`adam8bit` keeps its states in 8 bits, with torchao."""
    lr: LearningRate
    """The optimizer's learning rate, before the factors below."""
    lr_by_role: dict[str, LearningRate] = {}
    """Learning rates of single roles, in place of `lr`: auxiliary = 1e-3."""
    lr_rampup_images: Count = 0
    """Images over which the learning rate grows linearly from 0."""
    lr_decay: Literal["constant", "linear", "inverse_sqrt"] = "constant"
    """`linear`: to 0 over the last `decay_share` of the images. `inverse_sqrt`: by 1 / sqrt(images seen /
    decay_images) once that many are seen, as in EDM2."""
    decay_share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    decay_images: PositiveCount | None = None
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    betas_by_role: dict[str, tuple[BelowOne, BelowOne]] = {}
    """Betas of single roles, in place of `betas`: auxiliary = [0.0, 0.99]."""
    eps: Positive = 1e-8
    grad_clip: Positive | None = None
    """Largest norm of a role's whole gradient. Default: no clipping."""
    dropout: BelowOne | None = None
    """Dropout of the trained networks. Default: as in the checkpoint."""
    dropout_max_resolution: PositiveCount | None = None
    """Largest resolution of features, in pixels a side, at which there is dropout. Default: all."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks. Parameters, times and losses stay float32 or better. fp16 scales the losses. tf32 is
    fp32 but for products on CUDA, whose factors are rounded to 11 bits; without CUDA it is fp32."""
    compile: CompileMode | UnsetType = "off"
    """A mode of torch.compile for the blocks of the networks. It changes rounding alone; the hash leaves it out."""
    seed: Count = 0
    log_every: PositiveCount
    """Interval between lines of metrics.jsonl."""
    snapshot_every: PositiveCount
    """Interval between states to resume from, each with a sample grid."""
    keep: PositiveCount = 2
    """Number of the newest states that are kept."""
    keep_every: PositiveCount | None = None
    """Interval whose first state is kept permanently."""

    def __post_init__(self) -> None:
        if (self.lr_decay == "inverse_sqrt") != (self.decay_images is not None):
            raise ValueError('lr_decay = "inverse_sqrt" and decay_images go together: set both or neither')
        if self.lr_decay != "linear":
            refuse_idle(self, ("decay_share",), f'lr_decay = "{self.lr_decay}"', 'set lr_decay = "linear"')
        if self.dropout is None and self.dropout_max_resolution is not None:
            raise ValueError("dropout_max_resolution limits dropout: set dropout too")
        if self.images < self.batch:
            raise ValueError(f"images = {self.images} is less than one batch of {self.batch}")

    def of(self, role: str) -> TrainingTable:
        """Returns the table with the betas of a role."""
        return replace(self, betas=self.betas_by_role.get(role, self.betas))


class EmaTable(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[ema]: the moving averages of the weights. Sampling uses the first of them."""

    half_life_images: PositiveCount | None = None
    rampup_ratio: Positive | Literal["none"] = 0.05
    """The half-life is at most this share of the images seen so far; "none": it is the same from the start.  Source:
    EDM's ema_rampup_ratio."""
    sigma_rel: tuple[Annotated[float, Meta(ge=0.001, lt=12**-0.5)], ...] = ()
    """Lengths of power-function averages, as in EDM2, to three decimals."""
    snapshot_every: PositiveCount | None = None
    """Interval between snapshots of the power-function averages in RUN/ema, for `edmdistill ema`."""

    def __post_init__(self) -> None:
        if self.half_life_images is None and not self.sigma_rel:
            raise ValueError("there is no average: set half_life_images or sigma_rel")
        if self.half_life_images is None:
            refuse_idle(self, ("rampup_ratio",), "no half_life_images", "set half_life_images")
        if len({round(length, 3) for length in self.sigma_rel} & set(self.sigma_rel)) < len(self.sigma_rel):
            raise ValueError(
                f"sigma_rel = {list(self.sigma_rel)} must be different numbers with at most three decimals"
            )
        if self.snapshot_every is not None and len(self.sigma_rel) < 2:
            raise ValueError("snapshot_every is for post-hoc EMA, which needs two averages: set two or more sigma_rel")


class SamplingTable(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[sampling]: how samples are drawn for the run's grids, and the defaults of its checkpoint."""

    nfe: Steps = (1, 2, 4)
    """Network evaluations in grids and measurements. Default: 35 for a teacher; else the number that
    the method trains for, or 1, 2 and 4."""
    gamma: Share = 1.0
    """Share of fresh noise in each step; 0 is deterministic, and the default of imm and of sCM in intervals."""
    sigmas: dict[str, Levels] = {}
    """Noise levels by NFE, "2" = [80.0, 2.515], descending, repeats allowed. Default: those that the method trains for,
    where it does not train for all, as SiD; else EDM's curve."""

    def __post_init__(self) -> None:
        for nfe, sigmas in self.sigmas.items():
            if nfe != str(len(sigmas)):
                raise ValueError(f'sigmas."{nfe}" has {counted(len(sigmas), "noise level")}: write one for each step')
            if list(sigmas) != sorted(sigmas, reverse=True):
                raise ValueError(f'sigmas."{nfe}" = {list(sigmas)} must decrease: sampling goes from noise to data')


class DataTable(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[data]: the part of the data set that is used."""

    split: str = "train"
    xflip: bool = False
    """Adds a mirrored copy of every image, as in EDM."""


class EvaluationTable(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[evaluation]: metrics of the average while it is trained, in metrics.jsonl. They change nothing that is trained.

    The average that is best by the protocol's first metric, at the first number of steps, is kept in RUN/best.
    """

    protocol: str
    """As of `edmdistill eval --protocol`; its metrics are measured against its own reference, or the run's data."""
    every: PositiveCount
    """Interval between measurements, a multiple of training.log_every."""
    ref: str = ""
    """As of `edmdistill eval --ref`; latents need it."""
    weights: dict[str, Annotated[str, Meta(min_length=1)]] = {}
    """Files of feature spaces by name, as of `edmdistill eval --weights`. Default: the official ones."""
    n: Annotated[int, Meta(ge=2, le=1_000_000)] = 1000
    """Images of a measurement, of the seeds from 0."""
    nfe: Steps = (2,)
    """Network evaluations. Default: 35 for a teacher; else the number that the method trains for, or 2."""
    diagnose: bool = False
    """Measures as `edmdistill diagnose` does, too, with n jumps from each level."""


class NetworkTable(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[network]: the network that a method without a frozen teacher makes, unless it starts from a checkpoint.

    The data give the image shape and the number of classes.
    """

    kind: Literal["song", "adm", "edm2"]
    arguments: dict[str, Any] = {}
    """Arguments of the constructor, named as in the official class."""
    sigma_data: Positive = 0.5


TABLES: dict[str, type[Struct]] = {
    "training": TrainingTable,
    "ema": EmaTable,
    "sampling": SamplingTable,
    "data": DataTable,
    "network": NetworkTable,
    "evaluation": EvaluationTable,
}
"""The tables that are the same for every method."""
OPTIONAL = "network", "evaluation"
"""Those that a recipe may leave out."""


class Recipe(Struct, frozen=True, kw_only=True, dict=True):
    """A resolved recipe: the file, its variants and the overrides, with all defaults."""

    method_name: str
    method: Struct
    """The method's own Config."""
    training: TrainingTable
    ema: EmaTable
    sampling: SamplingTable = SamplingTable()
    data: DataTable = DataTable()
    network: NetworkTable | None = None
    evaluation: EvaluationTable | UnsetType = UNSET

    @cached_property
    def method_class(self) -> type[Method[Any]]:
        return METHODS[self.method_name].load()

    @cached_property
    def roles(self) -> dict[str, Role]:
        """The method's roles under these options, by name."""
        return self.method_class.roles_for(self.method)

    @cached_property
    def group_size(self) -> int:
        """Images whose losses depend on one another; the batch is split between such groups alone."""
        return self.method_class.group_size(self.method)

    @cached_property
    def guidance(self) -> tuple[float, float]:
        """Smallest and largest guidance weight that the product is trained for; (1, 1): no guidance."""
        return self.method_class.guidance(self.method)

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON: equal for equal computations, whatever the file was called."""
        training = replace(self.training, compile=UNSET)
        document = replace(self._document(), training=training, evaluation=UNSET)
        return hashlib.sha256(msgspec.json.encode(document, order="deterministic")).hexdigest()

    def tables(self) -> dict[str, Any]:
        """Returns the resolved recipe as plain values, as in recipe.resolved.json."""
        return dict(msgspec.to_builtins(self._document()))

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self._document())) + b"\n"

    def _document(self) -> _Document:
        method = {"name": self.method_name, **msgspec.to_builtins(self.method)}
        return _Document(method, self.training, self.ema, self.sampling, self.data, self.network, self.evaluation)

    @staticmethod
    def from_json(text: bytes) -> Recipe:
        """Raises: RecipeError: not a resolved recipe of this version."""
        try:
            tables = msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise RecipeError(f"the resolved recipe is not JSON ({error}): start a new run directory") from None
        method = tables.get("method")
        if isinstance(method, dict) and isinstance(name := method.get("name"), str) and name not in METHODS:
            raise RecipeError(
                f"the run was trained by {name!r}, a method that neither edmdistill nor an installed package has: "
                "install the package that has it"
            )
        return Recipe.from_tables(tables, "the resolved recipe")

    @staticmethod
    def from_tables(tables: Mapping[str, Any], source: str) -> Recipe:
        """Checks and types every table, and fills in the defaults.

        Args:
            source: begins the sentence of every error.
        Raises: RecipeError: an unknown table or key, or a value out of range.
        """
        for name in tables:
            if name not in _Document.__struct_fields__:
                raise RecipeError(f"{source}: no table [{name}]; {did_you_mean(name, _Document.__struct_fields__)}")
        options = dict(table(tables, "method", source))
        method_name = options.pop("name", None)
        if not isinstance(method_name, str) or method_name not in METHODS:
            raise RecipeError(f"{source}: method.name = {method_name!r}; {did_you_mean(str(method_name), METHODS)}")
        method_class = METHODS[method_name].load()
        config = _typed(options, method_class.Config, source, "method")
        typed: dict[str, Any] = {
            name: _typed(table_defaults(name, method_class, config) | table(tables, name, source), type_, source, name)
            for name, type_ in TABLES.items()
            if name not in OPTIONAL or tables.get(name) is not None
        }
        recipe = Recipe(method_name=method_name, method=config, **typed)
        _check_roles(recipe, source)
        if recipe.training.batch % recipe.group_size:
            raise RecipeError(
                f"{source}: training.batch = {recipe.training.batch} must be a multiple of {recipe.group_size}, "
                f"because {method_name} compares images in groups"
            )
        evaluation, log_every = recipe.evaluation, recipe.training.log_every
        if isinstance(evaluation, EvaluationTable) and evaluation.every % log_every:
            raise RecipeError(
                f"{source}: evaluation.every = {evaluation.every} must be a multiple of training.log_every, "
                f"{log_every}, such as {log_every * (evaluation.every // log_every + 1)}"
            )
        return recipe


class _Document(Struct):
    """A resolved recipe as it is written. [method] is a dict, whose keys the hash sorts."""

    method: dict[str, Any]
    training: TrainingTable
    ema: EmaTable
    sampling: SamplingTable
    data: DataTable
    network: NetworkTable | None
    evaluation: EvaluationTable | UnsetType = UNSET


def table_defaults(name: str, method: type[Method[Any]], config: Struct) -> dict[str, Any]:
    """Returns the defaults of one of TABLES: evaluations and noise are the method's; a teacher follows its ODE."""
    steps, gamma = method.sampling(config)
    steps = 35 if method.product == "teacher" else steps
    of_method = {"gamma": gamma} | ({} if steps is None else {"nfe": (steps,)})
    usual = defaults(TABLES[name])
    return usual | {key: value for key, value in of_method.items() if key in usual}


def table(tables: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """Returns the table of that name, empty if there is none.  Raises: RecipeError: it is no table."""
    value = tables.get(name, {})
    if not isinstance(value, dict):
        raise RecipeError(f"{source}: {name} = {value!r} must be a table, [{name}]")
    return value


def _check_roles(recipe: Recipe, source: str) -> None:
    """Raises: RecipeError: a network that the method has no use for, or lacks; rates or betas of no trained role."""
    name, roles = recipe.method_name, recipe.roles
    if recipe.network is not None and any(role.frozen for role in roles.values()):
        raise RecipeError(f"{source}: {name} takes its network from the teacher: remove the table [network]")
    if recipe.network is None and recipe.method_class.product == "teacher":
        raise RecipeError(f"{source}: {name} has no teacher: add the table [network]")
    trained = [role_name for role_name, role in roles.items() if role.trained]
    for key in ("lr_by_role", "betas_by_role"):
        for role_name in getattr(recipe.training, key):
            if role_name not in trained:
                hint = did_you_mean(role_name, trained)
                raise RecipeError(f"{source}: training.{key}: no trained role {role_name!r}; {hint}")
    teacher, all_betas = recipe.method_class.product == "teacher", {*trained} <= recipe.training.betas_by_role.keys()
    for where, key, names, cause, fix in (
        (teacher, "sampling", ("gamma", "sigmas"), f'method.name = "{name}"', "leave it out"),
        (all_betas, "training", ("betas",), "betas_by_role of every role", "leave out the betas of a role"),
    ):
        try:
            refuse_idle(getattr(recipe, key), names if where else (), cause, fix)
        except ValueError as error:
            raise RecipeError(f"{source}: [{key}]: {error}") from None


def _typed(values: dict[str, Any], type_: type[Struct], source: str, name: str) -> Struct:
    """Returns a table as its Struct.  Raises: RecipeError: in one sentence."""
    for key in values:
        if key not in type_.__struct_fields__:
            raise RecipeError(f"{source}: no key {name}.{key}; {did_you_mean(key, type_.__struct_fields__)}")
    lacking = [f.encode_name for f in msgspec.structs.fields(type_) if f.required and f.encode_name not in values]
    if lacking:
        raise RecipeError(f"{source}: [{name}] lacks {', '.join(lacking)}")
    try:
        typed = msgspec.convert(_whole(values), type_)
        out_of_range = next((key for key in values if not _is_in_range(getattr(typed, key))), None)
        if out_of_range is None:
            return typed
        key, inside, rest = out_of_range, False, f" must be finite, and at most {LARGEST:g}"
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        key, inside, rest = re.split(r"\W", place)[0], "[" in place, validation_in_words(problem)
        if problem.startswith("Invalid enum value"):
            rest = f": choose one of {', '.join(map(str, _choices(get_type_hints(type_)[key])))}"
    where = f"{name}.{key} = {values[key]!r}" if key in values else f"[{name}]"
    each = ": each of its values" if inside and not rest.startswith(":") else ""
    raise RecipeError(f"{source}: {where}{each}{rest}")


def _whole(value: Any) -> Any:
    """Returns a value with integers for its whole floats, so that a field for either takes 200e6."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _choices(hint: object) -> list[object]:
    """Returns the values of the Literals in a type."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for part in get_args(hint) for value in _choices(part)]


def _is_in_range(value: object) -> bool:
    """Returns whether all numbers in a value are finite and at most LARGEST."""
    if isinstance(value, dict):
        return all(map(_is_in_range, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_in_range, value))
    return not isinstance(value, int | float) or abs(value) <= LARGEST
