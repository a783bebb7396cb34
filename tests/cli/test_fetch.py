"""`edmdistill fetch`: lists, downloads and checks official files."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from feature_files import TINY_DINOV2, save_pth
from golden_set import GOLDEN

from edmdistill.checkpoints import official_files as module
from edmdistill.checkpoints.official_files import official_files
from edmdistill.cli import main
from edmdistill.evaluation.official import verify_official
from edmdistill.evaluation.protocol import get_protocol, open_reference
from edmdistill.evaluation.references import ReferenceStatistics

NAME = "edm2-img512-s-2147483-0.130"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the servers: the tiny goldens, copied into the cache by the address that is asked for."""
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path / "cache"))
    reference = GOLDEN / "evaluation" / "metrics" / "ref-real.pkl"
    content = {"dinov2": TINY_DINOV2, "dataset-refs": reference, "edm2": GOLDEN / "edm2-rgb-cond.pkl"}

    def download(url: str) -> Path:
        path = module.cached(url)
        if not path.exists():
            path.parent.mkdir(parents=True)
            shutil.copyfile(next(file for part, file in content.items() if part in url), path)
        return path

    monkeypatch.setattr(module, "download", download)
    tiny = official_files()["dinov2"]
    monkeypatch.setitem(official_files(), "dinov2", type(tiny)(**{**vars(tiny), "sha256": None}))


def fetch(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["fetch", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_list_needs_no_server():
    assert NAME in fetch("list")
    document = json.loads(fetch("list", "--json"))
    assert (document["schema_version"], document["presets"]["edm2-img512-s-fid"]["net"]) == (1, NAME)


def test_a_preset_is_a_network_and_its_guide():
    lines = fetch("edm2-img512-s-guid-fid").splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "edm2-img512-s-2147483-0.025",
        "edm2-img512-xs-uncond-2147483-0.025",
    ]
    assert "licence cc-by-nc-sa-4.0" in lines[0]
    assert fetch("teacher", "edm2-img512-s-2147483-0.025") == f"{lines[0]}\n"


def test_json_says_where_the_files_are():
    (document,) = json.loads(fetch("--json", NAME))["fetched"]
    assert Path(document["path"]).is_file()
    assert document["file"]["name"] == NAME


def test_verify_reads_a_teacher_and_says_how_to_reproduce_its_result():
    out = fetch("--verify", "edm2-img512-s-fid")
    assert "80,680 parameters of edm2, all finite" in out
    assert "NVIDIA states fid 2.56" in out
    assert f"edmdistill eval {NAME} --protocol edm2 --metrics fid --ref ref-edm2-img512" in out
    assert fetch("--verify", "edm2-img512-s-2147483-0.025").count("\n") == 2


def test_names_that_share_a_file_are_fetched_once_and_checked_each():
    names = ["edm2-img512-s-fid", NAME]  # the preset is that teacher, without a guide
    document = json.loads(fetch("--verify", "--json", *names))
    assert [one["file"]["name"] for one in document["fetched"]] == [NAME]
    assert [*document["checks"]] == names
    assert "parameters of edm2, all finite" in document["checks"][NAME][0]


@pytest.mark.parametrize("words", [["list", "--verify"], ["list", NAME], ["teacher", "list"]])
def test_the_list_goes_alone(words: list[str]):
    result = CliRunner().invoke(main, ["fetch", *words])
    assert result.exit_code == 2
    assert "`fetch list` downloads nothing: give it alone, or the names without it." in result.stderr


def test_a_reference_is_read_and_found_by_its_name():
    assert "features of inception and " in fetch("--verify", "ref-edm2-img512")
    reference = open_reference("ref-edm2-img512", get_protocol("edm2"))
    assert isinstance(reference, ReferenceStatistics)
    assert reference.layout == "edm2"


def test_verify_compares_the_features_of_two_files(monkeypatch: pytest.MonkeyPatch):
    tiny = official_files()["dinov2"]
    other = type(tiny)(**{**vars(tiny), "name": "other", "url": f"{tiny.url}.copy"})
    monkeypatch.setitem(official_files(), "other", other)
    module.download(other.url)
    found = verify_official("dinov2")
    assert "48 features of a picture, all finite" in found[0]
    assert found[1] == "dinov2: its features agree with those of other within 0.0e+00"


def test_verify_refuses_what_holds_another_network(tmp_path: Path):
    import torch

    tensors = torch.load(TINY_DINOV2, weights_only=True)
    path = module.download(official_files()["dinov2"].url)
    save_pth(path, tensors | {"norm.bias": torch.full((48,), torch.nan)})
    result = CliRunner().invoke(main, ["fetch", "--verify", "dinov2"])
    assert result.exit_code == 2
    assert "NaN or infinity in norm.bias" in result.stderr


@pytest.mark.parametrize("name", ["inceptoin", "lists", "teacher", ""])
def test_an_unknown_name_is_one_sentence(name: str):
    result = CliRunner().invoke(main, ["fetch", name])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: there is no official file '{name}'")
