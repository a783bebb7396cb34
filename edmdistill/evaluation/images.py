"""The images of an evaluation, from wherever they come, read a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from edmdistill.atomic import require_no_pipe
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.layout import CONFIG, EXPORT, TOML, is_state
from edmdistill.data.contents import IMAGE_SUFFIXES
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.errors import DatasetError
from edmdistill.evaluation.image_arrays import open_npy, open_npz
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.decode import Decoder
from edmdistill.sampling.files import read_request
from edmdistill.sampling.generate import drawn_classes, generate_images, is_latent, require_finite
from edmdistill.sampling.seeds import SeededNoise
from edmdistill.sampling.spec import SamplerRecord, SamplerSpec
from edmdistill.transfer import is_gpu

ARRAYS = (".npz", ".npy")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz")

BLOCKS, LARGE_BLOCK = {16: 256, 32: 128, 64: 32}, 8
"""Images of a block by their largest side, and of larger ones: of no published network it takes over 6 GB, and small
images are enough to keep a core busy."""

LabelSource = Literal["balanced", "drawn", "given", "none", "unknown"]


@dataclass(frozen=True)
class Images:
    """Images of one size.

    Attributes:
        count: their number N.
        size: (C, H, W).
        read: gives the images of a range, a block at most.  uint8 [B,C,H,W]
        classes: int64 [N], or None.
        seeds: of each image, or None where they are unknown.
        label_source: how the classes were chosen. balanced: class = seed modulo the number of classes; drawn: from each
            seed's stream, after its noise, as EDM's and EDM2's scripts do; given: in any other way; none: the network
            is unconditional; unknown: the source has no classes.
        notes: sentences on what was left out of the source.
        readers: the number of threads that may call `read` at a time; 0: the main thread alone; None: any.
        sampler, decoder: how a network drew them, and the sha256 of the VAE that decoded them, where that is recorded.
        identity: returns what stands for the images of a source, as long as nobody changes them; None: unknown.
    """

    count: int
    size: tuple[int, ...]
    read: Callable[[range], Tensor]
    classes: Tensor | None
    seeds: Sequence[int] | None
    label_source: LabelSource
    notes: tuple[str, ...] = ()
    readers: int | None = None
    identity: Callable[[], str] | None = None
    sampler: SamplerRecord | None = None
    decoder: str | None = None

    @property
    def block(self) -> int:
        """How many are drawn and measured at a time; see `block_size`."""
        return block_size(self.size[-1])

    def part(self, rows: range) -> Images:
        """Returns some of the images, consecutive ones."""
        where = slice(rows.start, rows.stop)
        return replace(
            self,
            count=len(rows),
            read=lambda piece: self.read(range(rows.start + piece.start, rows.start + piece.stop)),
            classes=None if self.classes is None else self.classes[where],
            seeds=None if self.seeds is None else self.seeds[where],
        )


def block_size(side: int) -> int:
    """Returns the number of images, `side` pixels wide, that are computed at a time.

    It decides how networks and libraries round, so it depends on nothing else, and nobody can choose it: the numbers
    are the same in any memory and on any number of processes.
    """
    return next((block for most, block in BLOCKS.items() if side <= most), LARGE_BLOCK)


def is_images(source: str | Path) -> bool:
    """Returns whether a source is images and no network: arrays, an archive, or a folder but that of a network."""
    path = Path(source)
    if path.is_dir():
        return not (any((path / name).exists() for name in (CONFIG, TOML, EXPORT)) or is_state(path))
    return path.suffix.lower() in (*ARRAYS, *ARCHIVES, *IMAGE_SUFFIXES)


def sampled_images(
    model: Generator | Denoiser,
    spec: SamplerSpec,
    seeds: Sequence[int],
    decode: Decoder,
    *,
    labels: LabelSource,
    with_classes: bool,
) -> Images:
    """Images that a network draws as they are read.

    Args:
        model: in eval mode.
        decode: from what the network makes to pictures.
        labels: balanced or drawn: how a conditional network gets its classes.
        with_classes: they are to be known, also where each is drawn with its image.
    """
    flow = model.flow
    balanced = torch.tensor(seeds) % flow.label_dim if flow.label_dim and labels == "balanced" else None
    classes = drawn_classes(model, seeds) if labels == "drawn" and with_classes else balanced

    def read(rows: range) -> Tensor:
        some, given = seeds[rows.start : rows.stop], balanced
        row_labels = None if given is None else given[rows.start : rows.stop]
        return decode(require_finite(generate_images(model, spec, some, row_labels, batch=len(rows)), some))

    size: tuple[int, ...] = (flow.img_channels, flow.img_resolution, flow.img_resolution)
    if is_latent(model):
        size = tuple(decode(torch.zeros(1, *size)).shape[1:])
    # Threads must not compile at once, and processes gather the shards of a network in one order.
    one_thread = flow.network.compiled or is_gpu(flow.device) or _is_sharded(flow)
    readers = 0 if one_thread else None
    return Images(len(seeds), size, read, classes, seeds, labels if flow.label_dim else "none", readers=readers)


def _is_sharded(network: nn.Module) -> bool:
    """Returns whether processes share the network's weights out (FSDP2)."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # a second to import, which a single process need not wait for

    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def dataset_images(data: Dataset) -> Images:
    """Returns the images of a data set, without its classes."""
    return Images(len(data), data.size, data.images, None, None, "unknown")


def open_images(source: Tensor | str | Path, label_dim: int) -> Images:
    """Images that are there already.

    Args:
        source: uint8 [N,C,H,W]; an .npz with images uint8 [N,H,W,C], and seeds [N] and labels [N] if they are known, or
            with arr_0 and arr_1 in their places, as ADM's code writes it; an .npy of images; or a folder or zip of
            lossless images, with a dataset.json for their classes. Files that are named by numbers are taken to be
            named by seeds, as sample names them.
        label_dim: the number of classes that are chosen from; 0: as many as there are.
    Raises: DatasetError: the images cannot be read, or are JPEGs or latents.
    """
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8 or source.ndim != 4:
            raise DatasetError(
                f"images to be measured are uint8 [N,C,H,W], but these are {source.dtype} {list(source.shape)}; "
                "sampling.grid.to_uint8 makes them from [-1, 1]"
            )
        size = tuple(source.shape[1:])
        return Images(len(source), size, lambda rows: source[rows.start : rows.stop].cpu(), None, None, "unknown")
    path = Path(source)
    if not is_images(path) and path.exists():
        raise DatasetError(f"{path} holds no images; of a network, give what load_generator or load_denoiser returns")
    if path.suffix.lower() in ARRAYS and not path.is_dir():
        require_no_pipe(path, DatasetError)
        rows, classes, seeds = open_npz(path) if path.suffix.lower() == ".npz" else (open_npy(path), None, None)
        count, height, width, channels = rows.header.shape
        size, status = (channels, height, width), path.stat()
        return Images(
            count,
            size,
            rows,
            classes,
            seeds,
            _label_source(classes, seeds, label_dim, size),
            readers=1,
            identity=lambda: f"{path.resolve()} {status.st_size} {status.st_mtime_ns}",
        )
    data = open_dataset(source, lossless=True)
    names = [PurePosixPath(file).stem for file in data.files]
    seeds = [int(name) for name in names] if all(name.isdecimal() for name in names) else None
    classes = data.labels(range(len(data)))
    request = _request(path, len(data))
    vae = request.get("vae")
    drawn = request.get("classes") == "drawn" and classes is not None
    return Images(
        len(data),
        data.size,
        data.images,
        classes,
        seeds,
        "drawn" if drawn else _label_source(classes, seeds, label_dim, data.size),
        tuple(data.source_notes),
        identity=lambda: data.fingerprint,
        sampler=_sampler(request),
        decoder=vae if isinstance(vae, str) else None,
    )


def _request(folder: Path, count: int) -> dict[str, Any]:
    """Returns what `sample` drew a folder of so many images by; empty where it did not, or not these."""
    record = read_request(folder)
    if record is None or not record["complete"] or record.get("count") != count or record["not_finite"]:
        return {}
    return dict(record["request"])


def _sampler(request: Mapping[str, Any]) -> SamplerRecord | None:
    """Returns the sampler of a request, if it says all of how the images were drawn."""
    try:
        if "reject" in request or (sampler := request.get("sampler")) is None:
            return None
        return msgspec.convert(sampler | {key: request[key] for key in ("guide",) if key in request}, SamplerRecord)
    except (TypeError, msgspec.ValidationError):
        return None


def _label_source(
    classes: Tensor | None, seeds: Sequence[int] | None, label_dim: int, size: Sequence[int]
) -> LabelSource:
    if classes is None:
        return "unknown"
    if seeds is None:
        return "given"
    label_dim = label_dim or int(classes.max()) + 1
    if torch.equal(classes, torch.tensor(seeds) % label_dim):
        return "balanced"
    pieces = (slice(at, at + 256) for at in range(0, len(seeds), 256))
    drawn = all(torch.equal(_drawn(seeds[piece], label_dim, size), classes[piece]) for piece in pieces)
    return "drawn" if drawn else "given"


def _drawn(seeds: Sequence[int], label_dim: int, size: Sequence[int]) -> Tensor:
    """Returns the classes that a network of pixels draws for seeds, see `drawn_classes`.  int64 [B]"""
    noise = SeededNoise(seeds)
    noise.normal(size)
    return noise.integers(label_dim)
