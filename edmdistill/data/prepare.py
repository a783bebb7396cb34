"""Makes a data set in EDM's layout of any pictures: byte for byte the pixels, names and classes of the official tool.

Pictures are decoded, resized and packed by several threads, and written in their order. Until the zip is complete it is
in a hidden folder beside its destination, with a record of how far it is; the same call goes on there after a kill.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import PIL
from msgspec import Struct
from PIL import Image, features

from edmdistill import __version__
from edmdistill.atomic import require_free, temporary_folder
from edmdistill.data.contents import LABELS
from edmdistill.data.edm_zip import EdmZip, image_index, image_name
from edmdistill.data.files import ZipFiles, as_dataset_error
from edmdistill.data.packing import Packed, PackJob, packed_chunks, read
from edmdistill.data.pictures import Pictures
from edmdistill.data.prepare_state import PrepareState, chained, names_sha256, open_state, remove_leftovers
from edmdistill.data.sources import open_pictures
from edmdistill.data.tar_files import is_compressed
from edmdistill.data.transforms import Size, find_transform
from edmdistill.errors import DatasetError, printable
from edmdistill.threads import usable_cores

SAVED = 2.0
"""Seconds between two records of the progress."""
RECORDED = "transform", "resolution", "max_images", "labels", "pillow", "jpeg"
"""The settings that dataset.json has by their names."""
UNPACKED = 2**30
"""Bytes of the largest compressed tar that is unpacked to see whether its pictures are the same."""


class PreparedSummary(Struct, frozen=True, kw_only=True):
    """The data set that was prepared.

    Attributes:
        path: of the zip.
        classes: their number; 0 without classes.
        record: `prepared` of dataset.json; see docs/data.md.
        notes: sentences on what the user may not expect.
    """

    path: str
    classes: int
    record: dict[str, Any]
    notes: tuple[str, ...]


def prepare_data(
    source: str | Path,
    out: str | Path,
    *,
    resolution: int | Size | None = None,
    transform: str = "none",
    max_images: int | None = None,
    labels: str = "auto",
    split: str = "train",
    workers: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> PreparedSummary:
    """Makes the zip `out` of the pictures of a source, or goes on where the same call stopped.

    The zip is the same for any number of workers, and however often the call was killed.

    Args:
        source: a folder, zip or tar of pictures, ImageNet's tar of tars, the archive of CIFAR-10 or MNIST, or parquet
            files of the Hub; see `open_pictures`.
        resolution: height and width of the images, or (width, height) of a wide picture in its square; None: as they
            are, which must be all the same.
        transform: a key of TRANSFORMS.
        max_images: the number of pictures to read, from the first.
        labels, split: see `open_pictures`.
        workers: threads; None: one for each core that this process may use.
        overwrite: replace `out`, or an unfinished zip that was begun otherwise.
        on_progress: called with the number of pictures that are done, and the number of all.
        on_bytes: see `open_pictures`.
    Raises: EdmDistillError: `out` is there, the source or a picture cannot be read, or images differ in size.
    Source: NVlabs/edm2 and NVlabs/edm, dataset_tool.py.
    Differs: files that operating systems hide are left out, not read; a source of which only some of the pictures
        that are read have classes is refused, not prepared without any.
    """
    source, out = Path(source), Path(out)
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    chosen = find_transform(transform, size)
    remove_leftovers(out)
    settings = {
        "source": str(source.absolute()),
        "resolution": None if size is None else list(size),
        "transform": transform,
        "labels": labels,
        "split": split,
        "max_images": max_images,
        "pillow": PIL.__version__,
        "jpeg": features.version("libjpeg_turbo") or features.version("jpg"),
    }
    if not overwrite and (summary := _made_before(source, out, settings, on_progress, on_bytes)) is not None:
        return summary
    require_free(out, overwrite)
    with open_state(out, settings, overwrite=overwrite) as state:
        pictures = open_pictures(source, state.folder, labels=labels, split=split, most=max_images, on_bytes=on_bytes)
        total = min(len(pictures.names), max_images or len(pictures.names))
        state.require_same_source(
            pictures, lambda done: _content(source, pictures, done, lambda i, _: on_progress(i, total))
        )
        job = PackJob(source, pictures, chosen, size, total)
        with EdmZip(state.images, state.progress.bytes) as archive:
            _write_images(archive, state, job, workers or usable_cores(), on_progress)
            if not archive.names:
                raise DatasetError(f"{source}: {transform} leaves no picture of {total:,}; choose another one")
            record = _record(archive, state, job, settings)
            archive.add(LABELS, _document(archive.names, pictures, record))
            archive.finish()
        state.publish()
    classes = 0 if pictures.labels is None else max(len(pictures.label_names or ()), int(pictures.labels.max()) + 1)
    return PreparedSummary(path=str(out), classes=classes, record=record, notes=tuple(pictures.notes))


def _write_images(
    archive: EdmZip,
    state: PrepareState,
    job: PackJob,
    workers: int,
    report: Callable[[int, int], object],
) -> None:
    """Writes the images of all pictures that are not done yet; what is done is kept whatever happens.

    Raises: DatasetError: a picture cannot be read, or differs in size from the first.
    """
    report(state.progress.done, job.total)
    saved = time.monotonic()
    try:
        with closing(packed_chunks(job, state.progress.done, workers)) as chunks:
            for chunk in chunks:
                for packed in chunk:
                    _write_image(archive, state, job, packed)
                report(state.progress.done, job.total)
                if time.monotonic() - saved > SAVED:
                    _save(archive, state)
                    saved = time.monotonic()
    except BaseException:
        with suppress(OSError):
            _save(archive, state)
        raise
    _save(archive, state)


def _save(archive: EdmZip, state: PrepareState) -> None:
    archive.sync()
    state.save()


def _write_image(archive: EdmZip, state: PrepareState, job: PackJob, packed: Packed) -> None:
    i, progress = state.progress.done, state.progress
    name = job.pictures.names[i]
    if packed.png is not None:
        width, height, mode = packed.shape
        if progress.shape is None and (width != height or width & (width - 1)):
            raise DatasetError(
                f"{job.source}: {printable(name)} is {width}x{height}, and images of a data set are squares, of a "
                "power of two; give --resolution, as in --resolution 64 --transform center-crop"
            )
        progress.shape = progress.shape or packed.shape
        if packed.shape != progress.shape:
            raise DatasetError(
                f"{job.source}: {printable(name)} is {width}x{height} ({mode}), but the pictures before it are "
                f"{progress.shape[0]}x{progress.shape[1]} ({progress.shape[2]}); give --resolution, as in "
                "--resolution 64 --transform center-crop"
            )
        archive.add(image_name(i), packed.png)
    state.add(name, job.pictures.sizes[i], packed.crc, packed.changes, archive.size)


def _record(archive: EdmZip, state: PrepareState, job: PackJob, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns what dataset.json says of how the set was made."""
    progress, pictures = state.progress, job.pictures
    assert progress.shape is not None
    return {
        "by": f"edmdistill {__version__}",
        "source": job.source.absolute().name,
        "source_kind": pictures.kind,
        "source_sha256": progress.source_sha256,
        "names_sha256": progress.names_sha256,
        "pictures": job.total,
        "images": len(archive.names),
        "skipped": job.total - len(archive.names),
        "left_out": dict(Counter(pictures.left_out.values())),
        "changes": dict(sorted(progress.changes.items())),
        "size": list(progress.shape[:2]),
        "channels": Image.getmodebands(progress.shape[2]),
        "crop": job.transform.crop,
        "filter": "none" if job.size is None else job.transform.filter,
        **{key: settings[key] for key in RECORDED},
    }


def _made_before(
    source: Path,
    out: Path,
    settings: dict[str, Any],
    report: Callable[[int, int], object],
    on_bytes: Callable[[int], object],
) -> PreparedSummary | None:
    """Returns the summary of the zip at `out` if the same call made it; None if not, or to know takes much of it.

    Of pictures with the same names and sizes all are read: those of MNIST and Fashion-MNIST differ in nothing else.
    """
    try:
        with as_dataset_error(str):
            files = ZipFiles(out)
            document = json.loads(files.read(LABELS))
            images = [member.name for member in files.members() if member.name != LABELS]
            record = document["prepared"]
            if any(record[key] != settings[key] for key in RECORDED) or record["source"] != source.absolute().name:
                return None
            made, content = record["names_sha256"], record["source_sha256"]
            names = document.get("label_names") or ()
            classes = max(len(names), *(label + 1 for _, label in document["labels"] or [("", -1)]))
    except DatasetError:
        return None
    if source.is_file() and is_compressed(source) and source.stat().st_size > UNPACKED:
        return None
    chosen = {key: settings[key] for key in ("labels", "split")}
    with temporary_folder() as scratch:
        pictures = open_pictures(source, scratch, **chosen, most=settings["max_images"], on_bytes=on_bytes)
        wanted = pictures.names[: settings["max_images"]]
        same = (pictures.kind, names_sha256(wanted, pictures.sizes)) == (record["source_kind"], made)
        if not same or _content(source, pictures, len(wanted), report) != content:
            return None
        try:
            if json.loads(_document(images, pictures, record)) != document:  # other classes, or names of them
                return None
        except (ValueError, IndexError):  # images that were renamed since
            return None
    return PreparedSummary(path=str(out), classes=classes, record=record, notes=(f"{out} already holds these images.",))


def _content(source: Path, pictures: Pictures, count: int, report: Callable[[int, int], object]) -> str:
    """Returns Progress.source_sha256 of the first pictures, which are read.  Raises: DatasetError: one cannot be."""
    digest = ""
    for i, (name, size) in enumerate(zip(pictures.names[:count], pictures.sizes, strict=False)):
        digest = chained(digest, f"{size} {name} {read(source, pictures, i)[1]:08x}")
        report(i + 1, count)
    return digest


def _document(names: list[str], pictures: Pictures, record: dict[str, Any]) -> bytes:
    """Returns dataset.json: `labels` as the official tools have it, and what they do not read."""
    content: dict[str, Any] = {"labels": None, "prepared": record}
    if pictures.labels is not None:
        content["labels"] = [[name, int(pictures.labels[image_index(name)])] for name in names]
        if pictures.label_names is not None:
            content["label_names"] = list(pictures.label_names)
    return json.dumps(content).encode()


def to_text(summary: PreparedSummary) -> str:
    """Returns the summary as lines of text."""
    record = summary.record
    width, height = record["size"]
    rows = [
        ("data set", summary.path),
        ("source", f"{record['source']} ({record['source_kind']}), {record['pictures']:,} pictures read"),
        ("images", f"{record['images']:,} of {width}x{height}, {'RGB' if record['channels'] == 3 else 'grayscale'}"),
        ("crop", f"{record['transform']}: {record['crop']}; filter {record['filter']}"),
        ("classes", f"{summary.classes:,}" if summary.classes else "none"),
    ]
    if record["skipped"]:
        rows.append(("skipped", f"{record['skipped']:,}, too small or too high for {record['transform']}"))
    rows += [("changed", f"{count:,}: {change}") for change, count in record["changes"].items()]
    rows += [("left out", f"{count:,}: {reason}") for reason, count in record["left_out"].items()]
    return "\n".join(f"{name:<12} {value}" for name, value in rows)
