import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.methods import METHODS
from edmdistill.training import micro_batch
from edmdistill.training.loop import rounds
from edmdistill.training.micro_batch import fewest_micro_batches, fits, settle_micro_batch


@given(first=st.integers(1, 5000), more=st.integers(0, 5000), enough=st.integers(1, 11_000))
def test_the_fewest_micro_batches_are_found_in_few_trials(first: int, more: int, enough: int) -> None:
    tried, most = [], first + more

    def fit(pieces: int) -> bool:
        tried.append(pieces)
        assert first <= pieces <= most
        return pieces >= enough

    assert fewest_micro_batches(fit, first, most) == (max(first, enough) if enough <= most else None)
    assert len(tried) <= (1 if enough <= first else 2 * most.bit_length() + 1)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("more than there is"),
        RuntimeError("GET was unable to find an engine to execute this computation"),  # cuDNN
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_what_does_not_fit_leaves_the_run_as_it_was(start, monkeypatch, error):
    run, other = start("cosim"), start("cosim")
    generator_loss, most = METHODS["cosim"].load().generator_loss, 5

    def hungry(self, batch, draws):
        if len(batch.x0) > most:
            raise error
        return generator_loss(self, batch, draws)

    with monkeypatch.context() as patch:
        patch.setattr(METHODS["cosim"].load(), "generator_loss", hungry)
        assert not fits(run, 6)
        assert fits(run, 5)
        most = 0
        if "find an engine" in str(error):  # of a GPU that cuDNN does not know
            with pytest.raises(RuntimeError, match="find an engine"):
                fits(run, 1)
        else:
            assert not fits(run, 1)
    assert list(rounds(run)) == list(rounds(other))


def test_a_loss_in_pieces_trains_as_the_whole_does(start):
    """Also in micro-batches, of fewer rows than pieces."""
    for size in (None, 2):
        whole, split = (next(rounds(start("cosim", Machine("cpu", size, loss_pieces=n)))) for n in (1, 3))
        assert split.keys() == whole.keys()
        for name in ("loss/generator", "grad_norm/generator", "loss/auxiliary"):
            assert split[name] == pytest.approx(whole[name], rel=1e-4)


def test_micro_batches_hold_whole_groups(start, monkeypatch):
    """IMM's, of two images here: their split changes rounding alone, and `auto` looks for a number of them."""
    whole, split = (next(rounds(start("imm", Machine("cpu", rows)))) for rows in (None, 5))
    for name in ("loss/generator", "grad_norm/generator", "squared_mmd"):
        assert split[name] == pytest.approx(whole[name], rel=1e-4)
    with pytest.raises(TrainingError, match="--micro-batch 1 is too small, because the loss takes images in groups of"):
        start("imm", Machine("cpu", 1))
    run, tried = start("imm"), []
    run.engine.machine = Machine(device="cpu", micro_batch="auto")
    monkeypatch.setattr(run.engine, "check_micro_batches", lambda batch, group: None)
    monkeypatch.setattr(micro_batch, "fits", lambda run, size, headroom: tried.append(size) or size <= 5)
    assert settle_micro_batch(run) == 4
    assert tried == [8, 4]
    monkeypatch.setattr(micro_batch, "fits", lambda run, size, headroom: False)
    run.engine.machine = Machine(device="cpu", micro_batch="auto")
    with pytest.raises(TrainingError, match="not even 2 images fit in GPU memory"):
        settle_micro_batch(run)


def test_only_a_loss_that_can_be_split_is_asked_for_pieces(start):
    with pytest.raises(TrainingError, match="--loss-pieces has no effect: sct has no loss that can be split"):
        start("sct", Machine("cpu", loss_pieces=2))


def test_auto_needs_a_gpu(start):
    run = start("sid")
    assert settle_micro_batch(run) is None
    run.engine.machine = Machine(device="cpu", micro_batch="auto")
    with pytest.raises(TrainingError, match="on the CPU: use a number"):
        settle_micro_batch(run)


@pytest.mark.parametrize("name", ["sid", "imm"])
def test_a_plan_is_tried_on_a_gpu(start, monkeypatch, name):
    """From its size down, because what it leaves out, such as fragments, takes memory."""
    run, most, tried = start(name), 8, []
    monkeypatch.setattr(micro_batch, "fits", lambda run, *asked: tried.append(asked) or asked[0] <= most)
    run.engine.machine = Machine("cpu", 4, planned=True)
    assert settle_micro_batch(run) is None
    assert not tried
    monkeypatch.setattr(micro_batch, "is_gpu", lambda device: True)
    run.engine.machine = Machine("cpu", 4)
    assert settle_micro_batch(run) is None
    assert not tried
    run.engine.machine = Machine("cpu", 4, planned=True)
    assert settle_micro_batch(run) is None
    assert tried == [(4, 0)]
    assert run.engine.machine == Machine("cpu", 4, planned=True)
    run.engine.machine, most = Machine("cpu", 4, planned=True), 2
    assert settle_micro_batch(run) == 2
    assert run.engine.machine == Machine("cpu", 2, planned=True)
    run.engine.machine, most = Machine("cpu", 4, planned=True), 0
    with pytest.raises(TrainingError, match="in GPU memory: give --fit less memory"):
        settle_micro_batch(run)
