"""Jumps on a grid: their order in time, their points, and the rows that own them."""

from types import SimpleNamespace

import torch

from edmdistill.draws import Draws
from edmdistill.methods.jumps import draw_jump

TIMES = torch.linspace(1.5, 0.01, 9, dtype=torch.float64)
OPTIONS = SimpleNamespace(max_steps=4, sampling="official", matching="soft", one_step_share=0.2)


def test_u_lies_between_s_and_t() -> None:
    jump = draw_jump(torch.zeros(500, 1, 1, 1), TIMES, Draws(0, 500), 0.5, OPTIONS)
    assert bool(((jump.s <= jump.u) & (jump.u < jump.t)).all())
    assert torch.equal(jump.t, TIMES[jump.start])
    assert torch.equal(jump.u, TIMES[jump.stop])
    assert int((jump.stop - jump.start).max()) <= jump.steps


def test_the_whole_jump_with_as_many_solver_steps_as_are_allowed() -> None:
    options = SimpleNamespace(max_steps=4, sampling="paper", matching="global", one_step_share=1.0)
    jump = draw_jump(torch.zeros(50, 1, 1, 1), TIMES, Draws(0, 50), 0.5, options)
    for found, index in ((jump.t, 0), (jump.u, 4), (jump.s, 8)):
        assert torch.equal(found, TIMES[index].expand(50))
    assert jump.steps == 4


def test_x_t_is_on_the_circle() -> None:
    """With no data, x_t / sin(t) is noise of standard deviation sigma_data."""
    jump = draw_jump(torch.zeros(500, 1, 8, 8, dtype=torch.float64), TIMES, Draws(0, 500), 0.5, OPTIONS)
    z = jump.x_t / jump.t.sin()[:, None, None, None]
    assert abs(float(z.std()) - 0.5) < 0.01
    assert abs(float(z.mean())) < 0.01


def test_a_jump_belongs_to_its_row() -> None:
    x0 = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    whole = draw_jump(x0, TIMES, Draws(3, 8), 0.5, OPTIONS)
    part = draw_jump(x0[2:5], TIMES, Draws(3, 8, slice(2, 5)), 0.5, OPTIONS)
    assert torch.equal(part.start, whole.start[2:5])
    assert torch.equal(part.stop, whole.stop[2:5])
    torch.testing.assert_close(part.x_t, whole.x_t[2:5])
