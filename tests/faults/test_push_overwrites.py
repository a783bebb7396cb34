"""A push compares what is there with what it put there: another's model is refused, a card changed by hand stays."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import Hub
from msgspec.structs import replace
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edmdistill.checkpoints.config import read_config, write_config
from edmdistill.checkpoints.layout import CARD, CONFIG, MODEL
from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.cli import main
from edmdistill.errors import CheckpointError, HubError
from edmdistill.publish import hub
from edmdistill.publish.hub import Published, build_package, push
from edmdistill.publish.repository import GRID, PICTURE_SIGNATURE, signed_png

GENERATOR = Path(__file__).parent.parent / "checkpoints" / "format-1.0"
NAME = "me/cosim-digits"
PICTURE = signed_png(Image.new("L", (2, 2), 7))
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the Hub's client


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A generator; its samples are not what is tested here, and are not drawn."""
    monkeypatch.setattr(hub, "_grid", lambda model, nfe, decoder: PICTURE)
    monkeypatch.setattr(hub, "_verify_download", lambda package, revision, kept: None)
    shutil.copytree(GENERATOR, tmp_path / "generator")
    return tmp_path / "generator"


def publish(folder: Path, branch: str | None = None, **options: object) -> Published:
    return push(build_package(folder, NAME, branch=branch), **options)  # type: ignore[arg-type]


def head(server: Hub, branch: str = "main") -> dict[str, bytes]:
    repository = server.repositories[NAME]
    return repository.commits[repository.branches[branch]]


def edit(server: Hub, name: str, text: bytes) -> None:
    server.repositories[NAME].commit("main", {name: text})


def train_on(folder: Path) -> None:
    """Later weights of the same run."""
    tensors, metadata = load_tensors(folder / MODEL)
    tensors["out_gain"] = tensors["out_gain"] + 0.1
    save_tensors(folder / MODEL, tensors, metadata)
    write_config(folder, replace(read_config(folder), images_seen=10**9))


def test_a_card_changed_by_hand_stays_and_the_weights_go_on(server: Hub, folder: Path) -> None:
    assert publish(folder).kept == ()
    by_hand = head(server)[CARD] + b"\nMy own words.\n"
    edit(server, CARD, by_hand)
    train_on(folder)
    assert publish(folder).kept == (CARD,)
    assert head(server)[CARD] == by_hand
    assert head(server)[MODEL] == (folder / MODEL).read_bytes()
    assert publish(folder, overwrite_card=True).kept == ()
    assert head(server)[CARD] == build_package(folder, NAME).card


@pytest.mark.parametrize("text", [b"# Mine\n", b"", b"---\nlicense: mit\n---\n", b"\xff\xfe"])
def test_a_card_that_was_there_before_the_first_push_stays(server: Hub, folder: Path, text: bytes) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo(NAME)
    edit(server, CARD, text)
    assert publish(folder).kept == (CARD,)
    assert head(server)[CARD] == text
    assert MODEL in head(server)


def test_a_card_that_only_passed_through_an_editor_is_renewed(server: Hub, folder: Path) -> None:
    publish(folder)
    edit(server, CARD, head(server)[CARD].replace(b"\n", b"\r\n"))
    train_on(folder)
    assert publish(folder).kept == ()
    assert head(server)[CARD] == build_package(folder, NAME).card


def test_what_a_branch_holds_decides_for_the_branch(server: Hub, folder: Path) -> None:
    publish(folder)
    publish(folder, branch="next")
    repository, by_hand = server.repositories[NAME], b"# The branch's own\n"
    repository.commit("next", {CARD: by_hand})
    train_on(folder)
    assert publish(folder, branch="next").kept == (CARD,)
    assert head(server, "next")[CARD] == by_hand
    assert head(server, "next")[MODEL] == (folder / MODEL).read_bytes() != head(server)[MODEL]
    repository.commit("main", {"pytorch_model.bin": b"BERT", CONFIG: b"{}"})
    assert publish(folder, branch="next").unchanged
    with pytest.raises(HubError, match="another program's model"):
        publish(folder)


@pytest.mark.parametrize("card", [None, b"# By hand, with my picture\n"], ids=["no-card", "card"])
@pytest.mark.parametrize("picture", ["drawn", "repainted", "not-a-picture"])
def test_a_picture_of_somebody_else_is_not_replaced(
    server: Hub, folder: Path, card: bytes | None, picture: str, tmp_path: Path
) -> None:
    """It stays beside a card that was edited; a card of ours, which would show it as its own, is not written."""
    with Image.open(io.BytesIO(PICTURE)) as ours:
        changed = ours.copy()
    changed.putpixel((1, 1), 8)
    repainted = PngInfo()  # by a program that keeps texts
    repainted.add_text(PICTURE_SIGNATURE, ours.info[PICTURE_SIGNATURE])
    for name, text in (("drawn", None), ("repainted", repainted)):
        changed.save(tmp_path / f"{name}.png", pnginfo=text)
    (tmp_path / "not-a-picture.png").write_bytes(b"notes")
    theirs = (tmp_path / f"{picture}.png").read_bytes()
    publish(folder)
    server.repositories[NAME].commit("main", {GRID: theirs, CARD: card})
    train_on(folder)
    if card is None:
        with pytest.raises(HubError, match=rf"^{NAME} holds a {GRID} that edmdistill did not .* --overwrite-card"):
            publish(folder)
    else:
        assert publish(folder).kept == (CARD, GRID)
        assert head(server)[CARD] == card
        assert head(server)[MODEL] == (folder / MODEL).read_bytes()
    assert head(server)[GRID] == theirs
    assert publish(folder, overwrite_card=True).kept == ()
    assert head(server)[GRID] == PICTURE


def test_a_picture_of_ours_is_renewed_beside_a_card_of_somebody_else(
    server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(folder)
    edit(server, CARD, b"# By hand\n")
    for color in (8, 9):
        later = signed_png(Image.new("L", (2, 2), color))
        monkeypatch.setattr(hub, "_grid", lambda model, nfe, decoder, later=later: later)
        assert publish(folder).kept == (CARD,)
        assert head(server)[GRID] == later


def test_weights_that_were_deleted_there_come_back(server: Hub, folder: Path) -> None:
    publish(folder)
    del head(server)[MODEL]
    publish(folder)
    assert head(server)[MODEL] == (folder / MODEL).read_bytes()


def test_a_card_that_was_not_changed_is_renewed(server: Hub, folder: Path) -> None:
    publish(folder)
    before = head(server)[CARD]
    train_on(folder)
    assert publish(folder).kept == ()
    assert head(server)[CARD] == build_package(folder, NAME).card != before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"recipe_hash": "ef" * 32},
            r"another model, a generator by \w+, recipe efefefefefef,.* with another recipe: ",
        ),
        ({"method": "sid"}, "another model, a generator by sid.* with another method: "),
        ({"stage": "teacher"}, "another model, a teacher .* with another stage: "),
        ({"sha256": "34" * 32}, r"another model, a generator .* \(343434343434\); .* with another source: "),
        ({"parent": "12" * 32}, "another model, a generator.* with another parent: "),
        (
            {"parent": "12" * 32, "guide": "34" * 32, "init": "56" * 32},
            r"another model, a generator.*; this is .* with another \w+, \w+ and \w+: ",
        ),
        ({"guide": "12" * 32, "init": "56" * 32}, "another model, a generator.* with another guide and init: "),
    ],
)
def test_another_runs_repository_is_refused(
    server: Hub, folder: Path, change: dict[str, object], sentence: str
) -> None:
    config = read_config(folder)
    if not hasattr(config, next(iter(change))):
        change = {"provenance": replace(config.provenance, **change)}
    write_config(folder, replace(config, **change))
    push(build_package(folder, NAME))
    before = head(server)
    write_config(folder, config)
    with pytest.raises(HubError, match=rf"^{NAME} holds {sentence}.* to replace it$"):
        publish(folder)
    assert head(server) == before
    publish(folder, replace_model=True)
    assert json.loads(head(server)[CONFIG]) == json.loads(build_package(folder, NAME).files[CONFIG])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("pytorch_model.bin", b"BERT", "the weights of another program, pytorch_model.bin"),
        ("unet/diffusion_pytorch_model.safetensors", b"SD", "the weights of another program, unet/"),
        (MODEL, b"somebody's", "weights that edmdistill did not put there"),
        (CONFIG, b'{"architectures": ["BertModel"]}', "another program's model, with a config.json of its own"),
        (CONFIG, b"\xff", "another program's model"),
    ],
)
def test_another_programs_repository_is_refused(
    server: Hub, folder: Path, name: str, content: bytes, sentence: str
) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo(NAME)
    edit(server, name, content)
    for branch in (None, "mine"):
        there = "" if branch is None else " in the branch mine alone"
        with pytest.raises(HubError, match=f"^{NAME} holds {sentence}.* add --replace to replace it{there}$"):
            publish(folder, branch=branch)
    assert set(head(server)) == {".gitattributes", name}
    assert "mine" not in server.repositories[NAME].branches
    publish(folder, replace_model=True)
    assert publish(folder).unchanged  # it is replaced once
    assert head(server)[MODEL] == (folder / MODEL).read_bytes()
    assert name in (MODEL, CONFIG) or head(server)[name] == content


def test_weights_that_somebody_put_in_our_place_are_not_lost(server: Hub, folder: Path) -> None:
    publish(folder)
    edit(server, MODEL, b"fine-tuned by hand")
    with pytest.raises(HubError, match=f"holds a {MODEL} that edmdistill did not put there"):
        publish(folder)
    assert head(server)[MODEL] == b"fine-tuned by hand"
    publish(folder, replace_model=True)
    assert head(server)[MODEL] == (folder / MODEL).read_bytes()


@pytest.mark.parametrize(
    ("name", "text", "stays"),
    [
        (None, b"", False),
        ("notes.png", b"somebody's", False),
        (GRID, b"somebody's", True),
        (CARD, b"# By hand\n\n![Samples](samples.png)\n", True),
    ],
)
def test_a_picture_of_ours_goes_where_the_package_has_none(
    server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, text: bytes, stays: bool
) -> None:
    publish(folder)
    assert GRID in head(server)
    if name is not None:
        edit(server, name, text)
    before = head(server)
    monkeypatch.setattr(hub, "_decoder", lambda model, vae: None)  # as for latents whose VAE is not here
    publish(folder)
    assert before.keys() - head(server).keys() == (set() if stays else {GRID})
    assert all(head(server)[other] == before[other] for other in head(server) if other != CARD)
    assert publish(folder).unchanged


@pytest.mark.parametrize("licence", ["mit\nx: y", "no such licence!", ""])
def test_no_repository_is_made_for_a_licence_that_the_hub_refuses(server: Hub, folder: Path, licence: str) -> None:
    with pytest.raises(CheckpointError, match=r"^the licence .* is neither an identifier of the Hub"):
        build_package(folder, NAME, licence)
    origin = read_config(folder)
    write_config(folder, replace(origin, provenance=replace(origin.provenance, licence=licence)))
    with pytest.raises(CheckpointError, match=r"neither an identifier of the Hub|control characters"):
        build_package(folder, NAME)
    assert server.repositories == {}


def test_the_command_says_that_the_card_stays(server: Hub, folder: Path) -> None:
    publish(folder)
    edit(server, CARD, b"# By hand\n")
    result = CliRunner().invoke(main, ["push-to-hub", str(folder), NAME])
    assert result.exit_code == 0, result.output
    assert f"The {CARD} there was edited by hand and is kept: --overwrite-card replaces it." in result.stderr
    result = CliRunner().invoke(main, ["push-to-hub", str(folder), NAME, "--overwrite-card"])
    assert result.exit_code == 0, result.output
    assert not re.search("by hand", head(server)[CARD].decode())
