"""CTM in closed form, float64: data N(m, c^2), whose trajectories are x_s = cos(s) m + (x_t - cos(t) m) v(s) / v(t)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_rounded
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods import ctm
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.ctm import CTM, CTMConfig
from edmdistill.methods.solver import follow_flow, heun_step
from edmdistill.methods.weighting import gradient_balance
from edmdistill.schedules import edm_sigmas
from edmdistill.trigflow import cos_sin, sigma_to_time

Make = Callable[..., Any]
SD, MEAN, STD = 0.5, 0.2, 0.3
ALONE = {"gan": 0.0, "dsm": 0.0}


def spread(t: Tensor, x: Tensor) -> Tensor:
    cos, sin = cos_sin(t, x)
    return (cos**2 * STD**2 + sin**2 * SD**2).sqrt()


def true_jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    (cos, _), (cos_s, _) = cos_sin(t, x), cos_sin(s, x)
    return cos_s * MEAN + (x - cos * MEAN) * spread(s, x) / spread(t, x)


def teacher(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """sigma_d F = dx_t/dt."""
    cos, sin = cos_sin(t, x)
    rate = cos * sin * (SD**2 - STD**2) / spread(t, x) ** 2
    return (-sin * MEAN + (x - cos * MEAN) * rate) / SD


def true_generator(x: Tensor, t: Tensor, labels: Tensor | None, s: Tensor) -> Tensor:
    """The F whose jump is the true one; the teacher's where s = t."""
    step = cos_sin(t - s, x)[1]
    F = (cos_sin(t - s, x)[0] * x - true_jump(x, t, s)) / (SD * torch.where(step == 0, 1.0, step))
    return torch.where(step == 0, teacher(x, t), F)


def data(size: int) -> Batch:
    rng = torch.Generator().manual_seed(0)
    return Batch(MEAN + STD * torch.randn(size, 3, 2, 2, generator=rng, dtype=torch.float64), None)


def method(noise: NoiseRange, generator: Callable[..., Tensor] = true_generator, **options: object) -> CTM:
    networks = {"teacher": teacher, "generator": generator, "target": true_generator}
    return CTM(CTMConfig(**(ALONE | options)), networks, noise)


def test_the_jump_is_that_of_edms_notation(noise: NoiseRange) -> None:
    """G = (sigma_s / sigma_t) x + (1 - sigma_s / sigma_t) g, g = c_skip x + c_out F_raw."""
    torch.manual_seed(0)
    x, F = torch.randn(2, 7, 3, 2, 2, dtype=torch.float64)
    sigma_t = torch.tensor([0.003, 0.02, 0.3, 0.5, 3.0, 40.0, 80.0], dtype=torch.float64)
    sigma_s = sigma_t * torch.tensor([1.0, 0.1, 0.9, 0.5, 0.01, 0.2, 0.0], dtype=torch.float64)
    t, s = sigma_to_time(sigma_t, SD), sigma_to_time(sigma_s, SD)
    found = method(noise).jump(lambda *_: F, x, t, s, None)
    sigma, ratio = sigma_t.reshape(-1, 1, 1, 1), (sigma_s / sigma_t).reshape(-1, 1, 1, 1)
    x_edm = x / cos_sin(t, x)[0]
    g = SD**2 / (sigma**2 + SD**2) * x_edm - sigma * SD / (sigma**2 + SD**2).sqrt() * F
    G = ratio * x_edm + (1 - ratio) * g
    torch.testing.assert_close(found, cos_sin(s, x)[0] * G, rtol=1e-12, atol=1e-13)


def test_a_true_generator_has_no_gap_to_a_true_teacher(noise: NoiseRange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctm, "follow_flow", lambda flow, x, times, i, j, steps, sd: true_jump(x, times[i], times[j]))
    for options in ({}, {"sampling": "paper"}, {"matching": "global"}, {"inner": "live"}):
        loss = method(noise, distance="l2", **options).turns()[-1].loss(data(64), Draws(0, 64))
        assert loss.value.max() < 1e-24


@pytest.mark.parametrize(("inner", "first"), [("average", "target"), ("live", "generator")])
def test_each_jump_has_its_network_and_its_end(noise: NoiseRange, inner: str, first: str) -> None:
    """From u to s and from t to s; both then go on to sigma_min, by the target network."""
    calls: list[tuple[str, Tensor]] = []

    def recorded(name: str) -> Callable[..., Tensor]:
        def network(x: Tensor, t: Tensor, labels: Tensor | None, s: Tensor) -> Tensor:
            calls.append((name, s))
            return true_generator(x, t, labels, s)

        return network

    networks = {"teacher": teacher, **{name: recorded(name) for name in ("generator", "target")}}
    CTM(CTMConfig(inner=inner, sampling="paper", **ALONE), networks, noise).turns()[-1].loss(data(64), Draws(0, 64))
    assert [name for name, _ in calls] == [first, "target", "generator", "target"]
    (_, s), (_, end), (_, s_too), (_, end_too) = calls
    assert torch.equal(s, s_too)
    assert len(s.unique()) > 1
    assert torch.equal(end, end_too)
    torch.testing.assert_close(noise.sigma_data * end.tan(), torch.full_like(end, noise.sigma_min))


def test_heuns_error_falls_by_four_and_standing_still_costs_nothing() -> None:
    x = torch.tensor([0.7, -0.4], dtype=torch.float64).reshape(2, 1, 1, 1)
    errors = []
    for N in (200, 400):
        times = sigma_to_time(edm_sigmas(N + 1, 0.02, 20.0), SD)
        start, stop = torch.tensor([0, 0]), torch.tensor([N, N // 2])
        end = follow_flow(teacher, x, times, start, stop, N, SD)
        errors.append((end - true_jump(x, times[start], times[stop])).abs().flatten())
        short = follow_flow(teacher, x[1:], times, start[1:], stop[1:], N // 2, SD)
        assert_rounded(short, end[1:], 20 * N)  # N/2 steps; vector units take cosines by twos or more
    torch.testing.assert_close(errors[0] / errors[1], torch.full((2,), 4.0, dtype=torch.float64), rtol=0.05, atol=0)
    t = torch.tensor([1.0, 0.3], dtype=torch.float64)
    assert torch.equal(heun_step(teacher, x, t, t, SD), x)


def test_every_row_takes_all_steps() -> None:
    """So that processes call the network equally often: twice a step."""
    calls: list[Tensor] = []

    def flow(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return teacher(x, t)

    times = sigma_to_time(edm_sigmas(5, 0.02, 20.0), SD)
    follow_flow(flow, torch.ones(2, 1, 1, 1).double(), times, torch.tensor([0, 1]), torch.tensor([3, 2]), 3, SD)
    assert torch.equal(torch.stack(calls), times[torch.tensor([[0, 1], [1, 2], [1, 2], [2, 2], [2, 2], [3, 2]])])


def test_heun_is_edms() -> None:
    """In EDM's scale: x + (sigma' - sigma) (d + d') / 2."""
    x, sigma, after = torch.full((1, 1, 1, 1), 1.3, dtype=torch.float64), 5.0, 1.2

    def slope(x: Tensor, sigma: float) -> Tensor:
        t = sigma_to_time(sigma, SD)
        cos, sin = cos_sin(t, x)
        return (x - (cos * (cos * x) - sin * SD * teacher(cos * x, t))) / sigma

    d = slope(x, sigma)
    expected = x + (after - sigma) * (d + slope(x + (after - sigma) * d, after)) / 2
    t, s = sigma_to_time(sigma, SD), sigma_to_time(after, SD)
    found = heun_step(teacher, t.cos() * x, t, s, SD) / s.cos()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


class Bent(torch.nn.Module):
    """The true generator, moved by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.off = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None, s: Tensor) -> Tensor:
        return true_generator(x, t, labels, s) + self.off(x[..., None])[..., 0]


def gradient(noise: NoiseRange) -> float:
    bent = Bent()
    method(noise, bent, distance="l2").turns()[-1].loss(data(64), Draws(0, 64)).value.mean().backward()
    return 0.0 if bent.off.weight.grad is None else float(bent.off.weight.grad.abs())


def test_the_gradient_flows_through_the_target_network(noise: NoiseRange, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad there, as one port had it, the loss has no gradient at all."""
    assert gradient(noise) > 1e-5
    monkeypatch.setattr(CTM, "jump_to_end", torch.no_grad()(CTM.jump_to_end))
    bent = Bent()
    assert not method(noise, bent).turns()[-1].loss(data(8), Draws(0, 8)).value.requires_grad


def test_the_target_has_no_gradient(noise: NoiseRange, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = []
    x_target = CTM.x_target
    monkeypatch.setattr(CTM, "x_target", lambda *arguments: targets.append(x_target(*arguments)) or targets[-1])
    method(noise, Bent(), inner="live").turns()[-1].loss(data(8), Draws(0, 8))
    assert not targets[0].requires_grad


def test_without_a_teacher_the_solver_follows_the_target_network(noise: NoiseRange) -> None:
    """g_sg(x, t, t) of the true generator is the teacher, so nothing changes."""
    assert "teacher" not in CTM.roles_for(CTMConfig(teacher=False))
    distilled = method(noise).turns()[-1].loss(data(16), Draws(0, 16))
    classes = torch.ones(16, 2, dtype=torch.float64)

    def target(x: Tensor, t: Tensor, labels: Tensor, s: Tensor) -> Tensor:
        assert labels is classes
        return true_generator(x, t, labels, s)

    method_alone = CTM(CTMConfig(teacher=False, **ALONE), {"generator": true_generator, "target": target}, noise)
    free = method_alone.turns()[-1].loss(data(16)._replace(labels=classes), Draws(0, 16))
    torch.testing.assert_close(free.value, distilled.value, rtol=1e-9, atol=1e-12)


def test_the_denoising_loss_teaches_the_denoiser(noise: NoiseRange) -> None:
    """It is EDM's weighted |D - x0|^2, and least for the teacher."""
    batch = data(4000)

    def score(F: Callable[..., Tensor], **options: object) -> Tensor:
        return method(noise, F, dsm=1.0, **options).denoising_loss(batch, Draws(0, 4000))

    best = score(true_generator).mean()
    for factor in (0.9, 1.1):
        assert score(lambda x, t, labels, s, f=factor: f * teacher(x, t)).mean() > best
    seen: list[Tensor] = []
    plain = score(lambda x, t, labels, s: (seen.append(t), teacher(x, t))[1], dsm_weight="none")
    sigma = SD * seen[0].tan()
    weighted = plain * (sigma**2 + SD**2) / (SD * sigma) ** 2
    torch.testing.assert_close(weighted, score(true_generator), rtol=1e-9, atol=1e-12)


def test_balanced_losses_have_equal_gradients_in_the_last_layer(
    tiny_networks: Make, tiny_batch: Make, noise: NoiseRange
) -> None:
    networks = tiny_networks(CTM)
    ctm_method, last = CTM(CTMConfig(), networks, noise), networks["generator"].out.weight
    turn = ctm_method.turns()[-1]
    preview = turn.preview(tiny_batch(), Draws(0, 6))
    assert set(preview.means) == {"ctm", "dsm", "gan"}
    for name, loss in turn.loss.__self__.terms(tiny_batch(), Draws(0, 6)).losses.items():
        (expected,) = torch.autograd.grad(loss.mean(), last, retain_graph=True)
        torch.testing.assert_close(preview.means[name], expected.flatten(), rtol=1e-9, atol=1e-12)
        if name != "ctm":
            ratio = preview.means["ctm"].norm() / (expected.norm() + 1e-4)
            assert gradient_balance(preview.means, name, "ctm") == pytest.approx(
                float(ratio.clamp(0.01 if name == "gan" else 0, 10))
            )
    huge, none = {"ctm": torch.ones(2) * 1e9, "gan": torch.ones(2)}, {"ctm": torch.ones(2), "dsm": torch.zeros(2)}
    assert gradient_balance(huge, "gan", "ctm") == 10
    assert gradient_balance(none, "dsm", "ctm") == 1e4


def test_what_is_judged_is_what_is_compared(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    """x_est, in the discriminator's turn too.  The solver's way is gone once a turn, though terms are seen twice."""
    networks, calls = tiny_networks(CTM), []
    networks["teacher"].register_forward_hook(lambda *call: calls.append(call))
    ctm_method = CTM(CTMConfig(), networks, noise)
    fake, t = ctm_method.fake(tiny_batch(), Draws(0, 6))
    assert not calls
    turn = ctm_method.turns()[-1]
    preview = turn.preview(tiny_batch(), Draws(0, 6))
    count = len(calls)
    loss = turn.loss(tiny_batch(), Draws(0, 6), preview)
    assert count == len(calls) > 0
    torch.testing.assert_close(loss.generated, fake.detach())
    assert torch.equal(loss.t, t)


def test_the_gan_is_off_during_its_warmup(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    config = CTMConfig(gan_warmup_images=100)
    ctm_method = CTM(config, tiny_networks(CTM, gan_warmup_images=100), noise)
    assert [turn.begins for turn in ctm_method.turns()] == [100, 0]
    for images, expected in ((99, False), (100, True)):
        batch = tiny_batch()._replace(images=images)
        assert ("gan" in ctm_method.turns()[1].whole(batch, Draws(0, 6)).signals) == expected


def test_roles_by_option() -> None:
    assert set(CTM.roles_for(CTMConfig(gan=0.0, mu=0.5))) == {"teacher", "generator", "target"}
    assert CTM.roles_for(CTMConfig(mu=0.5))["target"].ema_of == ("generator", 0.5)
    with pytest.raises(ValueError, match="lpips = FILE go together"):
        CTMConfig(distance="lpips")
