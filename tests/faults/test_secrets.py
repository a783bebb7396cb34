"""What is secret in an address (user, password, query, fragment, tokens) is neither kept, printed nor published."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from edmdistill.checkpoints.source import resolve, source_name
from edmdistill.cli import main
from edmdistill.errors import CheckpointError, EdmDistillError, HubError, public_address, without_secrets
from edmdistill.evaluation.evaluate import provenance

SECRET = "s3cr3t"
ADDRESSES = {
    f"https://host/a/edm.pkl?token={SECRET}": "https://host/a/edm.pkl",
    f"https://user:{SECRET}@host/a/edm.pkl": "https://host/a/edm.pkl",
    f"HTTPS://us%40er:{SECRET}@host:8080/a/edm.pkl#{SECRET}": "HTTPS://host:8080/a/edm.pkl",
    f"https://{SECRET}@host/a@1/edm.pkl": "https://host/a@1/edm.pkl",
    f"https://a@b:{SECRET}@host/edm.pkl": "https://host/edm.pkl",
    f"https://user:pass/{SECRET}@host/edm.pkl": "https://***",
    f"https://host/edm.pkl%3Ftoken={SECRET}": "https://host/edm.pkl",
    f"https://host?{SECRET}": "https://host",
    f"http://[::1]:80/edm.pkl?{SECRET}": "http://[::1]:80/edm.pkl",
    f"hf://user:{SECRET}@owner/name/edm.pkl@v1": "hf://owner/name/edm.pkl@v1",
    f"hf://owner/name/edm.pkl?{SECRET}": "hf://owner/name/edm.pkl",
    f"s3://key:{SECRET}@bucket/edm.pkl": "s3://bucket/edm.pkl",
    f"ftp://user:{SECRET}@host/edm.pkl": "ftp://host/edm.pkl",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_scheme_host_and_path_stay(address: str) -> None:
    assert public_address(address) == source_name(address) == ADDRESSES[address]
    assert without_secrets(f"see {address} now") == f"see {ADDRESSES[address]} now"
    assert public_address(public_address(address)) == public_address(address)


@pytest.mark.parametrize("mark", ["<", ">", "'", '"', "(", "&"])
def test_any_mark_may_be_in_an_address(mark: str) -> None:
    assert without_secrets(f"a https://host/a{mark}b?token={SECRET} b") == f"a https://host/a{mark}b b"
    assert without_secrets(f"a https://host/a?b={mark}{SECRET} b") == "a https://host/a b"
    assert without_secrets(f"<https://user:{mark}{SECRET}@host/a>, b") == "<https://host/a>, b"


@pytest.mark.parametrize("before", ["'https://a/b',", "1", "a_", "https://a/b/"])
def test_an_address_may_begin_anywhere(before: str) -> None:
    assert without_secrets(f"{before}https://user:{SECRET}@host/a?{SECRET}'") == f"{before}https://host/a'"
    assert without_secrets(f"https://a/b?next={before}https://host/{SECRET}") == "https://a/b"


@pytest.mark.parametrize("text", ["no address", "a://b", "https://host/a/edm.pkl is here", "owner/name@v1", "a@b:c"])
def test_other_text_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_no_error_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (EdmDistillError, CheckpointError, HubError):
        for address in ADDRESSES:
            assert SECRET not in str(error(f"{address} cannot be had, {address!r}: see ({address})."))
    assert str(HubError("the token hf_abcdefghijkl is not known")) == "the token hf_*** is not known"


@pytest.mark.parametrize(
    "address",
    [
        *(address.replace("host", "127.0.0.1:1") for address in ADDRESSES if "host" in address),
        f"http://127.0.0.1:1/a b?{SECRET}",
        f"http://127.0.0.1:1/\x01?{SECRET}",
        f"http://127.0.0.1:1/\ud800?{SECRET}",
        f"http://user:{SECRET} x'y\"@127.0.0.1:1/edm.pkl",
        f"http://user:{SECRET}@[/edm.pkl",
        f"http://{SECRET}@/edm.pkl",
        f"hf://{SECRET}@owner",
        f"gopher://{SECRET}@127.0.0.1/edm.pkl",
    ],
)
def test_no_failed_download_tells(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        resolve(address)
    assert SECRET not in str(caught.value)
    assert str(caught.value).isprintable()
    assert not any(SECRET in path.name for path in tmp_path.rglob("*"))


def test_convert_does_not_tell(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edmdistill.checkpoints.source.download", lambda url: golden / "edm2-rgb-cond.pkl")
    address = f"https://user:{SECRET}@host/a/edm2.pkl?token={SECRET}"
    for _ in range(2):  # written, and there already
        done = CliRunner().invoke(main, ["convert", address, str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
        assert SECRET not in done.output
    kept = [path for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"]
    assert all(SECRET not in path.read_text() for path in kept)
    assert any("https://host/a/edm2.pkl" in path.read_text() for path in kept)


def test_results_do_not_tell() -> None:
    for address in ADDRESSES:
        assert SECRET not in str(provenance(address, None, "cpu", "8"))
        assert SECRET not in str(provenance(None, address, "cpu", "8"))
