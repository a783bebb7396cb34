"""config.json of a stranger: whatever it says, it loads and works, or is refused in one sentence."""

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edmdistill.checkpoints import store
from edmdistill.checkpoints.config import (
    CONFIG_BYTES,
    CheckpointConfig,
    Guidance,
    NetworkSpec,
    Provenance,
    SamplingDefaults,
    describe,
    read_config,
)
from edmdistill.checkpoints.layout import CONFIG, MODEL
from edmdistill.checkpoints.store import build_meta, fill, load_checkpoint, save_checkpoint
from edmdistill.errors import CheckpointError
from edmdistill.networks import new_network
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import PRECONDITIONINGS

SMALL = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "song": ("vp", {"embedding_type": "fourier", "encoder_type": "residual"}, 3),
    "adm": ("iddpm", {"out_channels": 6}, 3),
    "edm2": (
        "edm",
        {"guided": True, "channel_mult": [1, 2], "channels_per_head": 8, "logvar_channels": 8, "clip_act": 2.5},
        4,
    ),
}


def make(kind: str) -> tuple[FlowNetwork, CheckpointConfig]:
    """A small network with every field of its configuration filled in."""
    torch.manual_seed(0)
    preconditioning, arguments, channels = CASES[kind]
    network = new_network(kind, 4, channels, 3, **SMALL | arguments)
    flow = FlowNetwork(network, PRECONDITIONINGS[preconditioning]()).eval()
    latents = {"kind": "StabilityVAEEncoder", "vae_name": "a/vae", "scale": [0.2] * channels, "bias": [0.1] * channels}
    config = CheckpointConfig(
        stage="generator",
        label_names=("a", "b", "c"),
        noise_dependence=0.1,
        guidance=Guidance("network", (1.0, 2.0)) if flow.guided else None,
        method="cosim",
        recipe_hash="0" * 64,
        images_seen=5,
        images_total=10,
        ema={"half_life_images": 500.0, "rampup_ratio": 0.05},
        sampling=SamplingDefaults({"1": (80.0,), "2": (80.0, 2.5)}, 0.5),
        encoder=latents if channels == 4 else {"kind": "pixels"},
        provenance=Provenance(source="edm.pkl", sha256="0" * 64, licence="mit", parent="1" * 64),
        results=({"metrics": {"fd": 1.0}},),
        **describe(flow),
    )
    return flow, config


FLOWS = {kind: make(kind) for kind in CASES}
GOOD: dict[str, dict[str, Any]] = {kind: msgspec.to_builtins(config) for kind, (_, config) in FLOWS.items()}
NASTY = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2, 7, 64, 10**6, 10**12, 2**31, 2**63, 2**64, 10**30, -(10**12)),
        *(0.0, 0.5, -0.5, 1.5, 1e-300, 1e300, -1e300, 1e38, 4.0),
        *("", "x", "80", "../../etc/passwd", "a\nb", "\x1b[31m", "é" * 40, "\u202e", "edm", "iddpm", "song", "nan"),
        *([], {}, [[]], [None], [0], [1], [1, 2, 3], [2.5, 80.0], ["a"], [1] * 70, {"": 0}, {"kind": "pixels"}),
        *({"kind": "edm"}, {"kind": []}, {"a": {"b": [1]}}),
    ]
).map(deepcopy)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to every value in a document."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A good configuration with one to three values replaced, taken out, put in, moved or doubled."""
    kind = draw(st.sampled_from(sorted(GOOD)))
    document = deepcopy(GOOD[kind])
    for _ in range(draw(st.integers(1, 3)) if document else 0):
        *way, last = draw(st.sampled_from(list(places(document))))
        parent: Any = document
        for key in way:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "double", "borrow", "scale"])):
            case "replace":
                parent[last] = draw(NASTY)
            case "drop":
                del parent[last]
            case "add" if isinstance(parent, dict):
                parent[draw(st.sampled_from(["color", "M", "kind", "two_time", "label_dropout", ""]))] = draw(NASTY)
            case "double" if isinstance(parent, list):
                parent.insert(0, parent[last])
            case "borrow":
                other: Any = GOOD[draw(st.sampled_from(sorted(GOOD)))]
                way = draw(st.sampled_from(list(places(other))))
                for key in way:
                    other = other[key]
                parent[last] = deepcopy(other)
            case "scale" if type(parent[last]) in (int, float):
                parent[last] *= draw(st.sampled_from([-1, 0, 2, 3, 0.5, 1e3, 1e6]))
    return kind, document


@pytest.fixture(scope="module", autouse=True)
def built_once() -> Iterator[None]:
    """Most documents are wrong elsewhere than in their network: the same one is built once."""
    built: dict[str, FlowNetwork] = {}
    build = store.build_flow

    def cached(spec: NetworkSpec, numbers: Any, where: str, label_dropout: float | None = None) -> FlowNetwork:
        key = json.dumps([spec.kind, spec.arguments, numbers, label_dropout])
        if key not in built:
            built[key] = build(spec, numbers, where, label_dropout)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "build_flow", cached)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(documents())
def test_it_loads_and_works_or_is_refused_in_a_sentence(folder: Path, drawn: tuple[str, dict[str, Any]]) -> None:
    kind, document = drawn
    (folder / CONFIG).write_text(json.dumps(document))
    tensors = FLOWS[kind][0].network.state_dict()
    refusal, flow = "", None
    try:
        config = read_config(folder)
        flow = build_meta(config, folder)
        fill(flow.network, tensors, MODEL)
    except CheckpointError as error:
        refusal = str(error)
    if refusal or flow is None:
        assert refusal.isprintable()
        assert len(refusal) < 700
        return
    size = (1, flow.img_channels, flow.img_resolution, flow.img_resolution)
    with torch.no_grad():
        made = Denoiser(flow.eval())(torch.zeros(size), torch.tensor(flow.sigma_max), None)
    assert made.shape == size
    assert config.label_names is None or len(config.label_names) == flow.label_dim


@given(
    st.binary(max_size=200)
    | st.recursive(NASTY, lambda inner: st.lists(inner), max_leaves=4).map(lambda value: json.dumps(value).encode())
)
def test_what_is_no_configuration_at_all(folder: Path, text: bytes) -> None:
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        read_config(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text", [b"[" * 5000, b'{"a":' * 5000, b"NaN", b'{"sigma_max": 1e999}', b"\xff\xfe", b'{"\\ud800": 1}']
)
def test_odd_json(folder: Path, text: bytes) -> None:
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read_config(folder)


def test_a_file_without_end(folder: Path) -> None:
    with (folder / CONFIG).open("wb") as file:
        file.truncate(CONFIG_BYTES + 1)
    with pytest.raises(CheckpointError, match="at most 16 MiB"):
        read_config(folder)


@pytest.mark.parametrize("kind", CASES)
def test_a_network_of_terabytes_is_refused_before_it_has_memory(kind: str, tmp_path: Path) -> None:
    flow, config = FLOWS[kind]
    save_checkpoint(tmp_path / "c", flow, config)
    document = json.loads((tmp_path / "c" / CONFIG).read_text())
    arguments = document["network"]["arguments"]
    (tmp_path / "c" / CONFIG).write_text(
        json.dumps(document | {"network": {"kind": kind, "arguments": arguments | {"model_channels": 65536}}})
    )
    with pytest.raises(CheckpointError, match=r"(holds .* in shape .* where|lacks .*, which) its network"):
        load_checkpoint(tmp_path / "c")


def test_good_ones_are_read_whole(tmp_path: Path) -> None:
    for kind, (flow, config) in FLOWS.items():
        save_checkpoint(tmp_path / kind, flow, config)
        assert load_checkpoint(tmp_path / kind)[1] == config
        assert math.isfinite(config.noise_dependence or math.nan)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"label_names": ["a", "b"]}, "label_names holds 2 names for 3 classes"),
    ({"sigma_min": 90.0}, "sigma_min is 90, which is not below sigma_max, 80"),
    ({"encoder": {"kind": "StabilityVAEEncoder", "scale": [0.2], "bias": [0.1]}}, "a scale for 1 channel"),
    ({"encoder": {"kind": "StabilityVAEEncoder"}}, "lacks scale"),
    ({"encoder": {"scale": [0.2], "bias": [0.1]}}, "lacks kind"),
    ({"label_dropout": 2}, "label_dropout must be at most 1"),
    ({"provenance": {"source": 3}}, "provenance.source must be text"),
    ({"method": "co\u001b[31msim"}, "control characters"),
    ({"images_seen": -1}, "images_seen must be at least 0"),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES, ids=str)
def test_each_field_is_named(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    flow, config = FLOWS["edm2"]
    save_checkpoint(tmp_path / "c", flow, config)
    document = json.loads((tmp_path / "c" / CONFIG).read_text())
    (tmp_path / "c" / CONFIG).write_text(json.dumps(document | change))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "c")
    assert sentence in str(caught.value)


def test_a_file_name_with_control_characters_is_written_without_them(tmp_path: Path) -> None:
    flow, config = FLOWS["adm"]
    save_checkpoint(tmp_path / "c", flow, replace(config, provenance=Provenance(source="a\n\x1b[31m.pkl")))
    assert load_checkpoint(tmp_path / "c")[1].provenance.source == "a\ufffd\ufffd[31m.pkl"
