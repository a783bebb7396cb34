"""CTM's jumps on a grid: their order in time, their points, and the rows that own them."""

from typing import Any

import torch

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.ctm import CTM, CTMConfig, Jump


def draw_jump(x0: torch.Tensor, draws: Draws, **options: Any) -> tuple[Jump, torch.Tensor]:
    """The jump, and the times of the grid."""
    config = CTMConfig(**{"N": 9, "max_steps": 4, "one_step_share": 0.2} | options, gan=0.0)
    method = CTM(config, {"generator": None, "target": None}, NoiseRange(0.5, 0.002, 80.0))
    return method.draw_jump(Batch(x0, None), draws), method.times.on(x0.device)


def test_u_lies_between_s_and_t() -> None:
    jump, times = draw_jump(torch.zeros(500, 1, 1, 1), Draws(0, 500))
    assert bool(((jump.s <= jump.u) & (jump.u < jump.t)).all())
    assert torch.equal(jump.t, times[jump.start])
    assert torch.equal(jump.u, times[jump.stop])
    assert int((jump.stop - jump.start).max()) <= jump.steps


def test_the_whole_jump_with_as_many_solver_steps_as_are_allowed() -> None:
    options = {"sampling": "paper", "matching": "global", "one_step_share": 1.0}
    jump, times = draw_jump(torch.zeros(50, 1, 1, 1), Draws(0, 50), **options)
    for found, index in ((jump.t, 0), (jump.u, 4), (jump.s, 8)):
        assert torch.equal(found, times[index].expand(50))
    assert jump.steps == 4


def test_x_t_is_on_the_circle() -> None:
    """With no data, x_t / sin(t) is noise of standard deviation sigma_data."""
    jump, _ = draw_jump(torch.zeros(500, 1, 8, 8, dtype=torch.float64), Draws(0, 500))
    z = jump.x_t / jump.t.sin()[:, None, None, None]
    assert abs(float(z.std()) - 0.5) < 0.01
    assert abs(float(z.mean())) < 0.01


def test_a_jump_belongs_to_its_row() -> None:
    x0 = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    (whole, _), (part, _) = draw_jump(x0, Draws(3, 8)), draw_jump(x0[2:5], Draws(3, 8, slice(2, 5)))
    assert torch.equal(part.start, whole.start[2:5])
    assert torch.equal(part.stop, whole.stop[2:5])
    torch.testing.assert_close(part.x_t, whole.x_t[2:5])
