"""`sample`: any model, from seeds."""

import pytest
import torch
from torch import Tensor

from edmdistill.checkpoints.config import CheckpointConfig, Guidance, Provenance, describe
from edmdistill.checkpoints.generator import Generator
from edmdistill.errors import EdmDistillError
from edmdistill.networks import NETWORKS
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import PRECONDITIONINGS
from edmdistill.networks.surgery.rebuild import add_guidance
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.gamma import gamma_sampler
from edmdistill.sampling.generate import drawn_classes, is_latent, sample
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.heun import EDM_SAMPLER, Churn, edm_sampler
from edmdistill.sampling.seeds import SeededNoise
from edmdistill.sampling.spec import SOLVERS, SamplerSpec
from edmdistill.sampling.trajectory import ReferenceGuidance
from edmdistill.trigflow import denoised

SEEDS = [3, 1, 4, 159, 26]
ARGUMENTS = {
    "edm2": {
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "channels_per_head": 8,
    },
    "song": {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []},
}


def flow(kind: str = "edm2", label_dim: int = 10, channels: int = 1) -> FlowNetwork:
    torch.manual_seed(0)
    images = {"img_channels": channels} if kind == "edm2" else {"in_channels": channels, "out_channels": channels}
    network = NETWORKS[kind](img_resolution=8, label_dim=label_dim, **images, **ARGUMENTS[kind])
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 0:
                parameter.fill_(0.5)  # gains, 0 at first
            elif kind == "song":
                parameter.normal_(0, 0.1)
    return FlowNetwork(network, PRECONDITIONINGS["edm"]()).eval()


def generator(guidance: tuple[float, float] | None = None, **options: int) -> Generator:
    """Of a range of guidance, one that reads the weight."""
    network = flow(**options)
    if guidance is not None and guidance[0] < guidance[1]:
        network = add_guidance(network)
        torch.nn.init.normal_(network.network.get_parameter("map_guidance.weight"), std=0.2)
    learned = None if guidance is None else Guidance("classes", guidance)
    provenance = Provenance(source="a test")
    config = CheckpointConfig(stage="generator", provenance=provenance, guidance=learned, **describe(network))
    return Generator(network, config)


def teacher(kind: str = "edm2", **options: int) -> Denoiser:
    return Denoiser(flow(kind, **options))


CASES = {
    "generator": (generator, {"nfe": 3}),
    "gamma": (generator, {"nfe": 3, "gamma": 0.4}),
    "guided generator": (lambda: generator((1.0, 2.0)), {"nfe": 3, "guidance": 1.7}),
    "heun": (teacher, {"nfe": 5}),
    "edm": (lambda: teacher("song"), {"nfe": 5}),
    "churn": (teacher, {"nfe": 5, "churn": Churn(3)}),
    "guided": (teacher, {"nfe": 5, "guidance": 1.5, "force_guidance": True}),
    "ddim": (teacher, {"nfe": 4, "solver": "ddim"}),
    "dpm-solver": (teacher, {"nfe": 5, "solver": "dpm-solver-2s"}),
    "dpm-solver++": (teacher, {"nfe": 4, "solver": "dpm-solver++2m"}),
    "ipndm": (teacher, {"nfe": 4, "solver": "ipndm"}),
    "unipc": (teacher, {"times": [1.55, 1.4, 1.0, 0.4], "solver": "unipc"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_picture_depends_on_its_seed_alone(case: str) -> None:
    make, options = CASES[case]
    model = make()
    together = sample(model, seeds=SEEDS, **options)
    assert together.shape == (5, 1, 8, 8)
    assert together.dtype == torch.float32
    assert together.abs().max() <= 1
    assert len({tuple(picture.flatten().tolist()) for picture in together}) == 5
    for batch in (1, 2, 5):
        again = sample(model, seeds=SEEDS[::-1], batch=batch, **options).flip(0)
        torch.testing.assert_close(again, together, rtol=0, atol=1e-4)  # kernels round by the batch
        assert (to_uint8(again).int() - to_uint8(together).int()).abs().max() <= 1


@pytest.mark.parametrize("case", CASES)
def test_labels_that_were_drawn_may_be_given(case: str) -> None:
    make, options = CASES[case]
    model = make()
    classes = drawn_classes(model, SEEDS)
    assert classes is not None
    drawn = sample(model, seeds=SEEDS, **options)
    assert torch.equal(drawn, sample(model, seeds=SEEDS, labels=classes, **options))
    other = sample(model, seeds=SEEDS, labels=(classes + 1) % 10, **options)
    assert (drawn - other).flatten(1).abs().max(1).values.min() > 1e-4


def test_a_generator_goes_through_the_gamma_sampler() -> None:
    model = generator()
    rng = SeededNoise([7])
    noise, label = rng.normal((1, 8, 8)), torch.nn.functional.one_hot(rng.integers(10), 10).float()
    times = torch.tensor([1.5, 1.0], dtype=torch.float64)
    with torch.no_grad():
        x0 = gamma_sampler(model.jump, noise, label, times=times, sigma_data=0.5, gamma=0.5, randn_like=rng.like)
    assert torch.equal(sample(model, seeds=[7], times=[1.5, 1.0], gamma=0.5), x0.clamp(-1, 1))
    assert torch.equal(sample(model, seeds=[7]), sample(model, 2, seeds=[7], times=model.schedule(2)))


def test_a_teacher_goes_through_heun() -> None:
    model = teacher("song", label_dim=0)
    noise = SeededNoise([7]).normal((1, 8, 8))
    with torch.no_grad():
        x0 = edm_sampler(model, noise, sigmas=EDM_SAMPLER.sigmas(model, 18))
    assert torch.equal(sample(model, seeds=[7]), x0.clamp(-1, 1).float())
    calls: list[Tensor] = []
    teacher_of_edm2 = teacher(label_dim=0)
    teacher_of_edm2.register_forward_hook(lambda *args: calls.append(args[2]))
    sample(teacher_of_edm2, seeds=[7])
    assert len(calls) == 63


def test_a_reference_makes_as_many_calls_as_its_record_says() -> None:
    model, calls = teacher(), []
    model.flow.network.register_forward_hook(lambda *_: calls.append(1))
    reference = ReferenceGuidance(image=torch.zeros(1, 8, 8), features=lambda x: x, correctors=3)
    sample(model, seeds=[0], times=[1.5, 1.2, 0.8], reference=reference)
    spec = SamplerSpec(times=[1.5, 1.2, 0.8], reference=reference)
    assert len(calls) == build_sampler(model, spec).record.nfe == 3 + 3 * 2


def test_the_record_has_the_churn_in_numbers_that_json_has() -> None:
    model = teacher()
    for churn, recorded in (
        (Churn(40, 0.05, 50, 1.003), (40, 0.05, 50, 1.003)),
        (Churn(3), (3, 0, model.sigma_max, 1)),
        (Churn(), None),
    ):
        assert build_sampler(model, SamplerSpec(churn=churn)).record.churn == recorded


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_makes_as_many_calls_as_it_is_given(solver: str) -> None:
    model, calls = teacher("song"), []
    model.flow.network.register_forward_hook(lambda *_: calls.append(1))
    for nfe in (5, None):
        calls.clear()
        sample(model, nfe, seeds=[0], solver=solver)
        assert len(calls) == build_sampler(model, SamplerSpec(nfe=nfe, solver=solver)).record.nfe
    assert len(calls) == (35 if solver in ("heun", "dpm-solver-2s") else 18)


@pytest.mark.parametrize("case", CASES)
def test_a_network_in_float64_makes_the_same_picture(case: str) -> None:
    make, options = CASES[case]
    model = make()
    narrow = sample(model, seeds=[7], **options)
    torch.testing.assert_close(sample(model.double(), seeds=[7], **options), narrow, rtol=0, atol=1e-4)


def test_guidance() -> None:
    model, guide = teacher(), teacher(label_dim=0)
    plain = sample(model, 5, seeds=SEEDS)
    assert torch.equal(sample(model, 5, seeds=SEEDS, guidance=1.0), plain)
    unlabeled = sample(model, 5, seeds=SEEDS, labels=torch.zeros(5, 10))
    unguided = sample(model, 5, seeds=SEEDS, guidance=0.0, force_guidance=True)
    torch.testing.assert_close(unguided, unlabeled, rtol=0, atol=1e-4)
    away = sample(model, 5, seeds=SEEDS, guidance=0.0, guide=guide)
    torch.testing.assert_close(away, sample(guide, 5, seeds=SEEDS), rtol=0, atol=1e-4)


def test_a_generator_is_told_a_weight_of_its_range() -> None:
    model = generator((1.5, 2.5))
    drawn = {w: sample(model, 2, seeds=SEEDS, guidance=w) for w in (None, 1.5, 2.5)}
    assert torch.equal(drawn[None], drawn[1.5])
    assert (drawn[2.5] - drawn[1.5]).abs().max() > 1e-3
    x, t, w = torch.randn(5, 1, 8, 8), torch.tensor(1.2), torch.tensor(2.5)
    expected = denoised(x, model.flow(x, t, torch.arange(5), w=w), t, 0.5)
    assert torch.equal(model(x, t, torch.arange(5), w), expected)
    for built_in, w in ((None, 1.0), ((1.5, 1.5), 1.5)):
        model = generator(built_in)
        assert torch.equal(sample(model, seeds=SEEDS, guidance=w), sample(model, seeds=SEEDS))


def test_latents_come_as_they_are() -> None:
    model = teacher(channels=4)
    assert is_latent(model)
    assert not is_latent(teacher())
    latents = sample(model, 3, seeds=SEEDS)
    assert latents.shape == (5, 4, 8, 8)
    assert latents.abs().max() > 1


def test_the_model_is_left_as_it_was_and_progress_is_told() -> None:
    model = generator().train()
    done: list[int] = []
    sample(model, seeds=SEEDS, batch=2, on_progress=done.append)
    assert done == [2, 2, 1]
    assert model.training
    assert model.flow.network.training


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (generator, {"guide": teacher()}, "for teachers"),
        (generator, {"guidance": 2.0}, r"supports guidance 1 \(none\) only, but 2 was requested"),
        (lambda: generator((1.5, 1.5)), {"guidance": 1.0}, "supports guidance 1.5 only, but 1 was requested"),
        (lambda: generator((1.0, 2.0)), {"guidance": 2.1}, "supports guidance 1 to 2, but 2.1 was requested"),
        (generator, {"churn": Churn(1)}, "for teachers"),
        (generator, {"solver": "heun"}, "for teachers"),
        (teacher, {"solver": "ddim", "churn": Churn(1)}, "churn is part of Heun's method, and ddim has none"),
        (teacher, {"solver": "dpm-solver-2s", "nfe": 4}, "dpm-solver-2s takes an odd number of network evaluations"),
        (teacher, {"solver": "euler"}, "there is no solver 'euler'; choose one of heun, ddim"),
        (generator, {"gamma": 1.1}, r"\[0, 1\]"),
        (generator, {"nfe": 0}, "1 to 10,000"),
        (generator, {"nfe": 2.5}, "nfe = 2.5 must be a whole number"),
        (lambda: "runs/a", {}, "must be a network of load_generator or a network of load_denoiser"),
        (generator, {"times": [80.0, 2.5]}, "sigma_to_time makes them of noise levels"),
        (generator, {"times": [1.0, 1.1]}, "must decrease"),
        (generator, {"times": [1.0], "nfe": 2}, "leave out one of the two"),
        (generator, {"labels": 10}, "0 to 9"),
        (lambda: generator(label_dim=0), {"labels": 1}, "unconditional"),
        (generator, {"seeds": []}, "at least one seed"),
        (teacher, {"nfe": 4}, "3 or 5"),
        (teacher, {"gamma": 0.5}, "for generators"),
        (
            teacher,
            {"times": [1.5, 1.0], "nfe": 2},
            "cannot make 2 network evaluations, but 3: leave out",
        ),
        (teacher, {"times": [1.57, 1.0]}, "the network's, 0.002 to 80, but these are 627.9 to 0.7787"),
        (teacher, {"times": [1.5, 1.0, 1.0], "solver": "unipc"}, "takes two of the noise levels for one, and unipc"),
        (teacher, {"guide": teacher()}, "guidance 1"),
        (lambda: teacher(label_dim=0), {"guidance": 2.0}, "name a guide"),
        (teacher, {"guidance": 2.0, "guide": teacher(channels=3)}, "img_channels is 3"),
        (teacher, {"guidance": 2.0, "guide": teacher(label_dim=5)}, "label_dim is 5"),
    ],
)
def test_misuse_is_told_in_a_sentence(make, options, message: str) -> None:
    with pytest.raises(EdmDistillError, match=message) as caught:
        sample(make(), **{"seeds": SEEDS, **options})
    assert "\n" not in str(caught.value)
