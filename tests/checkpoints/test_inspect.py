"""What `edmdistill inspect` finds, and how it is written down."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.inspect import inspect, to_json, to_text
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.errors import CheckpointError
from edmdistill.networks import NETWORKS
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM

CONFIG = {
    "format_version": "1.0",
    "stage": "generator",
    "network": {"kind": "edm2", "arguments": {"img_resolution": 8}},
    "sigma_max": 80.0,
    "label_names": ["zero", "one"],
    "method": None,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {"w": np.ones((2, 3), np.float16), "b": np.ones((), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_official(golden: Path) -> None:
    path = golden / "edm2-latent-cond.pkl"
    facts = json.loads(path.with_suffix(".json").read_text())
    summary = inspect(path)
    assert summary["format"] == "official network pickle of EDM2"
    assert inspect(golden / "edm-tiny-cond.pkl")["format"] == "official network pickle of EDM"
    assert summary["class"] == "Precond"
    assert summary["network"] == {"class": "UNet"}
    assert summary["preconditioning"] == {"sigma_data": 0.5}
    assert summary["label_dim"] == 10
    assert summary["dtypes"] == {"float16": facts["num_tensors"]}
    counts = {"param": 0, "buffer": 0}
    for tensor in facts["tensors"].values():
        counts[tensor["kind"]] += int(np.prod(tensor["shape"]))
    assert (summary["parameters"], summary["buffers"]) == (counts["param"], counts["buffer"])
    assert summary["encoder"]["raw_mean"] == [5.81, 3.25, 0.12, -2.15]  # type: ignore[index]
    assert summary["tensors"]["unet.out_gain"] == ["float16", []]  # type: ignore[index]


def test_ours(folder: Path) -> None:
    summary = inspect(folder)
    assert summary["stage"] == "generator"
    assert summary["parameters"] == 7
    assert summary["dtypes"] == {"float16": 1, "float32": 1}
    assert summary["tensors"] == {"b": ["float32", []], "w": ["float16", [2, 3]]}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (
            "song",
            {"embedding_type": "fourier", "encoder_type": "residual", "decoder_type": "skip", "channel_mult": [1, 2]},
        ),
        ("adm", {"channel_mult": [1, 2]}),
        ("edm2", {"channel_mult": [1, 2], "logvar_channels": 8, "two_time": True}),
    ],
)
def test_parameters_are_those_that_training_counts(kind: str, arguments: dict[str, object], tmp_path: Path) -> None:
    """And buffers the rest: frequencies, phases, filters of resampling."""
    shape = {"img_resolution": 8, "label_dim": 3, "model_channels": 8, "num_blocks": 1, "attn_resolutions": []}
    channels = {"img_channels": 2} if kind == "edm2" else {"in_channels": 2, "out_channels": 2}
    flow = FlowNetwork(NETWORKS[kind](**shape, **channels, **arguments), EDM())
    provenance = Provenance(source="a test", licence="mit")
    save_checkpoint(tmp_path / "it", flow, CheckpointConfig(stage="teacher", provenance=provenance, **describe(flow)))
    summary = inspect(tmp_path / "it")
    counted = [sum(tensor.numel() for tensor in kind()) for kind in (flow.parameters, flow.buffers)]
    assert [summary["parameters"], summary["buffers"]] == counted
    assert counted[1] > 0


def test_config_does_not_speak_for_its_file(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"sha256": "0", "parameters": 1, "tensors": None}))
    summary = inspect(folder)
    assert len(str(summary["sha256"])) == 64
    assert summary["parameters"] == 7
    assert summary["tensors"]


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("config.json", None, "it holds no config.json"),
        ("model.safetensors", None, "it holds no model.safetensors"),
        ("config.json", b"{", "cannot be read"),
        ("config.json", b"[" * 100_000, "cannot be read"),
        ("config.json", b"[]", "cannot be read"),
        ("model.safetensors", b"x" * 100, "cannot be read"),
    ],
)
def test_ours_damaged(folder: Path, file: str, content: bytes | None, why: str) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=why):
        inspect(folder)


def test_json_is_json(golden: Path) -> None:
    """Infinity is a word: JSON has no number for it."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    document = json.loads(to_json(inspect(golden / "edm-tiny-cond.pkl")), parse_constant=refuse)
    assert json.loads(to_json({"a": [np.inf, {"b": (1.5, -np.inf)}]}), parse_constant=refuse)["a"] == [
        "inf",
        {"b": [1.5, "-inf"]},
    ]
    assert document["schema_version"] == 1
    assert document["preconditioning"] == {"sigma_min": 0, "sigma_max": "inf", "sigma_data": 0.5}


def test_text(golden: Path, folder: Path) -> None:
    text = to_text(inspect(golden / "edm-tiny-cond.pkl"))
    assert "preconditioning  sigma_min 0, sigma_max inf, sigma_data 0.5" in text
    assert "unusual          none" in text
    assert "\nencoder " not in text  # an EDM file has none
    assert text.splitlines()[-1].split() == ["model.dec.8x8_aux_conv.bias", "float32", "3"]
    assert "\ntensors " not in text
    assert "method" not in to_text(inspect(folder))


def test_values_are_words() -> None:
    summary = {"count": 12345, "third": 1 / 3, "yes": True, "no": [False, None], "table": {"a": [1, {"b": 2}]}}
    assert to_text(summary).splitlines() == [
        "count            12,345",
        "third            0.333333",
        "yes              true",
        "no               false; null",
        "table            a [1, (b 2)]",
    ]


def test_objects_are_one_table_each(golden: Path) -> None:
    path = golden / "edm-tiny-cond.pkl"
    loss = json.loads(path.with_suffix(".json").read_text())["loss_fn"]
    assert inspect(path)["loss"] == {"class": loss["class_name"], **loss["init_kwargs"]}


def test_results_are_a_table_with_a_line_for_each_metric() -> None:
    sampler = {"nfe": 2, "gamma": 0.5, "guidance": None}
    results = [
        {"protocol": {"name": "edm2"}, "sampler": sampler, "metrics": {"fid": 2.5, "kid": 0.01}},
        {"protocol": None, "metrics": {"fid": 3}},
        "nothing",
    ]
    assert [line.split() for line in to_text({"results": results}).splitlines()] == [
        ["results", "NFE", "gamma", "guidance", "metric", "value"],
        ["edm2", "2", "0.5", "-", "fid", "2.5"],
        ["edm2", "2", "0.5", "-", "kid", "0.01"],
        ["-", "-", "-", "-", "fid", "3"],
    ]


def test_text_is_for_terminals() -> None:
    """Nothing in a file reaches the terminal as a control character, and nothing fills it."""
    text = to_text({"\x1b[2J": "\x1b[2J", "a": {"\x07": "\x07"}, "b": ["\x1b"], "c": list(range(10_000))})
    assert text.replace("\n", "").isprintable()
    assert len(text) < 2500
