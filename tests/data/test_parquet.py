"""Parquet files of the Hub: rows in the order of files, columns by their description, splits by names."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from picture_files import encoded, prepared, write_folder
from PIL import Image

from edmdistill.data import parquet
from edmdistill.data.sources import open_pictures
from edmdistill.errors import DatasetError

PICTURES = {f"{i}.png": encoded(i, 8, 8) for i in range(3)}
NAMES = ["tench, Tinca tinca", "crane"]


def write_parquet(path: Path, rows: dict[str, bytes], labels: list[int] | None, names: list[str] | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    columns: dict[str, object] = {"image": [{"bytes": data, "path": name} for name, data in rows.items()]}
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = labels
        features["label"] = {"names": names, "_type": "ClassLabel"}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(columns).replace_schema_metadata(described if names else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=2)


arrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


@arrow
@pytest.mark.parametrize("named", [True, False])
def test_parquet(named: bool, tmp_path: Path) -> None:
    rows = PICTURES
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", rows, [0, 1, 1], NAMES if named else None)
    write_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", {"t": encoded(9, 8, 8)}, [1], NAMES)
    images, labels, names = prepared(tmp_path / "set")
    assert [image.tobytes() for image in images] == [
        np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in rows.values()
    ]
    assert (labels, names) == ([0, 1, 1], NAMES if named else None)
    assert len(prepared(tmp_path / "set", split="test")[0]) == 1
    assert prepared(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", labels="none")[1] is None
    with pytest.raises(DatasetError, match="has no split 'validation'; choose one of test, train"):
        prepared(tmp_path / "set", split="validation")


@arrow
def test_a_parquet_file_without_a_split_has_none(tmp_path: Path) -> None:
    file = tmp_path / "test-00000-of-00001.parquet"
    write_parquet(file, {"t": encoded(9, 8, 8)}, [1], NAMES)
    assert open_pictures(file, tmp_path).kind == "parquet"
    with pytest.raises(DatasetError, match=r"is one set, without splits; leave --split test out"):
        open_pictures(file, tmp_path, split="test")


@arrow
def test_broken_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, {"a": encoded(0, 8, 8)}, None, None)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"a\.parquet cannot be read"):
        prepared(path)


PICTURE = {"bytes": encoded(0, 8, 8), "path": "a.png"}


@arrow
@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([{"image": [PICTURE], "label": [0]}, {"image": [PICTURE]}], r"1\.parquet has other columns than .*0\.parquet"),
        ([{"x": [1]}], "has no column of images, a struct of bytes and path, but x; give a set of pictures"),
        ([{"image": [{"bytes": "text", "path": ""}]}], "has no column of images"),
        ([{"image": [PICTURE, {"bytes": None}]}], r"row 1, cannot be read \(it is empty, or names a file"),
        ([{"image": [PICTURE, None]}], r"row 1, cannot be read \(it is empty, or names a file"),
        ([{"image": [PICTURE] * 2, "label": [0, None]}], "without a class in its column 'label'; --labels none leaves"),
        (
            [{"image": [PICTURE], "label": [10**12]}],
            "class 1,000,000,000,000 in its column 'label', but at most 100,000",
        ),
    ],
    ids=["columns", "none", "text", "empty", "null", "unlabeled", "class"],
)
def test_parquet_that_is_no_data_set(tables: list[dict[str, object]], message: str, tmp_path: Path) -> None:
    """What the sentence advises, no labels, works where it says so."""
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "set").mkdir()
    for number, columns in enumerate(tables):
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / "set" / f"{number}.parquet")
    with pytest.raises(DatasetError, match=message) as error:
        prepared(tmp_path / "set")
    if "--labels none" in str(error.value):
        assert prepared(tmp_path / "set", labels="none")[1] is None


@arrow
def test_parquet_of_too_few_names_or_too_large_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", {"a": encoded(0, 8, 8)}, [2], ["cat", "dog"])
    with pytest.raises(DatasetError, match="class 2 in its column 'label', but 2 names; --labels none leaves it out"):
        prepared(tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="whose folders are no classes; leave --labels out"):
        prepared(tmp_path / "a.parquet", labels="folders")
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 8)
    with pytest.raises(DatasetError, match="a group of rows takes more than 8 bytes"):
        prepared(tmp_path / "a.parquet", labels="none")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match=r"pip install 'edmdistill\[parquet\]'"):
        prepared(tmp_path / "a.parquet")


@arrow
def test_rows_follow_one_another_through_files_and_groups(tmp_path: Path) -> None:
    """In the order of names; hidden files, which macOS leaves beside others, are none."""
    folder = tmp_path / "set" / "data"
    at = 0
    for name, size in {"a/train-0.parquet": 3, "b/train-1.parquet": 5, "c/train-2.parquet": 1}.items():
        rows = {f"{i}": encoded(i, 8, 8) for i in range(at, at + size)}
        write_parquet(folder / name, rows, [i % 2 for i in range(at, at + size)], NAMES)
        at += size
    write_parquet(folder / "validation-0.parquet", {"v": encoded(99, 8, 8)}, [1], NAMES)
    write_folder(folder, {"a/._train-0.parquet": b"AppleDouble", ".cache/train-9.parquet": b"PAR1"})
    pictures = open_pictures(tmp_path / "set", tmp_path)
    assert (pictures.kind, pictures.names[3], len(pictures.names)) == ("parquet, train", "train-1.parquet, row 0", 9)
    assert [pictures.read(i) for i in range(9)] == [encoded(i, 8, 8) for i in range(9)]
    assert pictures.labels is not None
    assert pictures.labels.tolist() == [i % 2 for i in range(9)]
    assert pictures.left_out == {"data/validation-0.parquet": "of another split"}
    with pytest.raises(DatasetError, match="the split 'trian' is not known; did you mean 'train'"):
        open_pictures(tmp_path / "set", tmp_path, split="trian")


@arrow
@pytest.mark.parametrize("large", [False, True])
def test_the_description_tells_pictures_from_masks_and_classes_from_numbers(large: bool, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    bytes_ = pa.struct([("bytes", pa.large_binary() if large else pa.binary()), ("path", pa.string())])
    mask, picture = ({"bytes": encoded(i, 8, 8), "path": "a.png"} for i in range(2))
    columns = {"mask": pa.array([mask], bytes_), "photo": pa.array([picture], bytes_), "label": [7], "kind": [1]}
    features = {"photo": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": NAMES}}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    for metadata, number, labels, names in ((described, 1, [1], NAMES), (None, 0, [7], None)):
        table = pa.table(columns).replace_schema_metadata(metadata)
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        found = open_pictures(tmp_path / "a.parquet", tmp_path)
        assert found.read(0) == encoded(number, 8, 8)
        assert found.labels is not None
        assert (found.labels.tolist(), found.label_names) == (labels, names)


@arrow
def test_a_description_that_is_none(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"image": [PICTURE]}).replace_schema_metadata({"huggingface": "{}"})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match=r"a\.parquet describes its columns in a way that is not read \('info'\)"):
        open_pictures(tmp_path / "a.parquet", tmp_path)
