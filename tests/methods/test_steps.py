"""Generators of certain steps: the levels at which they are trained, are sampled, and what of them is logged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.errors import EdmDistillError
from edmdistill.methods import METHODS
from edmdistill.methods.base import NoiseRange
from edmdistill.trigflow import denoised

ROWS = 60
CASES: dict[str, dict[str, Any]] = {
    "sid": {"sigma_init": 1.5},
    "sida": {"sigma_init": 1.5},
    "vsd": {},
    "dmd2": {"levels": (2.5, 0.4)},
    "dmd2, from data": {"levels": (2.5, 0.4), "backward_simulation": False},
    "ladd": {"levels": (2.5, 0.4)},
    "kd": {"levels": (2.5, 0.4), "trajectory_steps": 4},
    "pd": {"steps": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_a_generator_learns_at_the_levels_of_its_schedule(
    name: str, tiny_networks: Callable[..., Any], tiny_batch: Callable[..., Any], noise: NoiseRange
) -> None:
    """At all of them and no other; the first input is noise alone; its last images are those that are logged."""
    kind, options = METHODS[name.partition(",")[0]].load(), CASES[name]
    networks, config, batch = tiny_networks(kind, **options), kind.Config(**options), tiny_batch(ROWS)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def generator(x_t: Tensor, t: Tensor, labels: Tensor, **asked: Any) -> Any:
        out = networks["generator"](x_t, t, labels, **asked)
        calls.append((x_t, t, denoised(x_t, out[0] if asked else out, t, noise.sigma_data)))
        return out

    levels = kind.schedule(config, noise)
    assert kind.sampling(config).steps == len(levels)
    for turn in kind(config, networks | {"generator": generator}, noise).turns()[-2:]:
        calls.clear()
        for seed in range(4 if turn.role == "generator" else 1):  # so that each step of a whole batch is drawn
            loss = turn.whole(batch, Draws(seed, ROWS))
        x_t, t = (torch.cat(part) for part in list(zip(*calls, strict=True))[:2])
        sigma = noise.sigma_data * t.tan()
        assert sorted({round(level, 4) for level in sigma.tolist()}, reverse=True) == [
            round(level, 4) for level in levels
        ]
        z = (x_t / t.sin()[:, None, None, None])[sigma > levels[0] * 0.99]
        assert float(z.std()) == pytest.approx(noise.sigma_data, rel=0.1)
        if turn.role == "generator":
            torch.testing.assert_close(loss.generated, calls[-1][2].detach()[-ROWS:], rtol=0, atol=0)
            assert not loss.generated.requires_grad


@pytest.mark.parametrize("name", ["dmd2", "ladd", "kd"])
def test_a_later_step_from_the_first_level_is_refused(name: str, noise: NoiseRange) -> None:
    """As of one who names the levels of all steps."""
    kind = METHODS[name].load()
    assert kind.schedule(kind.Config(levels=(79.0, 1.0)), noise) == (80, 79, 1)
    with pytest.raises(
        EdmDistillError, match=r"levels = \[80.0, 1.0\] begins at 80, where the first step starts: .* out"
    ):
        kind.schedule(kind.Config(levels=(80.0, 1.0)), noise)
