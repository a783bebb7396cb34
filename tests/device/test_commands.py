"""Every command that has --device says on the emulated GPU what it says on the CPU."""

import json
import re
from pathlib import Path

import pytest
from forks import Forked

SCRIPT = Path(__file__).parent / "commands.py"
DIGITS = ["--protocol", "digits", "--n", "20"]
METRICS = "fd_digits,kd_digits,precision,recall,density,coverage"
NLL = ["--metrics", "nll", "--ref", "digits", "--n", "2", "--probes", "1", "--tolerance", ".1", "--json"]
REFERENCE = ["--seeds", "0-1", "--reference", "picture.png", "--correctors", "1", "--out", "OUT.npz"]
COMMANDS: dict[str, list[str]] = {
    "sample": ["sample", "GENERATOR", "--nfe", "2", "--seeds", "0-3", "--out", "OUT.npz"],
    "in half precision": ["sample", "TEACHER", "--nfe", "3", "--seeds", "0", "--dtype", "float16", "--out", "OUT.npz"],
    "guided": [
        *["sample", "TEACHER", "--nfe", "3", "--seeds", "0-1", "--guidance", "2", "--guide", "GUIDE"],
        *["--out", "OUT.npz"],
    ],
    "rejection": [
        *["sample", "GENERATOR", "--nfe", "1", "--seeds", "0-3", "--reject", ".5", "--classifier", "digits"],
        *["--out", "OUT.npz"],
    ],
    "a reference": ["sample", "TEACHER", "--feature-net", "gray", *REFERENCE],
    "a generator and a reference": [
        "sample",
        "GENERATOR",
        "--feature-net",
        "identity",
        "--score",
        "TEACHER",
        *REFERENCE,
    ],
    "eval": ["eval", "GENERATOR", "--nfe", "1", "--metrics", METRICS, "--repeat", "2", *DIGITS, "--json"],
    "likelihood": ["eval", "TEACHER", *NLL],
    "loss": ["loss", "TEACHER", "--data", "digits", "--images", "30", "--json"],
    "sweep": ["sweep", "GENERATOR", "--nfe", "1,2", "--gamma", "0,1", *DIGITS, "--json"],
    "tune-schedule": [
        *["tune-schedule", "GENERATOR", "--nfe", "2", "--sets", "2", "--budget", "200", "--dry-run", *DIGITS, "--json"],
    ],
    "diagnose": ["diagnose", "GENERATOR", "--teacher", "TEACHER", *DIGITS, "--json"],
    "data stats": ["data", "stats", "digits", "OUT.npz", "--features", "digits", "--keep-features", "20"],
}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")


@pytest.mark.slow
def test_commands_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path / "cache"))
    status, said = Forked(SCRIPT, json.dumps([*COMMANDS.values()])).finish()
    assert status == 0, said
    for name, (host, device) in zip(COMMANDS, json.loads(said.splitlines()[-1]), strict=True):
        here, there = (text.replace("emulated-", "cpu-").replace('"emulated"', '"cpu"') for text in (host, device))
        assert NUMBER.sub("", here) == NUMBER.sub("", there), name
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (here, there)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-3, abs=1e-3), name
