"""Official checkpoints become ours, and stay the same function."""

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from golden_set import NETWORKS
from msgspec.structs import replace
from safetensors.torch import load_file
from torch import Tensor

from edmdistill.checkpoints import convert as module
from edmdistill.checkpoints.config import read_config, write_config
from edmdistill.checkpoints.conversion_report import ConversionReport, ParityRow
from edmdistill.checkpoints.convert import convert
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.layout import CARD, CONFIG, MODEL
from edmdistill.checkpoints.load import load_denoiser, load_generator, load_model, outline
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.checkpoints.published_generators import convert_generator
from edmdistill.checkpoints.source import Source
from edmdistill.checkpoints.store import load_checkpoint, load_tensors, save_checkpoint
from edmdistill.errors import CheckpointError
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.surgery.two_time import drop_second_time

KINDS = {
    "VPPrecond": ("vp", {"sigma_min": 0.002, "sigma_max": 80.0}),
    "VEPrecond": ("ve", {"sigma_min": 0.02, "sigma_max": 100.0}),
    "iDDPMPrecond": ("iddpm", {"sigma_max": 80.0}),
    "EDMPrecond": ("edm", {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}),
    "Precond": ("edm", {"sigma_min": 0.002, "sigma_max": 80.0}),
}


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module", params=NETWORKS)
def converted(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> ConversionReport:
    """Every golden network, converted."""
    return convert(golden / request.param, tmp_path_factory.mktemp("convert") / "out")


def test_parity(converted: ConversionReport) -> None:
    assert max(row.float64 for row in converted.parity) < 1e-12
    assert max(row.float32 for row in converted.parity) < 2e-5
    sigmas = [row.sigma for row in converted.parity]
    config = converted.config
    assert sigmas == sorted(sigmas, reverse=True)
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(config.sigma_max), pytest.approx(config.sigma_min))


def test_official_results_after_reloading(converted: ConversionReport, golden: Path) -> None:
    name = converted.config.provenance.source
    cases = load_file(golden / (name.split(".pkl")[0] + ".safetensors"))
    denoiser = load_denoiser(converted.path)
    for case in ("case0", "case1", "case2"):
        x, sigma, labels = cases[f"{case}.x"], cases[f"{case}.sigma"], cases.get(f"{case}.labels")
        assert error(denoiser(x, sigma, labels), cases[f"{case}.D_x"]) < 2e-5
        if labels is not None:  # numbers for vectors
            assert torch.equal(denoiser(x, sigma, labels.argmax(1)), denoiser(x, sigma, labels))
        if f"{case}.D_x_nolabels" in cases:
            assert error(denoiser(x, sigma), cases[f"{case}.D_x_nolabels"]) < 2e-5
        if f"{case}.logvar" in cases:
            assert error(denoiser.logvar(sigma), cases[f"{case}.logvar"]) < 2e-5


def test_what_is_written(converted: ConversionReport, golden: Path) -> None:
    source = converted.config.provenance.source
    official = read_official(golden / source)
    config = load_checkpoint(converted.path)[1]
    assert config == converted.config
    assert (config.stage, config.two_time, config.parameterization) == ("teacher", True, "trigflow")
    kind, numbers = KINDS[official.preconditioning_class]
    assert config.preconditioning["kind"] == kind
    assert numbers.items() <= config.preconditioning.items()
    assert config.sigma_data == official.attributes.get("sigma_data", 0.5)
    assert (config.provenance.source, config.provenance.sha256) == (source, official.sha256)
    assert config.provenance.licence == "cc-by-nc-sa-4.0"
    # Names as in the official state, and its values, but for EDM2's gains.
    prefix = "unet." if official.network_class == "UNet" else "model."
    stored = {name.removeprefix(prefix): tensor for name, tensor in official.tensors.items() if name != "u"}
    found = load_tensors(converted.path / MODEL)[0]
    assert stored.keys() == {name for name in found if not name.startswith("second_time.")}
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    changed = {name for name, tensor in stored.items() if not torch.equal(tensor.float(), found[name])}
    assert {name.rpartition(".")[2] for name in changed} <= {"emb_gain", "out_gain"}
    assert bool(changed) == (official.network_class == "UNet")
    if official.encoder and official.encoder["class_name"] == "StabilityVAEEncoder":
        assert config.encoder["kind"] == "StabilityVAEEncoder"
        assert config.encoder["raw_mean"] == [5.81, 3.25, 0.12, -2.15]
    else:
        assert config.encoder == {"kind": "pixels"}
    card = (converted.path / CARD).read_text()
    assert source in card
    assert "float64" in card


def test_upcast(golden: Path) -> None:
    """The two official readings of EDM2's float16 gains, which are not the same."""
    official = read_official(golden / "edm2-latent-cond.pkl")
    cases = load_file(golden / "edm2-latent-cond.safetensors")
    inputs = cases["case0.x"], cases["case0.sigma"], cases["case0.labels"]
    assert error(cases["case0.D_x"], cases["case0.D_x_up"]) > 2e-5
    with torch.no_grad():
        for upcast, name in ((False, "D_x"), (True, "D_x_up")):
            flow, _ = build_official(official, upcast=upcast)
            assert error(Denoiser(flow.eval())(*inputs), cases[f"case0.{name}"]) < 2e-6


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("bad-huge-config.pkl", "holds map_label.weight in shape [4, 3] where its network has [1048576, 3]"),
        ("bad-missing-param.pkl", "lacks map_layer0.bias"),
        ("bad-shape-mismatch.pkl", "in shape [5, 9] where its network has [4, 9]"),
        ("bad-shape-flat.pkl", "in shape [32] where its network has [8, 4]"),
        ("bad-unknown-kwarg.pkl", "with the argument no_such_option"),
    ],
)
def test_what_does_not_fit_is_refused(bad: Path, tmp_path: Path, name: str, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert(bad / name, tmp_path / "out")
    assert sentence in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_rerunning(golden: Path, bad: Path, tmp_path: Path) -> None:
    tiny, other, out = golden / "edm-tiny-cond.pkl", bad / "bad-modulesrc-exec.pkl", tmp_path / "out"
    first = convert(tiny, out)
    before = (out / CONFIG).stat().st_mtime_ns
    assert convert(tiny, out) == (out, first.config, (), False)
    assert (out / CONFIG).stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match=r"holds a checkpoint already, a teacher from edm-tiny-cond\.pkl"):
        convert(other, out)
    assert convert(other, out, overwrite=True).config.provenance.source == "bad-modulesrc-exec.pkl"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a checkpoint: choose another path"):
        convert(tiny, tmp_path / "file", overwrite=True)


def test_licence(golden: Path, tmp_path: Path) -> None:
    done = convert(golden / "edm-tiny-cond.pkl", tmp_path / "out", licence="apache-2.0")
    assert done.config.provenance.licence == "apache-2.0"
    assert "license: apache-2.0" in (tmp_path / "out" / CARD).read_text()
    assert not convert(golden / "edm-tiny-cond.pkl", tmp_path / "out", licence="Apache-2.0").written
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        convert(golden / "edm-tiny-cond.pkl", tmp_path / "out", licence="mit")


def test_only_an_intact_teacher_is_not_converted_again(golden: Path, tmp_path: Path) -> None:
    source, out = golden / "edm-tiny-cond.pkl", tmp_path / "out"
    convert_generator(source, out, "sid")
    with pytest.raises(CheckpointError, match="holds a checkpoint already, a generator from edm-tiny-cond"):
        convert(source, out)
    convert(source, out, overwrite=True, parity="none")
    (out / MODEL).write_bytes((out / MODEL).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        convert(source, out)
    assert convert(source, out, overwrite=True, parity="none").written
    assert not convert(source, out).written


def test_provenance_is_the_address_without_its_secrets(golden: Path, tmp_path: Path) -> None:
    source = Source("https://me:secret@host/a/edm.pkl?sig=secret", golden / "edm-tiny-cond.pkl")
    teacher = convert(source, tmp_path / "teacher", parity="none").config
    generator = convert_generator(source, tmp_path / "generator", "sid", licence="mit").config
    assert teacher.provenance.source == generator.provenance.source == "https://host/a/edm.pkl"
    assert generator.provenance.licence == "mit"


@pytest.mark.parametrize(
    ("float32", "float64", "kept"),
    [(1e-4, 1e-12, True), (1e-4, None, True), (2e-3, 1e-12, False), (1e-4, 1e-9, False), (math.nan, None, False)],
)
def test_how_far_a_conversion_may_be(float32: float, float64: float | None, kept: bool, golden: Path) -> None:
    source = Source("edm.pkl", golden / "edm-tiny-cond.pkl")
    with nullcontext() if kept else pytest.raises(CheckpointError, match="was not converted: at sigma 3"):
        module._require_parity([ParityRow(80.0, 0.0, None), ParityRow(3.0, float32, float64)], source)


def test_an_inexact_conversion_is_refused(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.add_second_time

    def spoiled(flow: FlowNetwork, *, share: bool) -> FlowNetwork:
        flow = real(flow, share=share)
        assert flow.network.second_time is not None
        torch.nn.init.constant_(flow.network.second_time.gain, 1e-6)
        return flow

    monkeypatch.setattr(module, "add_second_time", spoiled)
    with pytest.raises(CheckpointError, match="was not converted: at sigma"):
        convert(golden / "edm-tiny-cond.pkl", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(golden: Path, tmp_path: Path) -> None:
    stages = []

    def interrupt(stage: str) -> None:
        stages.append(stage)
        if stage.startswith("comparing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(golden / "edm-tiny-cond.pkl", tmp_path / "out", on_progress=interrupt)
    assert stages == [
        "reading",
        "writing",
        "measuring how D depends on the noise",
        "comparing images of 2x2 in float32",
    ]
    assert not list(tmp_path.iterdir())


def test_models_to_use(golden: Path, tmp_path: Path) -> None:
    source = golden / "edm2-rgb-cond.pkl"
    teacher = load_denoiser(source)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training
    with pytest.raises(CheckpointError, match="is a teacher, not a generator"):
        load_generator(source)

    flow, config = load_checkpoint(convert(source, tmp_path / "teacher").path)
    assert not load_denoiser(tmp_path / "teacher").flow.two_time
    run = tmp_path / "run" / "generator"
    save_checkpoint(run, drop_second_time(flow), replace(config, stage="generator", method="cosim"))
    for place in (run, run.parent):  # the checkpoint, and the run that left it
        assert isinstance(load_model(place), Generator)
        assert load_generator(place).config.method == "cosim"
    with pytest.raises(CheckpointError, match="is a generator, not a teacher"):
        load_denoiser(run)
    with pytest.raises(CheckpointError, match="is a folder"):
        convert(run, tmp_path / "again")

    torch.nn.init.ones_(flow.network.second_time.gain)  # type: ignore[union-attr, arg-type]
    save_checkpoint(tmp_path / "ctm", flow, replace(config, stage="generator", method="ctm"))
    jumps, (x, t) = load_generator(tmp_path / "ctm"), (torch.randn(1, 3, 8, 8), torch.tensor(1.5))
    F = (jumps.flow(x, t, second=s) for s in (torch.tensor(0.1), torch.tensor(1.0)))
    assert (next(F) - next(F)).abs().max() > 0.01


def test_precision(golden: Path) -> None:
    source = golden / "edm2-rgb-cond.pkl"
    cases = load_file(golden / "edm2-rgb-cond.safetensors")
    inputs = cases["case0.x"], cases["case0.sigma"], cases["case0.labels"]
    wide = load_denoiser(source, dtype=torch.float64)
    assert wide(*inputs).dtype == torch.float64
    assert error(wide(*inputs).float(), cases["case0.D_x"]) < 2e-6
    half = load_denoiser(source, dtype=torch.bfloat16)
    assert half(*inputs).dtype == torch.float32
    assert 1e-6 < error(half(*inputs), cases["case0.D_x"]) < 3e-2
    assert isinstance(half.flow.network, UNet)
    assert half.flow.network.out_gain.dtype == torch.float32


EDM_NETWORKS = [name for name in NETWORKS if name.startswith("edm")]


@pytest.mark.parametrize("name", EDM_NETWORKS)
def test_every_network_with_edms_preconditioning_can_read_t(golden: Path, tmp_path: Path, name: str) -> None:
    done = convert(golden / name, tmp_path / "out", time_embedding="positional")
    config = done.config
    assert (config.c_noise, config.preconditioning["c_noise_kind"], config.two_time) == ("t", "time", True)
    assert config.network.arguments.get("double_norm", True)
    assert len(done.parity) == 8
    assert all(1e-6 < row.float64 < 100 for row in done.parity)
    assert all(row.float32 == pytest.approx(row.float64, rel=0.1) for row in done.parity)
    flow, again = load_checkpoint(tmp_path / "out")
    assert again == config
    assert flow.preconditioning.reads_time
    assert outline(tmp_path / "out").preconditioning == flow.preconditioning
    assert not load_denoiser(tmp_path / "out").flow.two_time
    assert convert(golden / name, tmp_path / "out", time_embedding="positional").parity == ()
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):  # but not what is asked now
        convert(golden / name, tmp_path / "out")


def test_without_double_norm_less_is_changed(golden: Path, tmp_path: Path) -> None:
    source = golden / "edm2-rgb-cond.pkl"
    kept = convert(source, tmp_path / "kept", time_embedding="positional", double_norm=False)
    changed = convert(source, tmp_path / "changed", time_embedding="positional")
    assert sum(row.float64 for row in kept.parity) < sum(row.float64 for row in changed.parity)
    assert not kept.config.network.arguments["double_norm"]


def test_a_teacher_of_ours_can_be_adapted(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = golden / "edm2-rgb-cond.pkl"
    ours = convert(source, tmp_path / "ours", licence="mit")
    write_config(ours.path, replace(read_config(ours.path), results=({"metrics": {"fid": 2.0}},)))
    again = convert(ours.path, tmp_path / "again", time_embedding="positional")
    direct = convert(source, tmp_path / "direct", time_embedding="positional")
    found, expected = (load_tensors(done.path / MODEL)[0] for done in (again, direct))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert again.config.provenance.source == "edm2-rgb-cond.pkl"
    assert again.config.provenance.licence == "mit"
    assert again.config.provenance.parent is not None
    assert read_config(tmp_path / "again").results == ()  # which were the other function's
    with pytest.raises(CheckpointError, match=r"is inside the folder that is converted, .*: choose another place"):
        convert(ours.path, ours.path / "inside", time_embedding="positional")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="is inside the folder that is converted"):
        convert(ours.path, "ours/inside", time_embedding="positional")
    with pytest.raises(CheckpointError, match="a run that needs no conversion: train and sample take it as it is"):
        convert(ours.path, ours.path / "inside")


def test_what_cannot_be_adapted(golden: Path, tmp_path: Path) -> None:
    for name, options, sentence in (
        ("vp-ddpmpp-uncond.pkl.gz", {"time_embedding": "positional"}, "needs EDM's preconditioning"),
        ("edm-tiny-cond.pkl", {"time_embedding": "positional", "double_norm": True}, "no adaptive norm"),
        ("edm2-rgb-cond.pkl", {"double_norm": True}, "need --time-embedding positional"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            convert(golden / name, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
