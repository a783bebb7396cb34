"""evaluate: three kinds of source by one mechanism, and results that say how they were made."""

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from digit_images import TEST, TRAIN, held_out, write_folder, write_npz
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import Tensor

from edmdistill.checkpoints.config import CheckpointConfig, Guidance, Provenance, describe
from edmdistill.checkpoints.generator import Generator
from edmdistill.data.datasets import open_dataset
from edmdistill.errors import DatasetError, EdmDistillError
from edmdistill.evaluation.collect import collect_statistics
from edmdistill.evaluation.compare import Row, compare, differences
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.frechet import frechet_distance, statistics
from edmdistill.evaluation.images import BLOCKS, block_size
from edmdistill.evaluation.likelihood import evaluate_likelihood
from edmdistill.evaluation.panel import collect_reference
from edmdistill.evaluation.protocol import PROTOCOLS
from edmdistill.evaluation.results import (
    Result,
    add_results,
    latest_results,
    results_in_config,
    results_json,
    results_table,
)
from edmdistill.evaluation.shards import Work
from edmdistill.evaluation.tables import sampler_words
from edmdistill.features.spaces import Pixels, load_features
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.generate import sample
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.job import SampleJob
from edmdistill.sampling.seeds import format_seeds, parse_seeds
from edmdistill.sampling.spec import SamplerSpec


def flow(label_dim: int = 10, channels: int = 1) -> FlowNetwork:
    torch.manual_seed(0)
    network = UNet(
        8,
        channels,
        label_dim,
        model_channels=8,
        channel_mult=(1,),
        num_blocks=1,
        attn_resolutions=(),
        logvar_channels=4,
    )
    torch.nn.init.ones_(network.out_gain)
    return FlowNetwork(network, EDM(sigma_data=0.5)).eval().requires_grad_(False)


def generator(label_dim: int = 10, channels: int = 1) -> Generator:
    net = flow(label_dim, channels)
    provenance = Provenance(source="teacher.pkl", sha256="00")
    return Generator(net, CheckpointConfig(stage="generator", method="cosim", provenance=provenance, **describe(net)))


def test_a_generator_is_measured_as_it_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCKS, 16, 16)
    model = generator()
    done: list[int] = []
    result = evaluate(
        model,
        protocol="digits",
        sampler=SamplerSpec(nfe=2),
        seeds=range(30),
        on_progress=done.append,
        source="here",
    )
    pixels = to_uint8(sample(model, 2, seeds=range(30), labels=torch.arange(30) % 10))
    digits = load_features("digits")
    reference = statistics(digits(TRAIN.images(range(1500))))
    expected = frechet_distance(statistics(digits(pixels)), reference)
    accuracy = (digits.logits(pixels).argmax(1) == torch.arange(30) % 10).float().mean().item()
    assert result.metrics["fd_digits@30"] == pytest.approx(expected, rel=1e-5)
    assert result.metrics["class_accuracy@30"] == pytest.approx(accuracy)
    assert done == [16, 14]
    assert result.sampler is not None
    assert (result.sampler.solver, result.sampler.nfe, result.sampler.gamma) == ("gamma", 2, 1.0)
    assert result.sampler.sigmas == pytest.approx((80.0, 2.515), rel=1e-3)
    assert result.protocol.seeds == "0-29"
    assert result.protocol.labels == "balanced"
    assert (result.provenance["source"], result.provenance["device"]) == ("here", "cpu")
    assert result.provenance["method"] == "cosim"
    assert result.provenance["provenance"]["source"] == "teacher.pkl"


def test_a_teacher_is_measured_by_heun() -> None:
    model = Denoiser(flow())
    result = evaluate(
        model,
        "digits",
        protocol="digits",
        sampler=SamplerSpec(nfe=3, guidance=1.5, force_guidance=True),
        seeds=[7, 8, 9, 20],
    )
    assert result.sampler is not None
    assert (result.sampler.solver, result.sampler.nfe, result.sampler.guidance) == ("heun", 3, 1.5)
    assert result.protocol.seeds == "7-9,20"
    assert set(result.metrics) == {"fd_digits@4", "class_accuracy@4"}


def test_a_generators_guidance_is_recorded() -> None:
    model = generator()
    model.config = replace(model.config, guidance=Guidance("classes", (1.5, 1.5)))
    result = evaluate(model, protocol="digits", seeds=range(4))
    assert result.sampler is not None
    assert result.sampler.guidance == 1.5


def test_own_times_are_recorded() -> None:
    times = torch.tensor([1.5, 1.0, 0.5])
    result = evaluate(generator(), protocol="digits", sampler=SamplerSpec(times=times, gamma=0.5), seeds=range(4))
    assert result.sampler is not None
    assert result.sampler.nfe == 3
    assert result.sampler.gamma == 0.5
    assert result.sampler.sigmas == pytest.approx((0.5 * times.double().tan()).tolist())


def test_an_unconditional_network_has_no_class_accuracy() -> None:
    result = evaluate(generator(label_dim=0), protocol="digits", sampler=SamplerSpec(nfe=1), seeds=range(4))
    assert result.protocol.labels == "none"
    assert set(result.metrics) == {"fd_digits@4"}


@pytest.mark.parametrize(
    ("side", "block"), [(8, 256), (16, 256), (17, 128), (32, 128), (33, 32), (64, 32), (65, 8), (512, 8)]
)
def test_blocks_depend_on_the_size_of_images_alone(side: int, block: int) -> None:
    assert block_size(side) == block


def test_whatever_is_measured_is_computed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network, the features of its images, those of a folder, of the reference and of `data stats`, likelihoods."""
    monkeypatch.setitem(BLOCKS, 16, 16)
    model, real = generator(), TEST.images(range(40))
    folder = write_folder(tmp_path, real, None)
    features: list[int] = []
    passes: list[int] = []
    of_pixels = Pixels.features_and_logits

    def features_and_logits(space: Pixels, images: Tensor) -> tuple[Tensor, None]:
        features.append(len(images))
        return of_pixels(space, images)

    monkeypatch.setattr(Pixels, "features_and_logits", features_and_logits)
    model.flow.network.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    blocks = [16, 16, 8]
    for subject in (model, folder):
        evaluate(subject, folder, protocol="pixels", **({"seeds": range(40)} if subject is model else {}))
        assert features == 2 * blocks
        features.clear()
        collect_reference.cache_clear()
    assert passes == [size for size in blocks for _ in range(2)]  # two evaluations of the network
    collect_statistics(open_dataset(folder), {"pixels": Pixels()})
    assert features == blocks
    done: list[int] = []
    evaluate_likelihood(Denoiser(flow()), TEST, count=40, probes=1, tolerance=0.5, on_progress=done.append)
    assert done == blocks


def test_a_network_stands_beside_its_own_samples(tmp_path: Path) -> None:
    model, spec, count = generator(), SamplerSpec(nfe=2, gamma=0.5), 20
    job = SampleJob(model=model, spec=spec, seeds=range(count), cycle=range(10))
    request = {"classes": list(range(10)), "sampler": msgspec.to_builtins(build_sampler(model, spec).record)}
    job.draw_into(job.open_samples(tmp_path / "samples", request, source="a", overwrite=False))
    drawn = evaluate(model, protocol="digits", sampler=spec, seeds=range(count))
    found = evaluate(tmp_path / "samples", protocol="digits")
    assert found.metrics == pytest.approx(drawn.metrics, rel=1e-4)
    assert found.sampler == drawn.sampler
    table = compare([Row("network", drawn), Row("samples", found)])
    assert not table.notes
    assert [row[1] for row in table.cells()] == ["NFE", "2", "2"]


def test_samples_measured_from_a_file_compare_with_those_measured_directly(tmp_path: Path) -> None:
    model, seeds = generator(), np.arange(20)
    images = to_uint8(sample(model, 1, seeds=seeds, labels=seeds % 10))
    saved = evaluate(write_npz(tmp_path, images, seeds=seeds, labels=seeds % 10), protocol="digits")
    direct = evaluate(model, protocol="digits", sampler=SamplerSpec(nfe=1), seeds=range(20))
    compare([Row("saved", saved), Row("direct", direct)])
    assert saved.metrics == pytest.approx(direct.metrics, rel=1e-5)


def test_json_says_it_all() -> None:
    result = evaluate(held_out(), protocol="digits")
    document = json.loads(result.to_json())
    assert document["schema_version"] == 2
    assert document["protocol"]["weights"] == {"digits": load_features("digits").sha256}
    assert document["protocol"]["reference"]["n"] == 1500
    assert len(document["protocol"]["reference"]["sha256"]) == len(document["protocol_sha256"]) == 64
    assert document["protocol"]["covariance"] == "unbiased"
    assert msgspec.json.decode(result.to_json(), type=Result) == result
    assert json.loads(results_json([result])) == {"schema_version": 2, "results": [document]}


def test_a_result_names_the_revision_that_measured_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run's sessions do; after another commit, what was measured is not measured again."""
    model = generator()
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr("edmdistill.evaluation.evaluate.revision", lambda commit=commit: commit)
        with closing(Work(tmp_path)) as work:
            kept = evaluate(model, protocol="digits", seeds=range(2), work=work)
        assert kept.provenance["revision"] == "a" * 40
    assert evaluate(model, protocol="digits", seeds=range(2)).provenance["revision"] == "b" * 40


def test_only_equal_protocols_compare() -> None:
    few, more = evaluate(held_out()[:99], protocol="digits"), evaluate(held_out(), protocol="digits")
    assert few.protocol_sha256 != more.protocol_sha256
    assert differences(few.protocol, more.protocol, "fd_digits") == ["n (99 and 297)"]


def test_the_standard_number_of_images_needs_no_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROTOCOLS, "digits", replace(PROTOCOLS["digits"], n=297))
    assert set(evaluate(held_out(), protocol="digits").metrics) == {"fd_digits"}


def test_table() -> None:
    result = evaluate(generator(), protocol="digits", sampler=SamplerSpec(nfe=1), seeds=range(4))
    title, head, row = results_table([result]).splitlines()
    assert title == "protocol digits: 4 images against digits (train, 1500)"
    assert head.split() == ["NFE", "fd_digits@4", "class_accuracy@4"]
    assert row.split()[0] == "1"


@dataclass
class Bad:
    """A call that is refused, and what it is told."""

    images: object
    message: str
    reference: object = None
    protocol: str = "digits"


BAD = [
    Bad(torch.zeros(2, 1, 8, 8), r"uint8 \[N,C,H,W\], but these are torch\.float32 \[2, 1, 8, 8\]"),
    Bad(torch.zeros(2, 8, 8, dtype=torch.uint8), r"but these are torch\.uint8 \[2, 8, 8\]"),
    Bad(
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "the images are 3x8x8, but those of the reference digits are 1x8x8"
    ),
    Bad(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "a covariance needs at least two images, but there is only 1"),
    Bad(held_out(), "there is no protocol 'fid'; choose one of digits, tiles, pixels, edm", protocol="fid"),
    Bad(held_out(), "the protocol pixels measures against a data set: name it with --ref", protocol="pixels"),
    Bad(held_out(), r"against digits \(train\), but the reference is digits \(test\)", reference=TEST),
    Bad("nowhere", "nowhere does not exist"),
    Bad("nowhere.npz", r"nowhere\.npz cannot be read \(.*No such file"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.message[:30])
def test_what_does_not_fit_is_refused(bad: Bad) -> None:
    with pytest.raises(EdmDistillError, match=bad.message) as caught:
        evaluate(bad.images, bad.reference, protocol=bad.protocol)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_sampling_options_are_for_networks() -> None:
    with pytest.raises(EdmDistillError, match="are for sampling a network, but these are images"):
        evaluate(held_out(), protocol="digits", sampler=SamplerSpec(nfe=2))
    with pytest.raises(EdmDistillError, match="nothing to measure: pass at least two seeds"):
        evaluate(generator(), protocol="digits", seeds=[], repeat=2)
    unlabeled = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(EdmDistillError, match="class_accuracy needs images whose classes are known: leave it out"):
        evaluate(unlabeled, protocol="digits", metrics=["class_accuracy"])


def test_a_network_of_other_images_is_refused_before_it_draws() -> None:
    with pytest.raises(DatasetError, match="the images are 3x8x8"):
        evaluate(generator(channels=3), protocol="digits", sampler=SamplerSpec(nfe=1), on_progress=pytest.fail)


@given(st.lists(st.integers(0, 30), unique=True, min_size=1))
def test_seeds_are_written_as_they_are_read(seeds: list[int]) -> None:
    assert parse_seeds(format_seeds(seeds)) == seeds


def test_results_guided_by_two_networks_are_two(tmp_path: Path) -> None:
    """One never takes the other's place, in a checkpoint or in a table, though both have the same weight."""
    model = Denoiser(flow())
    guides = [Denoiser(flow(label_dim=0)) for _ in range(2)]
    torch.nn.init.zeros_(guides[1].flow.network.out_gain)
    measured = [
        evaluate(
            model,
            protocol="digits",
            sampler=SamplerSpec(nfe=1, solver="ddim", guidance=2.0, guide=guide),
            seeds=range(12),
        )
        for guide in guides
    ]
    config = CheckpointConfig(stage="teacher", provenance=Provenance(source="it"), **describe(model.flow))
    kept = results_in_config(add_results(add_results(config, measured), measured))
    assert kept == measured
    words = {sampler_words(result.sampler) for result in kept}
    assert len(words) == 2
    assert all(", guide " in word for word in words)
    assert latest_results(kept) == kept
