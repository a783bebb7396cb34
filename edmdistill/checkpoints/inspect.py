"""Describes a checkpoint, ours or an official one, by its names and headers, without weights, a network or torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

from safetensors import SafetensorError, safe_open

from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.class_names import official_class_names
from edmdistill.checkpoints.download import downloaded
from edmdistill.checkpoints.layout import CONFIG, MODEL, checkpoint_in
from edmdistill.checkpoints.nvidia import OfficialCheckpoint
from edmdistill.checkpoints.source import Source, open_source
from edmdistill.checkpoints.unsupported import describe_folder, refuse_by_name
from edmdistill.errors import CheckpointError

BUFFERS = {"freqs", "phases", "resample_filter"}
"""What our networks call the tensors that are never trained."""


def inspect(source: str | Path | Source) -> dict[str, object]:
    """Returns what is in a checkpoint folder, a run or a file that convert reads, as JSON has it.

    `tensors`: dtype and shape by name.

    Raises: CheckpointError: it is neither, or damaged.  HubError: the Hub refuses.
    """
    source = open_source(source)
    if source.path.is_dir():
        return _ours(checkpoint_in(source.path))
    return _openai(source) if source.is_archive else _official(source.official)


def _openai(source: Source) -> dict[str, object]:
    """Describes OpenAI's weights as convert reads them.  This imports torch, for shapes only."""
    import torch

    from edmdistill.checkpoints.openai import PRECONDITIONING, read_arguments, read_weights

    path = source.path
    refuse_by_name(path)
    with downloaded(path):
        stored = read_weights(path)
        shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
        arguments, _ = read_arguments(path, shapes)
    return {
        "file": str(path),
        "format": "weights of OpenAI's ADM for EDM, as edm_imagenet64_ema.pt",
        "sha256": source.sha256,
        "preconditioning": PRECONDITIONING,
        "network": {"kind": "adm", **arguments},
        "parameters": sum(tensor.numel for tensor in stored.values()),
        "dtypes": dict(Counter(tensor.dtype for tensor in stored.values())),
        "tensors": {name: [tensor.dtype, list(tensor.shape)] for name, tensor in stored.items()},
    }


def _official(checkpoint: OfficialCheckpoint) -> dict[str, object]:
    stored, arguments, attributes = checkpoint.stored, checkpoint.arguments, dict(checkpoint.attributes)
    network = {name: value for name, value in checkpoint.network_arguments.items() if name not in arguments}
    return {
        "file": str(checkpoint.path),
        "format": "official network pickle of " + ("EDM2" if checkpoint.network_class == "UNet" else "EDM"),
        "sha256": checkpoint.sha256,
        "class": checkpoint.preconditioning_class,
        **{name: attributes.pop(name, None) for name in ("img_resolution", "img_channels", "label_dim", "use_fp16")},
        "label_names": official_class_names(checkpoint),
        "preconditioning": attributes,
        "network": {"class": checkpoint.network_class, **network},
        "arguments": arguments,
        "parameters": sum(tensor.numel for name, tensor in stored.items() if name not in checkpoint.buffers),
        "buffers": sum(stored[name].numel for name in checkpoint.buffers),
        "dtypes": dict(Counter(tensor.dtype for tensor in stored.values())),
        "encoder": _flat(checkpoint.encoder),
        "loss": _flat(checkpoint.loss),
        "augment": _flat(checkpoint.augment),
        "dataset": checkpoint.dataset,
        "unusual": list(checkpoint.notes),
        "tensors": {name: [tensor.dtype, list(tensor.shape)] for name, tensor in stored.items()},
    }


def _dtype(name: str) -> str:
    return {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}.get(name, name)


def _flat(description: Mapping[str, Any] | None) -> dict[str, object] | None:
    """Returns an object's class, arguments and other fields in one table."""
    if description is None:
        return None
    fields = dict(description)
    return {"class": fields.pop("class_name"), **fields.pop("arguments"), **fields}


def _ours(folder: Path) -> dict[str, object]:
    config, model = folder / CONFIG, folder / MODEL
    try:
        fields = json.loads(config.read_bytes())
        if not isinstance(fields, dict):
            raise ValueError("config.json is not an object")
        digest = sha256_file(model)
        with safe_open(model, framework="numpy") as header:
            slices = {name: header.get_slice(name) for name in sorted(header.keys())}
            tensors = {name: [_dtype(slice_.get_dtype()), slice_.get_shape()] for name, slice_ in slices.items()}
    except FileNotFoundError as error:
        missing = f"it holds no {Path(error.filename).name}"
        raise CheckpointError(f"{folder} {describe_folder(folder)} ({missing})") from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}): convert or copy it again") from error
    numbers = {name: math.prod(shape) for name, (_, shape) in tensors.items()}
    fixed = sum(count for name, count in numbers.items() if name.rpartition(".")[2] in BUFFERS)
    head = {"file": str(folder), "format": "edmdistill checkpoint", "sha256": digest}
    return {
        **(head | fields | head),  # first in order, and not to be overridden by config.json
        "parameters": sum(numbers.values()) - fixed,
        "buffers": fixed,
        "dtypes": dict(Counter(dtype for dtype, _ in tensors.values())),
        "tensors": tensors,
    }


def to_json(summary: Mapping[str, object]) -> str:
    """Returns one JSON document; inf and nan, which JSON lacks, become strings."""

    def finite(value: object) -> object:
        match value:
            case float() if not math.isfinite(value):
                return str(value)
            case dict():
                return {key: finite(item) for key, item in value.items()}
            case list() | tuple():
                return [finite(item) for item in value]
        return value

    return json.dumps({"schema_version": 1, **{key: finite(value) for key, value in summary.items()}}, indent=2)


def to_text(summary: Mapping[str, object]) -> str:
    """Returns a paragraph for each field; empty fields are left out."""
    lines = []
    for name, value in summary.items():
        if value is None or name == "tensors":
            continue
        match value:
            case dict():
                text = ", ".join(f"{_word(key)} {_word(item)}" for key, item in value.items())
            case list() if name == "results" and value:
                lines += _results(value)
                continue
            case list():
                text = "; ".join(map(_word, value))
            case _:
                text = _word(value)
        text = shorten(text, 1500, placeholder=" ...") if len(text) > 1500 else text
        lines += wrap(f"{_word(name):<17}{text or 'none'}", 110, subsequent_indent=" " * 17, break_long_words=False)
    tensors = summary.get("tensors")
    if isinstance(tensors, dict):
        lines += [
            f"{name:<60} {dtype:<9} {'x'.join(map(str, shape)) or 'scalar'}" for name, (dtype, shape) in tensors.items()
        ]
    return "\n".join(lines)


def _results(results: list[object]) -> list[str]:
    """Returns results as a table, a line for each metric; values in a file may have any type."""

    def get(value: object, name: str) -> object:
        return value.get(name) if isinstance(value, dict) else None

    rows = [("results", "NFE", "gamma", "guidance", "metric", "value")]
    for result in results:
        sampler, metrics = get(result, "sampler"), get(result, "metrics")
        fields = [get(get(result, "protocol"), "name"), *(get(sampler, key) for key in ("nfe", "gamma", "guidance"))]
        words = ["-" if field is None else _word(field) for field in fields]
        for metric, value in (metrics if isinstance(metrics, dict) else {}).items():
            rows.append((*words, _word(metric), _word(value)))  # type: ignore[arg-type]  # a word for each column
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _word(value: object) -> str:
    """Returns a value on one line, escaped as in JSON, so that a file cannot control the terminal."""
    match value:
        case bool() | None:
            return json.dumps(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.6g}"
        case list():
            return f"[{', '.join(map(_word, value))}]"
        case dict():
            return f"({', '.join(f'{_word(key)} {_word(item)}' for key, item in value.items())})"
        case str() if value.isprintable():
            return value
    return json.dumps(value)
