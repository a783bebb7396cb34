"""The flow's inputs: times at the ends of the circle, all on the images' device, dropout of rows, and jumps."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.surgery.rebuild import add_guidance
from edmdistill.networks.surgery.two_time import add_second_time
from edmdistill.trigflow import ddim_step, denoised, expand, sigma_to_time

MakeFlow = Callable[..., FlowNetwork]
T = torch.tensor([0.3, 0.8, 1.5], dtype=torch.float64)
S = torch.tensor([0.1, 0.8, 0.0], dtype=torch.float64)
W = torch.tensor([1.0, 1.3, 2.0], dtype=torch.float64)


@pytest.fixture
def full(make_flow: MakeFlow) -> FlowNetwork:
    """Of two times, a guidance weight and a log variance, all of which have an effect; sigma_data is not 1/2."""
    plain = make_flow("edm2", torch.float64)
    plain = FlowNetwork(plain.network, replace(plain.preconditioning, sigma_data=0.7)).eval()
    flow = add_guidance(add_second_time(plain))
    with torch.no_grad():
        for name in "second_time.gain", "map_guidance.weight":
            torch.nn.init.normal_(flow.network.get_parameter(name).flatten(), mean=0.3)
    return flow


def images(flow: FlowNetwork) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = 3, flow.img_channels, flow.img_resolution, flow.img_resolution
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_a_jump_is_the_ddim_step_of_f(full: FlowNetwork, make_flow: MakeFlow) -> None:
    """With two times F is that of both; with one, that of the first."""
    labels = torch.tensor([0, 1, 4])
    x = images(full).half()
    expected = ddim_step(x.double(), full(x, T, labels, S, w=W), T, S, 0.7)
    assert torch.equal(full.jump(x, T, S, labels, W), expected)
    one = add_guidance(make_flow("edm2"))
    one.network.map_guidance.weight.normal_()
    found = one.jump(x, T, S, labels, W)
    assert found.dtype == torch.float32
    assert torch.equal(found, ddim_step(x.float(), one(x, T, labels, w=W), T, S, 0.5))


@torch.no_grad()
def test_a_denoiser_gives_a_network_of_two_times_the_same_twice(full: FlowNetwork) -> None:
    x, sigma = images(full), torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    t = sigma_to_time(sigma, 0.7)
    x_t = expand(t, x).cos() * x
    expected = denoised(x_t, full(x_t, t, None, t), t, 0.7)
    torch.testing.assert_close(Denoiser(full)(x, sigma), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(denoised(x_t, full(x_t, t), t, 0.7), expected, rtol=1e-3)


@torch.no_grad()
def test_a_denoiser_takes_images_in_any_precision_and_knows_its_levels(make_flow: MakeFlow) -> None:
    flow = make_flow("adm-iddpm")
    denoiser, x = Denoiser(flow), images(flow).half()
    assert torch.equal(denoiser(x, 2.5), denoiser(x.float(), 2.5))
    levels = flow.preconditioning.levels
    assert denoiser.round_sigma(float(levels[500]) * 1.0001) == levels[500]


@torch.no_grad()
def test_all_times_are_clamped_to_those_of_training(full: FlowNetwork) -> None:
    x, ends = images(full), torch.tensor([0.0, torch.pi / 2, 0.5], dtype=torch.float64)
    within = torch.stack([*(sigma_to_time(sigma, 0.7) for sigma in (full.sigma_min, full.sigma_max)), ends[2]])
    torch.testing.assert_close(full.clamp(ends, x).flatten(), within)
    found, expected = (full(x, time, None, time.flip(0), u_at=(time.roll(1),), w=W) for time in (ends, within))
    for one, other in zip(found, expected, strict=True):
        assert bool(one.isfinite().all())
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_times_and_weights_go_to_the_images_device(full: FlowNetwork) -> None:
    F, u = full.to("meta")(images(full).to("meta"), T, None, S, u_at=(T,), w=W)
    assert (F.device.type, F.shape, u.shape) == ("meta", (3, 4, 8, 8), (3,))


def test_what_the_network_reads_has_its_dtype(full: FlowNetwork) -> None:
    for dtype in (torch.float32, torch.float64):
        condition = full.to(dtype).conditioning(images(full).to(dtype), T, None, S, (T,), W)
        read = condition.c_noise, condition.c_noise_second, *condition.c_logvar, condition.guidance_weight
        assert [tensor.dtype for tensor in read if tensor is not None] == [dtype] * 4


def test_rows_have_dropout_of_their_own(full: FlowNetwork) -> None:
    """A pass without gradients has that of the next pass with them, which has another than the one before."""
    x = torch.ones(1000, 1)
    with torch.no_grad():
        early = full.dropout_keys(x)
    keys, more = full.dropout_keys(x), full.dropout_keys(x)
    assert torch.equal(early, keys)
    assert len(torch.cat([keys, more]).unique()) == 2000


def test_rows_have_the_dropout_of_their_draws(full: FlowNetwork) -> None:
    """As above; a pass of rows that are repeated has as many keys."""
    full.draws, own = Draws(0, 3), Draws(0, 3)
    x = torch.ones(6, 1)
    with torch.no_grad():
        early = full.dropout_keys(x)
    keys, more = full.dropout_keys(x), full.dropout_keys(x[:3])
    assert torch.equal(early, keys)
    assert torch.equal(torch.cat([keys, more]), own.dropout(times=3))
    assert len(torch.cat([keys, more]).unique()) == 9


def test_how_often_labels_were_dropped_may_be_known_better_than_by_the_network(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2", label_dropout=0.2)
    known = (None, 0.0, 0.1)
    found = [FlowNetwork(flow.network, flow.preconditioning, label_dropout=each).label_dropout for each in known]
    assert found == [0.2, 0.0, 0.1]


@torch.no_grad()
def test_augmentation_labels_are_for_a_network_with_augment_dim(make_flow: MakeFlow) -> None:
    flow, other = make_flow("ddpmpp"), make_flow("edm2")
    x, t, direction = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 1.2]), torch.randn(2, 3, 8, 8)
    labels = torch.randn(2, 9)
    augmented = flow(x, t, augment_labels=labels)
    assert (augmented - flow(x, t)).flatten(1).abs().amax(1).min() > 1e-3
    torch.testing.assert_close(flow(x, t, augment_labels=torch.zeros(2, 9)), flow(x, t))
    F, _ = flow(x, t, along=(direction, torch.ones(2)), augment_labels=labels)
    torch.testing.assert_close(F, augmented)
    with pytest.raises(ValueError, match="takes no augmentation labels, but some were given"):
        other(torch.randn(2, 4, 8, 8), t, augment_labels=labels)
