"""Publishing, against a stand-in of the Hub that the real client talks to."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from hub_server import READER, TOKEN, Hub, Repository
from msgspec.structs import replace

from edmdistill import __version__, load_generator, sample
from edmdistill.checkpoints import hub_client
from edmdistill.checkpoints.config import read_config, write_config
from edmdistill.checkpoints.layout import CARD, CONFIG, MODEL
from edmdistill.checkpoints.source import open_source
from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.cli import main
from edmdistill.errors import CheckpointError, HubError
from edmdistill.publish.hub import GRID, Published, build_package, push

GENERATOR = Path(__file__).parent.parent / "checkpoints" / "format-1.0"
NAME = "me/cosim-digits"
# The client streams a file in a way that httpx would rather have otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A generator in a folder, among other things."""
    shutil.copytree(GENERATOR, tmp_path / "generator")
    (tmp_path / "generator" / "optimizer.pt").write_bytes(b"2 GB of moments")
    return tmp_path / "generator"


def publish(folder: Path, branch: str | None = None, **options: object) -> Published:
    return push(build_package(folder, NAME, branch=branch), **options)  # type: ignore[arg-type]


def change(folder: Path) -> None:
    """Other weights."""
    tensors, metadata = load_tensors(folder / MODEL)
    tensors["out_gain"] = tensors["out_gain"] + 0.1
    save_tensors(folder / MODEL, tensors, metadata)


def head(server: Hub, branch: str = "main") -> dict[str, bytes]:
    repository = server.repositories[NAME]
    return repository.commits[repository.branches[branch]]


def test_only_what_is_needed_is_published_and_it_draws_the_same(server: Hub, folder: Path) -> None:
    done = publish(folder)
    files = head(server)
    assert files.keys() == {MODEL, CONFIG, CARD, GRID, ".gitattributes"}
    assert files[MODEL] == (folder / MODEL).read_bytes()
    assert done.url == f"{server.url}/{NAME}/tree/{done.revision}"
    assert not done.unchanged
    assert server.sent() == len(files[MODEL])
    here, contents = load_generator(folder), load_generator(NAME)
    assert contents.config == here.config
    assert torch.equal(sample(contents, 2, seeds=range(4)), sample(here, 2, seeds=range(4)))


def test_a_fresh_process_with_no_network_but_the_hub_draws_the_same(server: Hub, folder: Path, tmp_path: Path) -> None:
    publish(folder)
    code = (
        "import socket, sys, edmdistill\n"
        "from edmdistill.checkpoints.store import save_tensors\n"
        "connect = socket.socket.connect\n"
        "def only(self, address):\n"
        "    assert address[:2] == ('127.0.0.1', int(sys.argv[1])), address\n"
        "    return connect(self, address)\n"
        "socket.socket.connect = only\n"
        "images = edmdistill.sample(edmdistill.load_generator(sys.argv[2]), 2, seeds=range(4))\n"
        "assert 'torch._dynamo' not in sys.modules  # its import would be a third of the time\n"
        "from pathlib import Path\n"
        "save_tensors(Path(sys.argv[3]), {'images': images})\n"
    )
    settings = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    arguments = [str(server.server_address[1]), NAME, str(tmp_path / "drawn")]
    root = str(Path(__file__).parent.parent.parent)
    environment = os.environ | settings | {"PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code, *arguments], env=environment, check=True)
    drawn, _ = load_tensors(tmp_path / "drawn")
    assert torch.equal(drawn["images"], sample(load_generator(folder), 2, seeds=range(4)))


def test_pushed_again_nothing_is_sent_again(server: Hub, folder: Path) -> None:
    first = publish(folder)
    server.calls.clear()
    second = publish(folder)
    assert second == first._replace(unchanged=True)
    assert server.sent() == 0
    assert not [call for call in server.calls if "/commit/" in call.path]

    write_config(folder, replace(read_config(folder), label_names=("x", "y", "z")))
    assert publish(folder).revision != first.revision  # the weights are the same, and stay
    assert server.sent() == 0


@pytest.mark.parametrize("fault", [500, "break"])
def test_a_push_that_was_interrupted_goes_on(server: Hub, folder: Path, fault: int | str) -> None:
    server.faults["POST .*/commit/"] = fault, 1
    with pytest.raises(HubError, match=r"^me/cosim-digits is not published: the Hub .*run the same command again"):
        publish(folder)
    assert head(server).keys() == {".gitattributes"}  # nothing is published by halves
    sent = server.sent()
    assert not publish(folder).unchanged
    assert server.sent() == sent == (folder / MODEL).stat().st_size


def test_nobody_elses_commit_is_written_over(server: Hub, folder: Path) -> None:
    def meanwhile(stage: str) -> None:
        if stage == "sending":
            server.repositories[NAME].commit("main", {MODEL: b"somebody else's"})

    with pytest.raises(HubError, match=r"someone else has changed it in the meantime; run the same command again"):
        publish(folder, on_message=meanwhile)
    assert head(server)[MODEL] == b"somebody else's"


def test_a_connection_that_breaks_is_tried_again(server: Hub, folder: Path) -> None:
    server.faults["PUT /objects"] = "break", 2
    assert not publish(folder).unchanged


@pytest.mark.parametrize(
    ("call", "fault", "sentence"),
    [
        ("POST /api/repos/create", 401, "you are not logged in to the Hub; log in with `hf auth login`"),
        ("POST /api/repos/create", 403, "your token does not allow it; create one with the right permissions"),
        ("POST .*/commit/", 409, "another change is in progress there; try again in a minute"),
        ("POST .*/commit/", 412, "someone else has changed it in the meantime"),
        ("PUT /objects", 413, "the Hub does not accept files of that size"),
        ("POST .*/preupload/", 500, r"the Hub has an internal error \(500\)"),
        ("POST .*/commit/", "silence", r"the Hub cannot be reached \(.*timed out"),
        ("GET /api/models/me/[^/]*$", "silence", r"the Hub cannot be reached \(.*timed out"),
        ("POST /api/validate-yaml", 429, "you have sent too many requests to the Hub"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    server: Hub, folder: Path, call: str, fault: int | str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "TIMEOUT", 0.2)
    server.faults[call] = fault, 10
    with pytest.raises(HubError) as caught:
        publish(folder)
    assert re.match(f"^{NAME} is not published: {sentence}", str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_who_may_not_write(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for token, sentence in (
        (READER, "your token does not allow it; .* the Hub says: you may not write here"),
        ("hf_old", "you are not logged in to the Hub; log in with"),
        ("", "you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "nowhere")
        with pytest.raises(HubError, match=sentence.replace(" .* ", r".*\(")):
            publish(folder)


def test_nobody_answers(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"cannot be reached \(\[Errno \d+\] Connection refused\); check the network"):
        publish(folder)


def test_the_client_is_left_as_it_was(server: Hub, folder: Path) -> None:
    hooks = huggingface_hub.get_session().event_hooks
    publish(folder)
    assert huggingface_hub.get_session().event_hooks == hooks


def test_private_is_private(server: Hub, folder: Path) -> None:
    publish(folder, private=True)
    assert server.repositories[NAME].private
    publish(folder)  # and stays so
    assert server.repositories[NAME].private
    server.repositories[NAME].private = False
    with pytest.raises(HubError, match="exists and is public: make it private in its settings"):
        publish(folder, private=True)


def test_branches_and_revisions(server: Hub, folder: Path, tmp_path: Path) -> None:
    first = publish(folder)
    change(folder)
    second = publish(folder, branch="try/2", message="Another gain")
    assert first.revision != second.revision
    assert server.repositories[NAME].messages[1:] == [f"A generator by edmdistill {__version__}", "Another gain"]
    assert head(server)[MODEL] == (GENERATOR / MODEL).read_bytes()
    gains = {
        name: float(load_generator(f"{NAME}{name}").flow.network.out_gain)
        for name in ("", "@main", f"@{first.revision}", f"@{second.revision}", "@try/2")
    }
    assert [round(gain - gains[""], 3) for gain in gains.values()] == [0, 0, 0, 0.1, 0.1]
    for name, commit in ((NAME, first), (f"{NAME}@try/2", second), (f"hf://{NAME}", first)):
        assert open_source(name).exact == f"{name.partition('@')[0]}@{commit.revision}"
    here = open_source(NAME).path
    assert open_source(here).exact == str(here)
    drawn = CliRunner().invoke(
        main, ["sample", f"{NAME}@try/2", "--seeds", "0", "--nfe", "1", "--out", str(tmp_path / "out")]
    )
    assert drawn.exit_code == 0, drawn.output
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["source"] == f"{NAME}@{second.revision}"
    with pytest.raises(HubError, match=r"^me/cosim-digits@v9 cannot be downloaded from the Hub: it has no such rev"):
        load_generator(f"{NAME}@v9")


def test_what_was_downloaded_needs_no_network(
    server: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = publish(folder)
    expected = sample(load_generator(NAME), 2, seeds=[0])

    copy = "or give the path of a copy to the command that reads it"

    def the_copy_is_used(reason: str) -> None:
        for name in (NAME, f"{NAME}@{done.revision}"):
            assert torch.equal(sample(load_generator(name), 2, seeds=[0]), expected)
        with pytest.raises(
            HubError, match=rf"^me/other cannot be downloaded .*: there is no copy of it here, and .*{reason}"
        ):
            load_generator("me/other")

    server.faults[""] = 503, 1000
    the_copy_is_used(r"the Hub has an internal error \(503\)")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    the_copy_is_used(f"the Hub cannot be reached .*, {copy}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    the_copy_is_used(f"HF_HUB_OFFLINE is set; unset it, {copy}")
    with pytest.raises(HubError, match=f"^me/other/a.pkl cannot be downloaded .*: HF_HUB_OFFLINE is set; .*, {copy}"):
        load_generator("hf://me/other/a.pkl")
    with pytest.raises(HubError, match=r"is not published: HF_HUB_OFFLINE is set; unset it$"):
        publish(folder)


@pytest.mark.parametrize("token", [TOKEN, ""], ids=["known", "anonymous"])
def test_what_is_not_there(server: Hub, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    """The Hub says 401 to those who are not logged in, whether a repository is private or a name mistyped."""
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "nowhere")
    server.repositories["me/teacher"] = Repository(private=False)
    server.repositories["me/secret"] = Repository(private=True)
    nowhere = "there is no such repository, or it is private; check the name, or log in with `hf auth login`"
    for source, sentence in (
        ("me/nothing", nowhere),
        ("hf://me/nothing/edm.pkl", nowhere),
        ("hf://me/teacher/edm.pkl", "it has no such file; check the file's name"),
        ("hf://me/secret/edm.pkl", "it has no such file" if token else nowhere),
    ):
        name = source.removeprefix("hf://")
        with pytest.raises(HubError, match=f"^{name} cannot be downloaded from the Hub: {sentence}"):
            load_generator(source)


def test_what_comes_back_otherwise_is_said(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = build_package(folder, NAME)
    with pytest.raises(HubError, match=r"was published, but draws other images than here: do not use it"):
        push(package._replace(samples=package.samples + 0.01))
    push(package._replace(samples=package.samples + 1e-7))  # rounding, of another processor

    def altered(*words: str, local_dir: str, **more: object) -> None:
        huggingface_hub.snapshot_download(*words, local_dir=local_dir, **more)
        (Path(local_dir) / MODEL).write_bytes((Path(local_dir) / MODEL).read_bytes()[:-1] + b"@")

    with monkeypatch.context() as patch:
        patch.setattr("edmdistill.publish.hub.snapshot_download", altered)
        with pytest.raises(HubError, match=r"was published, but draws other images than here: do not use it"):
            push(package)
    server.faults[f"/resolve/.*/{MODEL}"] = 404, 10
    with pytest.raises(HubError, match=r"is published, but cannot be downloaded to check it: .*there is no such"):
        push(package)


def test_states_and_other_things_are_not_published(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "run" / "state" / "000000000100"
    state.mkdir(parents=True)
    (state / "progress.json").write_text("{}")
    with pytest.raises(HubError, match="is a training state, which is not published"):
        build_package(state, NAME)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        build_package(tmp_path / "run", NAME)
    with pytest.raises(HubError, match=r"is not a folder: use a checkpoint folder or a run directory$"):
        build_package(tmp_path / "nothing", NAME)
    with pytest.raises(HubError, match=r"; `hf download me/it --revision v1 --local-dir DIR` makes one of a repo"):
        build_package("me/it@v1", NAME)
    tensors, _ = load_tensors(folder / MODEL)
    save_tensors(folder / MODEL, tensors | {"exp_avg.out_gain": tensors["out_gain"]})
    with pytest.raises(CheckpointError, match=r"holds exp_avg\.out_gain, for which its network has no place"):
        build_package(folder, NAME)


def test_the_licence_is_carried_into_all_that_is_published(server: Hub, folder: Path) -> None:
    config = read_config(folder)
    write_config(folder, replace(config, provenance=replace(config.provenance, licence=None)))
    with pytest.raises(HubError, match="has no licence: add --licence"):
        build_package(folder, NAME)
    push(build_package(folder, NAME, "mit"))
    files = head(server)
    assert json.loads(files[CONFIG])["provenance"]["licence"] == "mit"
    assert "\nlicense: mit\n" in files[CARD].decode()
    assert read_config(folder).provenance.licence is None  # what is here stays as it is
