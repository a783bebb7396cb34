"""`edmdistill push-to-hub`: what it says, and what of a run it publishes."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner, Result
from hub_server import READER, TOKEN, Hub, Repository

from edmdistill.checkpoints.config import read_config
from edmdistill.checkpoints.layout import CARD, CONFIG, MODEL
from edmdistill.cli import main
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.results import Result as Measurement
from edmdistill.evaluation.results import results_json
from edmdistill.publish.repository import GRID
from edmdistill.recipes.library import load_recipe
from edmdistill.sampling.spec import SamplerRecord

NAME = "me/digits"
# The client streams a file in a way that httpx would rather have otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def push(*words: object) -> Result:
    return CliRunner().invoke(main, ["push-to-hub", *map(str, words)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a state, a generator and measurements of it, of its teacher and of what it was before."""
    path = tmp_path / "run"
    shutil.copytree(Path(__file__).parent.parent / "checkpoints" / "format-1.0", path / "generator")
    (path / "recipe.resolved.json").write_bytes(load_recipe("cosim/digits-quickstart").to_json())
    (path / "recipe.toml").write_text("# Trained by --recipe cosim/digits-quickstart\n")
    data = {"name": "digits", "images": 1500, "resolution": 4, "channels": 1, "classes": 3}
    (path / "run.json").write_text(json.dumps({"data": data}))
    (path / "state" / "000000001000").mkdir(parents=True)
    (path / "state" / "000000001000" / "optimizer.safetensors").write_bytes(b"moments")
    config = read_config(path / "generator")
    protocol = PROTOCOLS["digits"]
    (path / "eval").mkdir()
    for name, method, images, fd in (("own", "cosim", 1000, 4.25), ("old", "cosim", 500, 8.5), ("t", None, None, 1.75)):
        measured = Measurement(
            metrics={"fd_digits": fd},
            protocol=protocol,
            protocol_sha256=protocol.sha256(),
            sampler=SamplerRecord(solver="gamma" if method else "heun", nfe=len(name) + 1),
            provenance={"source": str(tmp_path), "method": method, "images_seen": images}
            | {"recipe_hash": config.recipe_hash if method else None},
        )
        (path / "eval" / f"{name}.json").write_text(results_json([measured]))
    return path


def test_a_run_is_published(server: Hub, run: Path, tmp_path: Path) -> None:
    result = push(run, NAME, "--message", "The first")
    assert result.exit_code == 0, result.output
    repository = server.repositories[NAME]
    revision = repository.branches["main"]
    files = repository.commits[revision]
    assert files.keys() == {MODEL, CONFIG, CARD, GRID, ".gitattributes"}
    assert result.stdout == (
        f"{server.url}/{NAME}/tree/{revision} is published; a fresh download has the same bytes and samples. "
        f"To sample from it:\n  edmdistill sample {NAME} --seeds 0-63 --out images\n"
    )
    assert [(r["metrics"], r["provenance"]["source"]) for r in json.loads(files[CONFIG])["results"]] == [
        ({"fd_digits": 4.25}, NAME)
    ]
    assert repository.messages[1:] == ["The first"]
    assert not repository.private
    card = files[CARD].decode()
    for fact in ("Recipe: cosim/digits-quickstart, hash", "Data: digits, 1,500 images, 4x4", "The recipe, with every"):
        assert fact in card
    assert "4.250" in card
    assert "1.750" in card
    assert "8.500" not in card
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert f"{NAME}/tree/{revision} was already published; " in push(run, NAME).stdout


def test_sample_draws_from_it(server: Hub, run: Path, tmp_path: Path) -> None:
    assert push(run, NAME, "--branch", "next").exit_code == 0
    there = server.repositories[NAME]
    (result,) = json.loads(there.commits[there.branches["next"]][CONFIG])["results"]
    assert result["provenance"]["source"] == f"{NAME}@next"
    for source, out in ((f"{NAME}@next", "there.npz"), (run, "here.npz")):
        words = ["sample", str(source), "--nfe", "2", "--seeds", "0-3", "--class", "tree frog", "--out", out]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "there.npz").read_bytes() == (tmp_path / "here.npz").read_bytes()


def test_options_of_the_repository(server: Hub, run: Path) -> None:
    assert push(run, NAME, "--private").exit_code == 0
    assert server.repositories[NAME].private
    server.repositories[NAME].commit("main", {CONFIG: b"{}"})
    refused = push(run, NAME)
    assert refused.exit_code == 2
    assert refused.stderr.endswith("choose another repository, or add --replace to replace it\n")
    assert push(run, NAME, "--replace").exit_code == 0


def changes(server: Hub) -> list[str]:
    """The calls that would change something there."""
    reading = ("GET", "HEAD")
    return [call.path for call in server.calls if call.method not in reading and call.path != "/api/validate-yaml"]


@pytest.mark.parametrize("there", [False, True])
def test_a_dry_run_prints_the_card_and_changes_nothing(server: Hub, run: Path, there: bool) -> None:
    if there:
        server.repositories[NAME] = Repository(private=False)
    result = push(run, NAME, "--dry-run", "--branch", "next")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("---\nlibrary_name: edmdistill\n")
    *files, last = result.stderr.splitlines()
    assert [line.split()[0] for line in files] == [f"{NAME},", MODEL, GRID, CONFIG, CARD]
    assert last == f"The Hub takes it{'' if there else ', as a new repository'}; nothing was uploaded."
    assert changes(server) == []
    assert server.repositories.keys() == {NAME} if there else not server.repositories


@pytest.mark.parametrize(
    ("change", "words", "sentence"),
    [
        ({}, ("--private",), f"{NAME} exists and is public: make it private"),
        ({CONFIG: b"{}"}, (), f"{NAME} holds another program's model"),
        ({CONFIG: b"{}"}, ("--branch", "next"), "add --replace to replace it in the branch next alone"),
        ({GRID: b"theirs"}, (), f"{NAME} holds a {GRID} that edmdistill did not put there"),
    ],
    ids=["private", "replace", "branch", "picture"],
)
def test_a_dry_run_refuses_what_the_push_refuses(
    server: Hub, run: Path, change: dict[str, bytes], words: tuple[str, ...], sentence: str
) -> None:
    server.repositories[NAME] = Repository(private=False)
    server.repositories[NAME].commit("main", dict(change))
    dry, real = push(run, NAME, *words, "--dry-run"), push(run, NAME, *words)
    assert (dry.exit_code, real.exit_code) == (2, 2)
    assert sentence in dry.stderr
    assert dry.stderr == real.stderr
    assert changes(server) == []


def test_a_card_that_the_hub_refuses_is_refused_before_a_repository_is_made(server: Hub, run: Path) -> None:
    server.faults["POST /api/validate-yaml"] = 400, 100
    for words in (("--dry-run",), ()):
        assert push(run, NAME, *words).exit_code == 2
        assert (changes(server), server.repositories) == ([], {})


def test_a_dry_run_says_what_would_be_kept(server: Hub, run: Path) -> None:
    server.repositories[NAME] = Repository(private=False)
    server.repositories[NAME].commit("main", {CARD: b"# Mine", GRID: b"mine"})
    said = push(run, NAME, "--dry-run").stderr
    for name in (CARD, GRID):
        assert f"The {name} there was edited by hand and is kept: --overwrite-card replaces it." in said
    assert "is kept" not in push(run, NAME, "--dry-run", "--overwrite-card").stderr
    pushed = push(run, NAME)  # whose download has what was kept
    assert (pushed.exit_code, pushed.stderr.count("is kept: ")) == (0, 2)


@pytest.mark.parametrize(
    ("token", "owner", "there", "sentence"),
    [
        (READER, "me", True, "your token does not allow it"),
        (READER, "me", False, "your token does not allow it"),
        ("hf_wrong", "me", True, "you are not logged in to the Hub; log in with"),
        ("hf_wrong", "me", False, "you are not logged in to the Hub; log in with"),
        (TOKEN, "you", False, "your login may write to me and lab alone"),
    ],
    ids=["reader", "reader-new", "wrong", "wrong-new", "other-new"],
)
def test_a_dry_run_asks_who_may_write(
    server: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, token: str, owner: str, there: bool, sentence: str
) -> None:
    if there:
        server.repositories[f"{owner}/it"] = Repository(private=False)
    monkeypatch.setenv("HF_TOKEN", token)
    result = push(run, f"{owner}/it", "--dry-run")
    assert result.exit_code == 2
    assert f"{owner}/it would not be published: {sentence}" in result.stderr
    assert changes(server) == []


def test_a_dry_run_of_a_gated_repository_is_refused(server: Hub, run: Path) -> None:
    """It exists; to whoever has no access, the Hub says hardly more than of one that does not."""
    server.repositories[NAME] = Repository(private=False)
    server.repositories[NAME].gated = True
    result = push(run, NAME, "--dry-run")
    assert result.exit_code == 2
    assert "access to it is gated; request it on its page" in result.stderr


def test_a_login_writes_to_its_own_and_its_organizations(
    server: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever case; of a fine-grained token, the Hub does not say what it may do."""
    user = {"name": "Me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "fineGrained"}}}
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: user)
    for owner in ("me", "LAB"):
        result = push(run, f"{owner}/new", "--dry-run")
        assert result.exit_code == 0, result.output
        assert "The Hub takes it, as a new repository" in result.stderr


@pytest.mark.parametrize("way", ["login", "offline", "broken", "away"])
def test_a_dry_run_without_the_hub_says_so(server: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "login":
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "nowhere")
    elif way == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        server.faults[""] = 500 if way == "broken" else "break", 100
    result = push(run, NAME, "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[-1].startswith("The Hub was not asked: ")


def test_the_commands_of_a_card_name_its_branch(server: Hub, run: Path) -> None:
    card = push(run, NAME, "--dry-run", "--branch", "try/2").stdout
    assert f"edmdistill sample {NAME}@try/2 --nfe" in card
    assert f'edmdistill.load_generator("{NAME}@try/2")' in card
    assert f"`{NAME}@REVISION` names a branch" in card
    assert "@" not in push(run, NAME, "--dry-run").stdout.replace("@REVISION", "").partition("## Citation")[0]


@pytest.mark.parametrize(
    "branch",
    ["", "a b", "-x", ".x", "a..b", "a.lock", "x/", "/x", "a//b", "a/.b", "HEAD", "@", "a@{b", "a~1", "a#b", 'a"b'],
)
def test_a_branch_that_git_does_not_take_is_refused(server: Hub, run: Path, branch: str) -> None:
    result = push(run, NAME, f"--branch={branch}", "--dry-run")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"Error: '{branch}' cannot name a branch: use letters")
    assert server.calls == []


def test_what_is_refused_is_one_sentence(server: Hub, run: Path) -> None:
    for words, sentence in (
        (
            (run, NAME, "--licence", "apache-2.0"),
            "the weights are under cc-by-nc-sa-4.0, or derived from such weights, and apache",
        ),
        ((run / "state" / "000000001000", NAME), "is not a checkpoint"),
        ((run, "digits"), "digits is not a repository name: write OWNER/NAME"),
    ):
        result = push(*words)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert sentence in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert server.calls == []
