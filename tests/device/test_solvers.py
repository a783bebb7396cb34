"""Every sampler on the emulated GPU gives the CPU's images and synchronizes once a batch."""

import json
from pathlib import Path
from typing import Any

import pytest
from forks import Forked

SCRIPT = Path(__file__).parent / "solvers.py"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "heun": ("teacher", "edm", {"nfe": 5}),
    "heun with churn": ("teacher", "edm", {"nfe": 7, "churn": [4.0, 0.05, 50.0, 1.003]}),
    "heun of iDDPM": ("teacher", "iddpm", {"nfe": 7, "churn": [4.0, 0.05, 50.0, 1.003]}),
    "ddim": ("teacher", "vp", {"solver": "ddim", "nfe": 4}),
    "dpm-solver-2s": ("teacher", "ve", {"solver": "dpm-solver-2s", "nfe": 7}),
    "dpm-solver++2m": ("teacher", "consistency", {"solver": "dpm-solver++2m", "nfe": 4}),
    "ipndm": ("teacher", "edm", {"solver": "ipndm", "nfe": 5}),
    "unipc": ("teacher", "edm", {"solver": "unipc", "nfe": 5}),
    "guidance": ("teacher", "edm", {"nfe": 5, "guidance": 2.0, "force_guidance": True}),
    "gamma": ("generator", "edm", {"nfe": 4, "gamma": 0.5}),
    "guided generator": ("guided", "edm", {"nfe": 2, "guidance": 2.0}),
    "generator as a teacher": ("generator", "edm", {"nfe": 5, "solver": "heun"}),
}


def check(*names: str) -> None:
    status, said = Forked(SCRIPT, json.dumps([CASES[name] for name in names])).finish()
    assert status == 0, said
    for found in json.loads(said.splitlines()[-1]):
        assert [(where.rpartition(":")[0], count) for where, count in found["waits"].items()] == [
            ("copy down sampling/generate.py", 1)
        ]
        assert found["distance"] < 1e-4
        assert found["kernels"] > 100


def test_heun_waits_for_its_images_alone() -> None:
    check("heun")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_batch_waits_for_its_images_alone(name: str) -> None:
    check(name)


def test_dropout_without_draws_waits_for_nothing() -> None:
    status, said = Forked(SCRIPT, "[[]]").finish()
    assert status == 0, said
    (found,) = json.loads(said.splitlines()[-1])
    assert found["waits"] == {}
    assert found["distance"] < 1e-4
