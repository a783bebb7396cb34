"""The library of recipes: names, variants and overrides, and a sentence on every mistake that says what to do."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from msgspec.structs import fields, replace

from edmdistill.errors import RecipeError
from edmdistill.methods import METHODS
from edmdistill.recipes.library import SHIPPED, find_recipe, load_recipe, noted_command, origins, recipe_names
from edmdistill.recipes.schema import EmaTable, TrainingTable
from edmdistill.sampling.spec import SOLVERS

MINIMAL = """
[training]
images = 1000
batch = 10
lr = 1e-3
log_every = 10
snapshot_every = 100
[ema]
half_life_images = 50
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "mine.toml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_every_file_and_variant_has_a_name():
    names = set(recipe_names())
    for path in SHIPPED.rglob("*.toml"):
        base = path.relative_to(SHIPPED).with_suffix("").as_posix()
        tables = tomllib.loads(path.read_text())
        for variant in tables.get("variants", {}):
            assert any(name.startswith(base) and name.endswith(f"-{variant}") for name in names)
        assert (base in names) != bool(tables.get("sizes"))
    assert not [name for name in names if len(set(name.split("-"))) < len(name.split("-"))]  # no size twice
    assert {"cosim/imagenet512-s", "cosim/digits", "cosim/digits-quickstart", "scd/imagenet512-m-multistep4"} <= names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_says_how_it_is_run_and_what_was_measured(name: str):
    path = find_recipe(name).path
    header = path.read_text().split("\n[")[0]
    assert header.splitlines()[0].endswith("."), "`recipes list` shows the first line alone"
    method = path.parent.name
    assert f"edmdistill train {method} " in header
    assert f"--recipe {path.relative_to(SHIPPED).with_suffix('').as_posix()}" in header
    assert "Measured here" in header


def test_the_hash_names_the_computation_not_the_file(write):
    shipped = load_recipe("cosim/digits-quickstart")
    copy = write(find_recipe("cosim/digits").text, "copy.toml").removesuffix(".toml")
    assert load_recipe(f"{copy}-quickstart.toml", method="cosim").hash == shipped.hash
    assert load_recipe("cosim/digits").hash != shipped.hash
    assert load_recipe("cosim/digits-quickstart", sets=["training.seed=1"]).hash != shipped.hash


def test_a_file_without_a_method_is_for_the_method_that_runs_it(write):
    mine = write(MINIMAL)
    assert load_recipe(mine, method="sid").method_name == "sid"
    with pytest.raises(RecipeError, match=r"method.name = None; choose one of diffusion, cosim, sid"):
        load_recipe(mine)


def test_the_longest_file_name_wins(write):
    write(MINIMAL + "[variants.b-c.training]\nseed = 1\n", "a.toml")
    longer = write(MINIMAL + "[variants.c.training]\nseed = 2\n", "a-b.toml")
    assert load_recipe(longer.replace("a-b", "a-b-c"), method="sid").training.seed == 2
    Path(longer).unlink()
    assert load_recipe(longer.replace("a-b", "a-b-c"), method="sid").training.seed == 1


def test_variants_join_and_the_later_one_wins(write):
    both = "[variants.m.training]\nlr = 2.0\nseed = 2\n[variants.vsd.training]\nseed = 3\n"
    mine = write(MINIMAL + both).removesuffix(".toml")

    def read(variants: str) -> tuple[float, int]:
        training = load_recipe(f"{mine}-{variants}.toml", method="sid").training
        return training.lr, training.seed

    assert [read(v) for v in ("m", "vsd", "m-vsd", "vsd-m")] == [(2, 2), (1e-3, 3), (2, 3), (2, 2)]
    with pytest.raises(RecipeError, match="has no variant 'vsb'; did you mean 'vsd'"):
        read("m-vsb")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.lr=2e-4", lambda r: r.training.lr == 2e-4),
        ("training.images = 2_000", lambda r: r.training.images == 2000),
        ("training.precision=bf16", lambda r: r.training.precision == "bf16"),
        ('training.precision="bf16"', lambda r: r.training.precision == "bf16"),
        ("training.lr_by_role.auxiliary=1", lambda r: r.training.lr_by_role == {"auxiliary": 1.0}),
        ("training.betas_by_role.auxiliary=[0.0, 0.9]", lambda r: r.training.of("auxiliary").betas == (0.0, 0.9)),
        ("training.betas=[0.5, 0.9]", lambda r: r.training.betas == (0.5, 0.9)),
        ("sampling.sigmas.2=[80, 2.5]", lambda r: r.sampling.sigmas["2"] == (80.0, 2.5)),
        ('sampling.sigmas."2"=[80, 3]', lambda r: r.sampling.sigmas["2"] == (80.0, 3.0)),
        ("method.trajectory_steps=8", lambda r: r.method.trajectory_steps == 8),
    ],
)
def test_set(override: str, read):
    assert read(load_recipe("cosim/digits", sets=[override]))


@pytest.mark.parametrize("path", ["lpips.pt", "nets/lpips.pt", "./lpips.pt", "../lpips.pt", "/nets/lpips.pt"])
def test_a_path_needs_no_quotes(path: str):
    sets = ["method.distance=lpips", f"method.lpips={path}"]
    assert load_recipe("ctm/digits", sets=sets).method.lpips == path


def test_the_last_set_wins():
    assert load_recipe("cosim/digits", sets=["training.seed=1", "training.seed=2"]).training.seed == 2


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.lr", "write table.key=value"),
        ("lr=1", "write table.key=value"),
        ("training..lr=1", "write table.key=value"),
        ("training.precision=b f", "put strings in quotes"),
        ("training.lr=1\nother=2", "one value only"),
        ("training.lrr=1", "no key training.lrr; did you mean 'lr'?"),
        ("method.coeff=1", "no key method.coeff; did you mean 'coef'?"),
        ("trainig.lr=1", "no table [trainig]; did you mean 'training'?"),
        ("method.name=cosin", "method.name = 'cosin'; did you mean 'cosim'?"),
        ("training.lr=0", "training.lr = 0 must be above 0"),
        ("training.lr=fast", "training.lr = 'fast' must be a number"),
        ("training.batch=0", "training.batch = 0 must be at least 1"),
        ("training.batch=1.5", "training.batch = 1.5 must be a whole number"),
        ("training.images=10", "images = 10 is less than one batch of 12"),
        ("training.dropout=1.0", "training.dropout = 1.0 must be below 1"),
        ("training.dropout_max_resolution=16", "set dropout too"),
        ("training.betas=0.9,0.99", "'0.9,0.99' is not a TOML value; put strings in quotes, and lists in brackets"),
        ("training.betas=[0.9]", "training.betas = [0.9] must be a list of 2 values"),
        ("training.lr_decay=inverse_sqrt", "decay_images go together"),
        ("training.decay_images=5", "decay_images go together"),
        ("training.lr_by_role.critic=1", "no trained role 'critic'; choose one of generator, auxiliary"),
        ("training.betas_by_role.critic=[0.0, 0.9]", "training.betas_by_role: no trained role 'critic'"),
        ("training.lr_by_role.teacher=1", "no trained role 'teacher'"),
        ("training.precision=fp8", "training.precision = 'fp8': choose one of fp32, "),
        ("training=1e-3", "write table.key=value"),
        ("ema.half_life_images.x=1", "ema.half_life_images = {'x': 1} must be a whole number"),
        ("sampling.gamma=2", "sampling.gamma = 2 must be at most 1"),
        ("sampling.sigmas.2=[80.0]", "has 1 noise level:"),
        ("sampling.sigmas.2=[2.5, 80]", "must decrease"),
        ("sampling.sigmas.1=[-1]", "'1': [-1]}: each of its values must be above 0"),
        ("method.alpha=-1", "method.alpha = -1 must be above 0"),
        ("network.kind=edm2", "cosim takes its network from the teacher: remove the table [network]"),
    ],
)
def test_mistakes_get_one_sentence(override: str, sentence: str):
    with pytest.raises(RecipeError) as error:
        load_recipe("cosim/digits", sets=[override])
    assert sentence in str(error.value)


def test_a_batch_holds_whole_groups():
    assert load_recipe("imm/digits", sets=["method.particles=8"]).group_size == 8
    with pytest.raises(RecipeError, match="batch = 30 must be a multiple of 4, because imm compares images in"):
        load_recipe("imm/digits", sets=["training.batch=30"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[training\n", "cannot be read as TOML"),
        pytest.param(f"a = {'[' * 100_000}", "cannot be read as TOML", id="nested"),
        ("training = 5\n" + MINIMAL.replace("[training]", "[data]"), "training = 5 must be a table"),
        (MINIMAL.replace("lr = 1e-3\n", ""), "[training] lacks lr"),
        ("[training]\nlr = 1e-3\n", "[training] lacks images, batch, log_every, snapshot_every"),
        (MINIMAL.split("[ema]")[0], "[ema]: there is no average: set half_life_images or sigma_rel"),
        (MINIMAL + "[method]\nname = 'cosim'\n", "is a recipe for cosim, not for sid"),
        ("method = 'sid'\n" + MINIMAL, "method = 'sid' must be a table"),
        ("variants = 1\n" + MINIMAL, "variants = 1 must be a table"),
        ("sizes = 's'\n" + MINIMAL, "sizes = 's' must be a list of variants' names"),
    ],
)
def test_broken_files_get_one_sentence(write, text: str, sentence: str):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(text), method="sid")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cosim/digit", "did you mean 'cosim/digits'?"),
        ("cosim/digits-quick", "has no variant 'quick'; did you mean 'quickstart'?"),
        ("cosim/digits-", "has no variant ''; choose one of quickstart"),
        ("cosim/imagenet512", "needs a size: one of cosim/imagenet512-s, cosim/imagenet512-m, cosim/imagenet512-l"),
        ("scd/imagenet512-multistep4", "needs a size: one of scd/imagenet512-s-multistep4, scd/imagenet512-m-"),
        ("scd/imagenet512-multistep4-s", "needs a size: one of"),  # which comes first
        ("nowhere/recipe.toml", "there is no file nowhere/recipe.toml"),
        ("cosim", "'cosim' is a method, and each data set has a recipe of its own; choose one of cosim/cifar10"),
        ("cosim/digits.toml", "the recipe that ships with the package is 'cosim/digits'"),
    ],
)
def test_wrong_names_get_one_sentence(name: str, sentence: str):
    with pytest.raises(RecipeError) as error:
        load_recipe(name)
    assert sentence in str(error.value)


def test_the_recipe_of_another_method_is_refused():
    with pytest.raises(RecipeError, match="cosim/digits is a recipe for cosim, not for sid"):
        load_recipe("cosim/digits", method="sid")


def test_a_method_without_a_teacher_needs_a_network(write):
    with pytest.raises(RecipeError, match=r"diffusion has no teacher: add the table \[network\]"):
        load_recipe(write(MINIMAL), method="diffusion")
    network = load_recipe("diffusion/digits").network
    assert network is not None
    assert network.kind == "edm2"


def test_defaults_are_equal_however_they_are_said(write):
    said = MINIMAL.replace("half_life_images = 50", "half_life_images = 50\nrampup_ratio = 0.05")
    assert load_recipe(write(said), method="sid") == load_recipe(write(MINIMAL, "other.toml"), method="sid")
    assert EmaTable(half_life_images=50).rampup_ratio == 0.05
    assert TrainingTable.__struct_fields__[:4] == ("images", "batch", "optimizer", "lr")


@pytest.mark.parametrize(
    ("method", "options", "nfe", "gamma"),
    [
        ("diffusion", "", [(35,), (35,)], 1.0),
        ("sct", "", [(1, 2, 4), (2,)], 1.0),
        ("sct", "intervals = 4", [(4,), (4,)], 0.0),
        ("imm", "particles = 2", [(1, 2, 4), (2,)], 0.0),
        ("sid", "", [(1,), (1,)], 1.0),
        ("dmd2", "levels = [2.5, 0.5]", [(3,), (3,)], 1.0),
    ],
)
def test_the_default_evaluations_are_the_methods(
    write, method: str, options: str, nfe: list[tuple[int, ...]], gamma: float
):
    network = "[network]\nkind = 'edm2'\n" if method in ("diffusion", "sct", "imm") else ""
    evaluation = "[evaluation]\nprotocol = 'digits'\nevery = 12_000\n"
    mine = write(MINIMAL + network + evaluation + f"[method]\n{options}\n")
    recipe = load_recipe(mine, method=method)
    assert [recipe.sampling.nfe, recipe.evaluation.nfe] == nfe
    assert recipe.sampling.gamma == gamma
    if method == "diffusion":
        assert SOLVERS["heun"].num_steps(35) == 18
    assert not origins(recipe, Path(mine).read_text(), mine, []).keys() & {"sampling.nfe", "evaluation.nfe"}


def test_names_are_listed_without_torch():
    code = "import sys, edmdistill.recipes.library as r; r.recipe_names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_wheel_carries_the_recipes_and_what_ships_with_the_package(tmp_path: Path):
    root = Path(__file__).parent.parent.parent
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)]
    subprocess.run(build, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    names = subprocess.run(
        [
            sys.executable,
            "-c",
            "import edmdistill.recipes.library as r; print(r.SHIPPED, *r.recipe_names(), sep='\\n')",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert names == [str(tmp_path / "installed/edmdistill/recipes_data"), *recipe_names()]
    package = root / "edmdistill"
    shipped = {path.relative_to(root) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {path for path in shipped if not (tmp_path / "installed" / path).is_file()} == set()


def test_where_every_value_comes_from():
    name, sets = "scd/imagenet512-m-vsd", ["training.lr=1e-5", "sampling.sigmas.1=[80.0]", "training.keep=2"]
    recipe, text = load_recipe(name, None, sets), find_recipe(name).text
    found = origins(recipe, text, name, sets)
    stated, resolved = json.loads(json.dumps(found)), json.loads(recipe.to_json())
    for key, said in stated.items():
        table, _, field = key.partition(".")
        assert [*said.values()][-1] == resolved[table][field]
        assert "later" not in said
        assert any(value != said.get("default", "none") for value in said.values())
    assert {"variant m", "variant vsd"} <= {who for said in stated.values() for who in said}
    assert stated["training.lr"]["--set"] == 1e-5
    assert stated["sampling.sigmas"]["default"] == {}
    assert "training.keep" not in stated  # the default, said once more
    assert "method.name" not in stated
    changed = replace(recipe, training=replace(recipe.training, log_every=7))
    assert origins(changed, text, name, sets)["training.log_every"]["later"] == 7


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_its_defaults_with_what_is_said_of_it(name: str):
    recipe = load_recipe(name)
    found = origins(recipe, find_recipe(name).text, name, [])
    assert found
    assert not any("later" in said for said in found.values())


SETS = [
    [],
    ["training.images=320"],
    ["method.levels=[2.0, 0.3]", "training.lr=1e-3"],
    ["method.lpips=\"my 'file'.pt\"", "method.guide=network"],
    ["sampling.sigmas.2=[80, 1]"],
    ["a.b=x\\y $HOME"],
]


@pytest.mark.parametrize("name", ["kd/digits", "my recipe.toml"])
@pytest.mark.parametrize("sets", SETS)
def test_the_command_above_a_recipe_is_read_back(name: str, sets: list[str]) -> None:
    source = find_recipe("kd/digits")._replace(name=name)
    assert noted_command(source.text_with_command(sets)) == (name, sets)
    older = "".join(f"\n#   --set {override}" for override in sets)  # before they were quoted
    assert noted_command(f"# Trained by --recipe {name}{older}\n\n{source.text}") == (name, sets)


@pytest.mark.parametrize("text", ["", "[method]\n", "# Trained by hand\n#   --set a.b=1\n"])
def test_a_recipe_without_a_command_above_it(text: str) -> None:
    assert noted_command(text) is None


STEPS = {"dmd2": "levels=[2.0]", "kd": "levels=[2.0]", "ladd": "levels=[2.0]", "pd": "steps=2"}


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.partition("/")[0] in STEPS])
def test_a_change_of_steps_changes_what_is_drawn(name: str) -> None:
    """Grids, measurements and the command that `train` prints at its end are in the steps that are trained."""
    assert load_recipe(name, sets=[f"method.{STEPS[name.partition('/')[0]]}"]).sampling.nfe == (2,)


def test_methods_of_as_many_steps_as_are_set_are_known() -> None:
    options = {name: {field.name for field in fields(METHODS[name].load().Config)} for name in METHODS}
    assert {name for name, known in options.items() if known & {"levels", "steps"}} == set(STEPS)
