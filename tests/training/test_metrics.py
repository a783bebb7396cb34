import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.methods.base import Batch, Loss
from edmdistill.training import metrics
from edmdistill.training.metrics import BINS, EDGES, IntervalMeans, RowMeans
from edmdistill.trigflow import sigma_to_time


def losses(rows: int, seed: int = 0) -> tuple[Loss, Batch]:
    rng = torch.Generator().manual_seed(seed)
    sigma = (3 * torch.randn(rows, generator=rng, dtype=torch.float64)).exp()
    value, signal = torch.rand(2, rows, generator=rng, dtype=torch.float64)
    images = torch.randn(2, rows, 3, 4, 4, generator=rng)
    loss = Loss(value, (sigma / 0.5).atan(), {"signal": signal.mean()}, images[0])
    return loss, Batch(images[1], None)


def tallied(*parts: tuple[Loss, Batch]) -> dict[str, float]:
    tally = RowMeans()
    for loss, batch in parts:
        tally.add_loss("generator", loss, batch, 0.5)
    return tally.means()


@given(rows=st.integers(2, 40), cut=st.floats(0, 1))
def test_a_batch_is_the_sum_of_its_pieces(rows: int, cut: float) -> None:
    """But for `diversity` and a method's signals, which a piece has of its own."""
    loss, batch = losses(rows)
    at = min(max(round(cut * rows), 1), rows - 1)
    pieces = []
    for piece in slice(None, at), slice(at, None):
        part = Loss(loss.value[piece], loss.t[piece], {}, loss.generated[piece])
        pieces.append((part, Batch(batch.x0[piece], None)))
    whole = tallied((loss._replace(signals={}), batch))
    for name, mean in tallied(*pieces).items():
        if name != "diversity":
            assert mean == pytest.approx(whole[name], rel=1e-6, abs=1e-6), name


def test_means_are_what_they_say() -> None:
    (loss, batch), sigma = losses(500), 0.5 * losses(500)[0].t.tan()
    means = tallied((loss, batch))
    assert means["loss/generator"] == pytest.approx(loss.value.mean().item())
    assert means["signal"] == pytest.approx(loss.signals["signal"].item())
    total = 0.0
    for name, low, high in zip(BINS, (0, *EDGES), (*EDGES, math.inf), strict=True):
        inside = loss.value[(low <= sigma) & (sigma < high)]
        total += means[f"loss/generator/{name}"] * len(inside)
        assert means[f"loss/generator/{name}"] == pytest.approx(inside.mean().item())
    assert total / 500 == pytest.approx(means["loss/generator"])
    for what, images in (("generated", loss.generated), ("data", batch.x0)):
        for channel in range(3):
            assert means[f"{what}/mean/{channel}"] == pytest.approx(images[:, channel].mean().item(), abs=1e-6)
            spread = images[:, channel].std(correction=0).item()
            assert means[f"{what}/std/{channel}"] == pytest.approx(spread, rel=1e-5)
    expected = loss.generated.var(0).mean() / batch.x0.var(0).mean()
    assert means["diversity"] == pytest.approx(expected.item(), rel=1e-5)
    assert "generated/square/0" not in means


def test_an_edge_belongs_to_the_bin_above() -> None:
    t = sigma_to_time(torch.tensor(EDGES, dtype=torch.float64), 0.5)
    means = tallied((Loss(torch.arange(1.0, 1 + len(EDGES)), t), Batch(torch.zeros(len(EDGES), 1, 2, 2), None)))
    assert {name: mean for name, mean in means.items() if "sigma" in name} == {
        f"loss/generator/{name}": value for value, name in enumerate(BINS[1:], 1)
    }


@pytest.mark.parametrize("rows", [1, 2])
def test_processes_of_any_share_measure_the_same_names(rows: int) -> None:
    """Of a batch of 3, one process has one row: their sums are added up by position."""
    shapes = []

    def reduce(sums):
        shapes.append(sums.shape)
        return sums

    for count in (rows, 3):
        loss, batch = losses(count)
        tally = RowMeans()
        tally.add_loss("generator", loss, batch, 0.5)
        means = tally.means(reduce)
        assert ("diversity" in means) == (count > 1)
        assert all(map(math.isfinite, means.values()))
    assert shapes[0] == shapes[1]


def test_one_image_for_all_has_no_diversity() -> None:
    loss, batch = losses(8)
    means = tallied((loss._replace(generated=loss.generated[:1].expand(8, -1, -1, -1)), batch))
    assert means["diversity"] == pytest.approx(0, abs=1e-6)


def test_processes_are_summed_and_empty_bins_left_out() -> None:
    loss = Loss(torch.ones(4), torch.full((4,), 0.5))
    tally = RowMeans()
    tally.add_loss("teacher", loss, Batch(torch.zeros(4, 1, 2, 2), None), 0.5)
    seen = []

    def reduce(sums):
        seen.append(sums)
        return 2 * sums

    assert tally.means(reduce) == {"loss/teacher": 1.0, "loss/teacher/sigma<0.8": 1.0}
    assert len(seen) == 1


def test_means_over_the_rounds_since_the_last_line() -> None:
    window = IntervalMeans()
    for value in 1.0, 3.0:
        window.add({"loss/generator": value})
    window.add({"loss/generator": 5.0, "rare": 7.0})
    line = window.line(96, 32)
    assert line["images"] == 96
    assert line["step"] == 3
    assert line["loss/generator"] == 3
    assert line["rare"] == 7
    assert window.line(96, 32) == line
    window.begin()
    window.add({"loss/generator": 8.0})
    assert window.line(128, 32)["loss/generator"] == 8


def test_speed_and_time_are_those_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time since the run began, and images a second since the last line."""
    clock = iter((10.0, 12.0, 15.0, 16.0, 20.0))
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    window = IntervalMeans()
    window.add({})
    window.add({})
    assert window.line(64, 32) == {"images": 64, "step": 2, "seconds": 5.0, "images_per_second": 12.8}
    window.begin()
    window.add({})
    assert window.line(96, 32) == {"images": 96, "step": 3, "seconds": 6.0, "images_per_second": 32.0}
    window.begin()
    window.add({})
    assert window.line(128, 32) == {"images": 128, "step": 4, "seconds": 10.0, "images_per_second": 8.0}


def test_a_window_goes_on_from_its_progress() -> None:
    whole, first = IntervalMeans(), IntervalMeans()
    for window in whole, first:
        window.add({"a": 0.1})
        window.add({"a": 0.2, "b": 1.0})
    second = IntervalMeans(first.progress())
    for window in whole, second:
        window.add({"a": 0.7})
    one, two = whole.line(3, 1), second.line(3, 1)
    assert one["a"] == two["a"]
    assert one["b"] == two["b"] == 1


def test_progress_stays_as_it_was() -> None:
    """On a GPU a state is written while further rounds are added: it must not have their numbers."""
    window = IntervalMeans()
    for first in ({}, {"a": 1.0}):
        window.add(first)
        progress = window.progress()
        window.add({"a": 2.0, "b": 3.0})
        assert (progress.sums, progress.counts) == (first, dict.fromkeys(first, 1))
        window.begin()
