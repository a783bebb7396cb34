"""An option that would do nothing beside the others is refused: one sentence, exit code 2, and nothing is written."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_generator import tiny_generator

from edmdistill.cli import main

TEACHER = "digits"
TRAIN = "train cosim digits --data digits --recipe cosim/digits-quickstart --run-dir out --device cpu --dry-run"
DIFFUSION = f"{TRAIN.replace('cosim digits', 'diffusion').replace('cosim/digits-quickstart', 'diffusion/digits')} --set"
SCT = "train sct --data digits --recipe sct/digits --run-dir out --device cpu --dry-run"
SAMPLE = "sample digits --out out --device cpu"
EMPTY_ENTRIES = (
    f"{SAMPLE} --seeds 0,",
    f"{SAMPLE} --t 80,,1",
    f"{TRAIN} --stop-on ,collapse",
    "eval digits --protocol digits --metrics fd_digits,",
    "sweep digits --protocol digits --nfe 1,,2",
    "sweep digits --protocol digits --nfe 1 --gamma 0,",
    "data stats digits a.npz --features digits,",
    "plan cosim/digits digits --offload ema,",
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{SAMPLE} --churn-min 1", "need churn, which is 0: raise it, or leave them out"),
        (f"{SAMPLE} --churn-noise 1.01", "need churn, which is 0"),
        (f"{SAMPLE} --nfe 5 --t 80", "1 noise level cannot make 5 network evaluations, but 1: leave out one"),
        (
            f"{SAMPLE} --reject 0.5 --classifier digits --seeds 4294967295 --class 1",
            "rejection needs 1 seed after 4294967295, but seeds end at 4294967295: use lower seeds",
        ),
        (f"{SAMPLE} --nfe five", "'five' is not a valid whole number."),
        (f"{SAMPLE} --class -1", "there is no class '-1'; classes run from 0 to 9"),
        (f"{TRAIN} --force-guidance", "--force-guidance has no effect: in this recipe of cosim"),
        (f"{TRAIN} --stop-on quality", "--stop-on quality needs a metric over training: add [evaluation]"),
        ("convert digits out --no-double-norm", "need --time-embedding positional"),
        ("convert digits out --double-norm", "need --time-embedding positional"),
        ("convert digits out --generator sid --parity quick", "--parity are for teachers, not for --generator"),
        ("inspect digits --classes --tensors", "--classes prints only the classes: leave out"),
        ("fetch list --verify", "`fetch list` downloads nothing"),
        ("fetch list inception", "`fetch list` downloads nothing"),
        ("plan cosim/digits digits --network edm2-img512-s", "TEACHER and --network both give the teacher's shape"),
        ("plan cosim/digits digits --data digits", "leave it out"),
        ("plan cosim/digits digits --shard", "--shard needs several processes: add --processes N."),
        ("loss digits --data digits --images 1501 --device cpu", "digits has 1,500 images, fewer than the 1,501 asked"),
        ("eval digits --protocol digits --metrics nll,fid --n 4", "nll is measured alone"),
        (f"{TRAIN} --micro-batch none", "--micro-batch none is not a number of images: use a number, or auto"),
        (f"{TRAIN} --stop-on foo", "'foo' is not known; choose one of collapse, saturation, runaway, quality, nan"),
        *((words, "has an empty entry: write one comma between two entries, and none at") for words in EMPTY_ENTRIES),
        (
            f"{DIFFUSION} training.seed=1 --offload ema,teacher",
            "diffusion trains all of its networks; leave teacher out",
        ),
        ("plan sct/digits digits --offload teacher", "--offload teacher has no effect: sct trains all of its networks"),
        (
            f"{DIFFUSION} training.seed=1 --stop-on nan,saturation",
            "--stop-on saturation has no effect: it watches gener",
        ),
        (f"{SCT} --fit 1GB", "train sct TEACHER ..., or let the recipe make its network, by a table [network]"),
        (f"{TRAIN} --fit 12", "'12' is not an amount of memory: write auto, or as in 48GB or 44.5GiB."),
        ("sample digits --out a.npz --latents --device cpu", "because the network works on pixels: leave it out"),
        ("sweep a.npz --protocol digits --nfe 1", "a sweep samples a network, and a.npz is images: measure them with"),
        ("data prepare nowhere a.zip", "nowhere does not exist; give a folder, a zip or a tar of pictures"),
        ("data prepare nowhere a.zip --split tset", "did you mean 'test'?"),
        (
            f"{DIFFUSION} network.arguments.num_blocks=999",
            "no edm2 network: num_blocks must be at most 64: change the recipe's table [net",
        ),
        (f"{DIFFUSION} network.arguments.model_channels=100000", "of this machine: make it smaller"),
        ("eval digits --protocol digits --seeds 0,5 --repeat 2", "seeds 0,5 cannot be repeated: consecutive ones can"),
        ("eval digits --protocol digits --seeds 0-5 --n 2", "so it cannot be combined with --seeds."),
        ("data stats digits a.npz --features pixels --weights digits=a", "add it there, or leave --weights out."),
        ("compare nowhere.json --csv --json", "--csv and --json exclude each other"),
        ("compare nowhere.json", "nowhere.json holds no results (it does not exist)"),
        ("sweep digits", "Missing option '--protocol'. Choose one of digits, tiles,"),
        ("train", "Missing argument 'METHOD'. Choose one of diffusion, cosim,"),
        ("train cosym", "Invalid value for 'METHOD': 'cosym' is not known; did you mean 'cosim'?"),
    ],
)
def test_refused(words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert sum("Error: " in line for line in result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_other_samples_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    words = ["sample", TEACHER, "--out", str(tmp_path / "out"), "--seeds", "0", "--device", "cpu", "--nfe"]
    result = CliRunner().invoke(main, [*words, "1"])
    assert result.exit_code == 0
    assert "out: 1 image\n" in result.stderr
    result = CliRunner().invoke(main, [*words, "3"])
    assert "holds other samples (nfe 1 there, 3 now): choose another path" in result.stderr


def test_other_noise_levels_are_shown_as_they_are_given(tmp_path: Path) -> None:
    """Not as they come back from the circle, where 80 is 80.00000000000027."""
    generator = str(tiny_generator(tmp_path / "tiny"))
    words = ["sample", generator, "--out", str(tmp_path / "out"), "--seeds", "0", "--device", "cpu", "--t"]
    assert CliRunner().invoke(main, [*words, "80,5"]).exit_code == 0
    for levels, said in {"80,2.5": "80, 2.5", "80,5.000001": None}.items():
        result = CliRunner().invoke(main, [*words, levels])
        differs = "sigmas differs beyond 6 digits" if said is None else f"sigmas [80, 5] there, [{said}] now"
        assert f"out holds other samples ({differs}): choose another path" in result.stderr
