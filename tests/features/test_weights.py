"""Files of weights: every format in which people have them gives the same tensors, and hostile ones a sentence."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from feature_files import TINY_DINOV2, save_pth
from safetensors.torch import save_file
from script_files import script

from edmdistill import load_features
from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.store import save_tensors
from edmdistill.errors import CheckpointError
from edmdistill.features.weights import converted, read_weights

TENSORS = torch.load(TINY_DINOV2, weights_only=True)


def read(path: Path) -> dict[str, torch.Tensor]:
    return read_weights(path, "dinov2", "dinov2").tensors


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_format_gives_the_same_tensors(kind: str, tmp_path: Path):
    path = tmp_path / "weights"
    tensors = TENSORS | {"count": torch.tensor(7), "shared": TENSORS["norm.bias"]}
    if kind == "safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    else:
        save_pth(path, tensors, legacy=kind == "legacy")
    found = read(path)
    assert found.keys() == tensors.keys() - {"mask_token"}
    assert all(torch.equal(found[name], tensors[name]) for name in found)


def test_torchscript_gives_the_tensors_of_its_state_dict_in_order(tmp_path: Path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Linear(5, 2)).eval()
    path = script(network, tmp_path / "script.pt", torch.zeros(1, 3, 5, 5))
    found = read_weights(path, "inception", "inception")
    expected = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    assert found.script
    assert list(found.tensors) == list(expected)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


def test_what_all_names_begin_with_is_left_out(tmp_path: Path):
    path = save_pth(tmp_path / "w.pth", {f"model.net.{name}": tensor for name, tensor in TENSORS.items()})
    assert read(path).keys() == TENSORS.keys() - {"mask_token"}


def test_only_a_module_that_holds_everything_is_left_out(tmp_path: Path):
    names = {"model.a.b": 1.0, "model.a": 2.0, "model": 3.0}
    path = save_pth(tmp_path / "w.pth", {name: torch.tensor([value]) for name, value in names.items()})
    assert {name: float(tensor) for name, tensor in read(path).items()} == names
    deep = save_pth(tmp_path / "deep.pth", {"a.b.c.d.e.f": torch.ones(1)})
    assert list(read(deep)) == ["e.f"], "four modules at most"


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    (tmp_path / "w.pth").touch()
    monkeypatch.setattr("edmdistill.features.weights.sha256_file", refuse)
    with pytest.raises(CheckpointError, match=r"w\.pth cannot be read \(Permission denied\): make it readable, or"):
        read(tmp_path / "w.pth")


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_pth(tmp_path / "w.pth", {"a": torch.ones(1)})
    assert read(Path("~/w.pth")).keys() == {"a"}


def test_a_script_that_was_proved_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "script.pt").write_bytes(b"what a script holds")
    stored = converted(sha256_file(tmp_path / "script.pt"))
    save_tensors(stored, {"a": torch.ones(3)}, {})
    found = read_weights(tmp_path / "script.pt", "inception", "inception")
    assert torch.equal(found.tensors["a"], torch.ones(3))
    assert (found.script, found.sha256) == (False, sha256_file(tmp_path / "script.pt"))


def test_names_may_share_numbers_but_not_be_made_of_the_same_ones(tmp_path: Path):
    """A file of a megabyte would else become any number of them."""
    numbers = torch.ones(2**18)
    for count, forged in ((2, False), (3, True)):
        torch.save({f"n{i}": numbers for i in range(count)}, tmp_path / "w.pth")
        if not forged:
            assert len(read(tmp_path / "w.pth")) == count
            continue
        with pytest.raises(CheckpointError, match="holds the same numbers many times"):
            read(tmp_path / "w.pth")


@pytest.mark.parametrize("space", ["inception", "inception-pytorch-fid"])
def test_the_official_file_of_the_space_comes_first(space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"run `edmdistill fetch {space}`; .* by --weights {space}=FILE"):
        load_features(space)


def legacy(tmp_path: Path) -> bytes:
    return save_pth(tmp_path / "legacy.pth", {"a": torch.ones(50), "b": torch.zeros(3)}, legacy=True).read_bytes()


@pytest.mark.parametrize("length", [0, 1, 20, 200, -1])
def test_truncated_files_are_refused(length: int, tmp_path: Path):
    (tmp_path / "cut.pth").write_bytes(legacy(tmp_path)[:length])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        read(tmp_path / "cut.pth")


def test_a_storage_that_claims_more_than_it_has_is_refused(tmp_path: Path):
    whole = legacy(tmp_path)
    count = (50).to_bytes(8, "little") + torch.ones(1).numpy().tobytes()
    assert whole.count(count) == 1
    (tmp_path / "forged.pth").write_bytes(whole.replace(count, (2**40).to_bytes(8, "little") + count[8:]))
    with pytest.raises(CheckpointError, match="declares 50 numbers where it holds 1,099,511,627,776"):
        read(tmp_path / "forged.pth")


class Hostile:
    def __reduce__(self) -> object:
        return (Path.touch, (Path("PWNED"),))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_run_code_are_refused(legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = save_pth(tmp_path / "hostile.pth", {"a": torch.ones(2), "b": Hostile()}, legacy=legacy)  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="nothing was executed"):
        read(path)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("value", [[torch.ones(2)], {}, {"epoch": 3}, {"state_dict": {"a": torch.ones(2)}}])
def test_other_than_a_state_dict_is_refused(value: object, tmp_path: Path):
    torch.save(value, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="a state dict"):
        read(tmp_path / "other.pth")


@pytest.mark.parametrize("content", [b"", b"<html>no</html>", b"\x80\x04", pickle.dumps({"a": 1}), b"PK\x03\x04 cut"])
def test_what_is_no_file_of_weights_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(CheckpointError, match="other"):
        read(tmp_path / "other")
    with pytest.raises(CheckpointError, match="does not exist"):
        read(tmp_path)


def test_the_number_of_heads_is_read_where_it_is_stated(tmp_path: Path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", {"num_heads": "3"})
    assert read_weights(tmp_path / "model.safetensors", "dinov2", "dinov2").num_heads == 3
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    assert read_weights(tmp_path, "dinov2", "dinov2").num_heads == 4
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist: give the file of the weights of dinov2"):
        read_weights(tmp_path, "dinov2", "dinov2")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ('{"num_attention_heads": -1}', "states '-1' attention heads: it is damaged; use an intact"),
        ('{"num_attention_heads": "12a"}', "states '12a' attention heads"),
        ('{"num_attention_heads": [3]}', r"states '\[3\]' attention heads"),
        ("[1]", "has a config.json that transformers did not write"),
        ("[" * 100_000, "has a config.json that transformers did not write"),
        ("", "has a config.json that transformers did not write"),
    ],
)
def test_a_wrong_config_is_refused(config: str, sentence: str, tmp_path: Path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=sentence):
        read_weights(tmp_path, "dinov2", "dinov2")


def test_a_long_name_takes_no_time(tmp_path: Path):
    save_file({"a." * 200_000 + "b": torch.ones(1)}, tmp_path / "long.safetensors")
    with pytest.raises(CheckpointError, match="long"):
        load_features("dinov2", tmp_path / "long.safetensors")
