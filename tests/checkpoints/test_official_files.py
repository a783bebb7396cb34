"""The table of official files, and their downloads from a server in their place."""

import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edmdistill.checkpoints import official_files as module
from edmdistill.checkpoints.licences import check_licence
from edmdistill.checkpoints.official_files import (
    OfficialFile,
    documents,
    fetch,
    files_of,
    find_official,
    official_files,
    presets,
    published_result,
    to_text,
)
from edmdistill.checkpoints.source import resolve
from edmdistill.errors import CheckpointError

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_every_file_has_an_address_a_licence_and_a_page():
    files = official_files().values()
    assert len({file.url for file in files}) == len(files)
    for file in files:
        assert file.url.startswith(("https://", "hf://"))
        assert file.page.startswith("https://")
        assert check_licence(file.licence) == file.licence
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        if file.kind == "teacher":
            assert file.url.endswith((f"/{file.name}.pkl", f"/{file.name}.pt"))


def test_all_official_teachers_are_there():
    """EDM: 4 data sets with VP and VE, and ADM on ImageNet, twice. EDM2: the networks of its 36 presets."""
    teachers = [file.name for file in files_of("teacher")]
    kinds = ("edm-", "baseline-", "edm2-", "edm_")
    assert [sum(name.startswith(kind) for name in teachers) for kind in kinds] == [9, 9, 51, 1]
    assert len(presets()) == 36
    assert {one for preset in presets().values() for one in (preset.net, preset.guide) if one} == {
        name for name in teachers if name.startswith("edm2-")
    }
    s = presets()["edm2-img512-s-guid-fid"]
    assert (s.metric, s.value, s.guidance) == ("fid", 2.23, 1.4)
    assert presets()["edm2-img512-s-guid-dino"].metric == "fd_dinov2"
    assert files_of("inception")[0].name == "inception"  # the first is what a protocol asks for
    assert published_result("edm-cifar10-32x32-cond-vp") == {"fid": 1.79, "nfe": 35}
    assert published_result("edm-cifar10-32x32-cond-ve") == {}


def test_a_preset_is_its_networks():
    names = [file.name for file in find_official("edm2-img512-s-guid-fid")]
    assert names == ["edm2-img512-s-2147483-0.025", "edm2-img512-xs-uncond-2147483-0.025"]
    assert [file.name for file in find_official("edm2-img64-s-fid")] == ["edm2-img64-s-1073741-0.075"]


def test_an_unknown_name_is_answered_by_the_nearest():
    with pytest.raises(CheckpointError, match="there is no official file 'inceptoin': did you mean 'inception'"):
        find_official("inceptoin")


def test_the_list_names_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path))
    words = set(to_text().split())
    assert words >= official_files().keys() | presets().keys()
    assert ":http:raw-snapshots/edm2-img512-xs/" in words
    assert [file["name"] for file in documents()["files"]] == list(official_files())
    assert {file["cached"] for file in documents()["files"]} == {None}
    s = "edm2-img512-s-2147483-0.025"
    assert re.search(rf"edm2-img512-s-guid-fid +fid 2\.23: {s}, guided 1\.4 by edm2-img512-xs-uncond", to_text())
    cached = module.cached(official_files()[s].url)
    cached.parent.mkdir()
    cached.touch()
    assert {file["name"]: file["cached"] for file in documents()["files"]}[s] == str(cached)
    assert re.findall(r"^  (\S+) .* in the cache$", to_text(), re.MULTILINE) == [s]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests += 1  # type: ignore[attr-defined]
        content: bytes = self.server.content  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    requests = 0
    content = CONTENT

    def file(self, name: str, sha256: str | None = None) -> OfficialFile:
        """Returns the official file of a name, at this server."""
        url = f"http://127.0.0.1:{self.server_address[1]}/{name}.pkl"
        return replace(official_files()[name], url=url, sha256=sha256)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path / "cache"))
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


NAME = "edm2-img512-s-2147483-0.025"


def test_a_file_is_downloaded_once_and_its_published_digest_checked(server: Server):
    file = server.file(NAME, DIGEST)
    assert file.cached is None
    first, again = fetch(file), fetch(file)
    assert (first.sha256, first.new, again.new, server.requests) == (DIGEST, True, False, 1)
    assert first.path == file.cached
    assert first.path.read_bytes() == CONTENT
    assert "the published file" in str(first)


def test_another_file_than_the_official_one_is_removed(server: Server):
    file = server.file(NAME, "0" * 64)
    with pytest.raises(CheckpointError, match=f"has the sha256 {DIGEST}, not the 0+ that the official file has"):
        fetch(file)
    assert file.cached is None


def test_an_unknown_digest_is_kept_from_the_first_download(server: Server):
    file = server.file(NAME)
    fetched = fetch(file)
    assert "no published digest is known" in str(fetched)
    fetched.path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="it had when it was first downloaded: it is removed"):
        fetch(file)
    assert fetch(file).sha256 == DIGEST
    fetched.path.unlink()
    server.content = b"the publisher's next version"
    with pytest.raises(
        CheckpointError, match=r"again, or delete (\S+) first if its publisher has changed it$"
    ) as caught:
        fetch(file)
    Path(re.findall(r"delete (\S+) first", str(caught.value))[0]).unlink()
    assert fetch(file).path.read_bytes() == server.content


def test_a_source_may_be_an_official_name(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(official_files(), NAME, server.file(NAME))
    path = resolve(NAME)
    assert path.read_bytes() == CONTENT
    monkeypatch.setattr(module, "download", None)
    assert resolve(NAME) == path  # from the cache
    with pytest.raises(CheckpointError, match=f"did you mean the official file {re.escape(NAME)}"):
        resolve(f"{NAME}0")
    with pytest.raises(
        CheckpointError, match=r"with its guide: give edm2-\S+0\.025, and --guide edm2-\S+ --guidance 1\.4 to sample it"
    ):
        resolve("edm2-img512-s-guid-fid")
    (tmp_path / NAME).touch()
    assert resolve(NAME) == Path(NAME)  # a path comes first


def test_a_damaged_file_of_the_hub_goes_with_what_its_link_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--an--owner", "a" * 40
    snapshot, blob = repository / "snapshots" / commit, repository / "blobs" / DIGEST
    for folder in (snapshot, blob.parent, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    blob.write_bytes(CONTENT[:-1] + b"?")
    (snapshot / "config.json").write_text("{}")
    weights = snapshot / "diffusion_pytorch_model.safetensors"
    weights.symlink_to(blob)
    file = replace(official_files()["vae"], url="hf://an/owner", sha256=DIGEST)
    assert file.cached == snapshot
    with pytest.raises(CheckpointError, match="it is removed; run `edmdistill fetch vae` again"):
        fetch(file)
    assert file.cached is None
    assert not weights.is_symlink()
    assert not blob.exists()
