"""`data prepare` of archives as other systems write them: backslashes, a leading dot, other cases, a folder around."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from picture_files import encoded, prepared, write_zip

from edmdistill.cli import main
from edmdistill.data.datasets import open_dataset

CAT, DOG = encoded(0, 8, 8), encoded(1, 8, 8)
DOCUMENT = json.dumps({"labels": [["cat/0.png", 1], ["dog/0.png", 0]]}).encode()


@pytest.mark.parametrize("prefix", ["", ".\\"])
def test_folders_of_windows_are_classes(prefix: str, tmp_path: Path) -> None:
    members = {f"{prefix}{name}": data for name, data in {"cat\\": b"", "cat\\0.png": CAT, "dog\\0.png": DOG}.items()}
    source = write_zip(tmp_path / "set.zip", members)
    assert prepared(source, labels="folders")[1:] == ([0, 1], ["cat", "dog"])
    assert open_dataset(source).notes == []  # the folder itself is no file


@pytest.mark.parametrize("name", ["./dataset.json", ".\\dataset.json", "Dataset.JSON"])
def test_classes_are_read_however_the_file_at_the_top_is_written(name: str, tmp_path: Path) -> None:
    source = write_zip(tmp_path / "set.zip", {"./cat/0.png": CAT, "./dog/0.png": DOG, name: DOCUMENT})
    assert prepared(source)[1] == [1, 0]


@pytest.mark.parametrize(("labels", "notes"), [("auto", 1), ("none", 0)])
def test_classes_in_a_folder_are_not_lost_without_a_word(labels: str, notes: int, tmp_path: Path) -> None:
    """The official tool does not read them either."""
    source = write_zip(tmp_path / "set.zip", {"my/0.png": CAT, "my/1.png": DOG, "my/dataset.json": DOCUMENT})
    made = CliRunner().invoke(main, ["data", "prepare", str(source), str(tmp_path / "out.zip"), "--labels", labels])
    assert "classes      none" in made.stdout
    assert made.stderr.count("my/dataset.json is not read") == notes
