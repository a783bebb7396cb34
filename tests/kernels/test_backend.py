"""Which implementation is selected, where, and for how long."""

import os

import pytest
import torch

from edmdistill.errors import EdmDistillError
from edmdistill.kernels.backend import VARIABLE, kernels, selected, uses_triton


def test_a_context_selects_and_leaves_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edmdistill.kernels.backend.find_spec", lambda name: object())
    monkeypatch.delenv(VARIABLE, raising=False)
    assert selected() == "torch"
    with kernels("triton"):
        assert selected() == "triton"
        with kernels("torch"):
            assert selected() == "torch"
        assert selected() == "triton"
    assert VARIABLE not in os.environ
    with pytest.raises(EdmDistillError, match="is cuda: set it to torch or triton, or unset it"), kernels("cuda"):
        pytest.fail("it was entered")
    monkeypatch.setenv(VARIABLE, "")
    assert selected() == "torch"


def test_triton_is_for_gpus_and_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edmdistill.kernels.backend.find_spec", lambda name: object())
    x = torch.ones(2)
    found = []
    for backend in ("torch", "triton"):
        for interpreted in ("0", "1"):
            monkeypatch.setenv("TRITON_INTERPRET", interpreted)
            with kernels(backend):
                found.append(uses_triton(x))
    assert found == [False, False, False, True]
