import json
import re
import signal
import time

from click.testing import CliRunner
from forks import Forked

from edmdistill import progress
from edmdistill.cli import main
from edmdistill.cli.train import _untrained

SMALL = [
    "network.arguments={model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8}",
    "training.batch=8",
    "training.images=80",
    "training.log_every=8",
    "training.snapshot_every=40",
    "sampling.nfe=[1]",
]


def arguments(run_dir, *more):
    sets = [word for override in SMALL for word in ("--set", override)]
    where = ["--data", "digits", "--recipe", "diffusion/digits", "--run-dir", str(run_dir), "--device", "cpu"]
    return ["train", "diffusion", *where, *sets, *more]


def test_trains_and_says_what_to_type_next(tmp_path):
    result = CliRunner().invoke(main, arguments(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "Training diffusion on digits by recipe diffusion/digits" in result.stderr
    assert f"edmdistill sample {tmp_path / 'run'} --nfe 1" in result.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert names >= {"recipe.toml", "recipe.resolved.json", "metrics.jsonl", "state", "samples", "generator"}
    text = (tmp_path / "run" / "recipe.toml").read_text()
    assert "--recipe diffusion/digits" in text
    assert "--set training.batch=8" in text
    assert "[network]" in text

    again = CliRunner().invoke(main, arguments(tmp_path / "run"))
    assert again.exit_code == 0
    changed = CliRunner().invoke(main, arguments(tmp_path / "run", "--set", "training.lr=0.5"))
    assert changed.exit_code == 2
    assert re.search(r"training\.lr: 0\.01 there, 0\.5 now", changed.stderr)


def test_what_comes_before_the_training_is_shown_if_it_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    result = CliRunner().invoke(main, arguments(tmp_path / "run", "--dry-run"))
    assert result.exit_code == 0, result.output
    assert "starting: reading teacher and data [" in result.stderr


def test_what_is_not_trained_is_said_once_unless_it_never_is():
    idle = {"unused": ["network.logvar_linear.weight", "network.out_gain"]}
    assert _untrained({"generator": idle, "auxiliary": idle}) == {"network.out_gain": ["generator", "auxiliary"]}


def test_a_dry_run_is_one_document_and_leaves_nothing(tmp_path):
    result = CliRunner().invoke(main, arguments(tmp_path / "run", "--dry-run"))
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert plan["recipe"]["training"]["batch"] == 8
    assert plan["roles"]["teacher"]["trained"]
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_the_run_would_say_and_how_it_uses_the_machine(tmp_path):
    """Such as what --fit chooses, on stderr; the document has it too."""
    words = arguments(tmp_path / "run", "--dry-run", "--fit", "1GB", "--second-moment", "bf16", "--workers", "1")
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0
    assert "--fit chooses --second-moment bf16 --micro-batch 8, by plan" in result.stderr
    plan = json.loads(result.stdout)
    chosen = {"processes": 1, "micro_batch": 8, "second_moment": "bf16", "checkpointing": False, "workers": 1}
    assert chosen.items() <= plan.items()


def test_a_missing_teacher_is_one_sentence(tmp_path):
    words = ["train", "cosim", "--data", "digits", "--recipe", "cosim/digits", "--run-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "cosim needs a teacher" in result.stderr


def test_a_guide_is_asked_for_and_a_wrong_one_refused(tmp_path):
    run = tmp_path / "run"
    words = ["train", "dscd", "-", "--data", "digits", "--run-dir", str(run), "--recipe", str(tmp_path / "dscd.toml")]
    training = "images = 8\nbatch = 8\nlr = 1e-3\nlog_every = 8\nsnapshot_every = 8\n"
    recipe = f'[method]\nguidance = [1.0, 2.0]\nguide = "network"\n[training]\n{training}[ema]\nhalf_life_images = 8\n'
    (tmp_path / "dscd.toml").write_text(recipe)
    for more, sentence in (
        ([], "dscd uses another network as guide in this recipe: name it with --guide SOURCE"),
        (["--guide", "x", "--set", "method.guide=classes"], "leave it out, or add --set method.guide=network"),
    ):
        result = CliRunner().invoke(main, [*words, *more])
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert sentence in result.stderr
    assert not run.exists()


def test_interrupted_it_saves_and_the_same_command_goes_on(tmp_path):
    for attempt, number in enumerate([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]):
        process = Forked("-m", "edmdistill", *arguments(tmp_path / "run", "--set", "training.images=400000"))
        seen = saved = len(lines(tmp_path)) if attempt else 0
        while seen < saved + 3:
            assert process.poll() is None, process.said()
            time.sleep(0.05)
            seen = len(lines(tmp_path))
        process.send_signal(number)
        status, said = process.finish()
        assert status == 130, said
        assert "the same command goes on from there" in said
        assert "Traceback" not in said
        assert ("Going on after" in said) == bool(attempt)
    assert [line["images"] for line in lines(tmp_path)] == [8 * (i + 1) for i in range(len(lines(tmp_path)))]


def lines(folder):
    path = folder / "run" / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )
