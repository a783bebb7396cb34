"""Makes sources of pictures for the tests of `data prepare`, and reads what it made of them."""

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edmdistill.data.prepare import prepare_data

Members = dict[str, bytes]


def encoded(seed: int, width: int, height: int, mode: str = "RGB", form: str = "png", **options: Any) -> bytes:
    """A picture of noise in some mode and format."""
    channels = {"L": (), "RGB": (3,), "LA": (2,), "RGBA": (4,), "CMYK": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return saved(Image.fromarray(pixels, mode), form, **options)


def saved(image: Image.Image, form: str = "png", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def raw_png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG with this header, which Pillow may not write, and with these rows, which need not fit it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write_folder(path: Path, members: Members) -> Path:
    for name, data in members.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return path


def write_zip(path: Path, members: Members) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def tar_bytes(members: Members, mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def read_images(path: Path) -> dict[str, np.ndarray]:
    """The pixels of each image of a prepared zip, by name."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        names = [name for name in archive.namelist() if name != "dataset.json"]
        return {name: np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names}


def read_document(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return dict(json.loads(archive.read("dataset.json")))


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def cifar10(count: int, protocol: int) -> tuple[Members, np.ndarray, list[int]]:
    """The Python version of a small CIFAR-10, its training images [N,32,32,3], and their classes."""
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (6, count, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, (6, count)).tolist()
    members = {}
    for batch, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = np.ascontiguousarray(images[batch].transpose(0, 3, 1, 2)).reshape(count, 3072)
        content = {"batch_label": name, "labels": labels[batch], "data": data, "filenames": [f"{name}.png"] * count}
        members[f"cifar-10-batches-py/{name}"] = (
            pickle.dumps(content, protocol) if protocol else python_2_pickle(data, labels[batch])
        )
    return members, images[:5].reshape(-1, 32, 32, 3), [label for batch in labels[:5] for label in batch]


def python_2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2's cPickle wrote CIFAR-10's: strings of bytes, protocol 2."""
    raw = data.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87Rq\x03(K\x01"
        + b"M" + struct.pack("<H", len(data)) + b"M\x00\x0c\x86"
        + b"cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87Rq\x05(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
    )  # fmt: skip
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x00(U\x06labels" + listed + b"U\x04data" + array + b"u."


def write_mnist(folder: Path, images: np.ndarray, labels: np.ndarray, suffix: str = ".gz") -> Path:
    folder.mkdir(exist_ok=True)
    opened = gzip.open if suffix else open
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        with opened(folder / f"train-{kind}-ubyte{suffix}", "wb") as file:
            file.write(struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes())
    return folder / f"train-images-idx3-ubyte{suffix}"


def prepared(source: Path, **options: object) -> tuple[list[np.ndarray], list[int] | None, list[str] | None]:
    """The images, classes and names of the classes of what is made of a source."""
    out = source.parent / "out.zip"
    prepare_data(source, out, overwrite=True, **options)
    document = read_document(out)
    labels = document["labels"]
    if labels is not None:
        assert [name for name, _ in labels] == list(read_images(out))
    return list(read_images(out).values()), labels and [label for _, label in labels], document.get("label_names")
