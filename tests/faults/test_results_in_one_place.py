"""What eval --save keeps is what reports, cards and inspect show."""

import json
from pathlib import Path

import pytest
from commands import call
from tiny_generator import tiny_generator

from edmdistill.evaluation.results import load_results
from edmdistill.recipes.library import load_recipe


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path, recipe = tmp_path / "run", load_recipe("cosim/digits-quickstart")
    tiny_generator(path / "generator", method="cosim", recipe_hash=recipe.hash, images_seen=896)
    (path / "recipe.resolved.json").write_bytes(recipe.to_json())
    (path / "recipe.toml").write_text("# Trained by --recipe cosim/digits-quickstart\n")
    data = {"name": "digits", "images": 1500, "resolution": 8, "channels": 1, "classes": 10}
    (path / "run.json").write_text(json.dumps({"data": data}))
    return path


def test_report_sees_what_eval_and_sweep_save(run: Path) -> None:
    for command, nfe in (("eval", "1"), ("sweep", "2")):
        words = ["--protocol", "digits", "--nfe", nfe, "--n", 4, "--device", "cpu", "--save"]
        assert call(command, run, *words).exit_code == 0
    assert len(load_results(run)) == 2
    assert call("report", run).exit_code == 0
    page = (run / "report.html").read_text()
    assert "digits-FD@4" in page
    assert "Quality by number of evaluations</h2><p>Nothing is measured yet" not in page


def test_results_saved_with_the_checkpoint_alone_are_seen_too(run: Path) -> None:
    words = ["--protocol", "digits", "--nfe", "1", "--n", 4, "--device", "cpu", "--save"]
    assert call("eval", run / "generator", *words).exit_code == 0
    assert not (run / "eval").exists()
    assert len(load_results(run)) == len(load_results(run / "generator")) == 1


def test_the_protocols_are_named() -> None:
    for words in (("eval", "x"), ("eval", "x", "--protocol", "digit"), ("sweep", "x", "--nfe", "1")):
        result = call(*words)
        assert result.exit_code == 2
        assert "digits" in result.stderr


def test_n_of_images_takes_the_first(run: Path, tmp_path: Path) -> None:
    assert call("sample", run, "--nfe", 1, "--seeds", "0-3", "--device", "cpu", "--out", tmp_path / "a").exit_code == 0
    result = call("eval", tmp_path / "a", "--protocol", "digits", "--n", "2")
    assert result.exit_code == 0, result.output
    assert "fd_digits@2" in result.stdout


def test_sweep_takes_the_options_of_eval(run: Path) -> None:
    names = {}
    for command in ("eval", "sweep", "sample"):
        help_text = call(command, "--help").stdout
        names[command] = {word.strip(",") for word in help_text.split() if word.startswith("--")}
    shared = {"--seeds", "--guidance", "--guide", "--solver", "--t", "--force-guidance", "--weights"}
    assert all(shared <= own for own in names.values())
    assert "--save" in names["sweep"]
    words = ["--protocol", "digits", "--nfe", "2", "--seeds", "5-8", "--t", "80,3", "--device", "cpu", "--json"]
    swept = json.loads(call("sweep", run, *words).stdout)
    assert swept == json.loads(call("eval", run, *words).stdout)
    assert swept["results"][0]["protocol"]["seeds"] == "5-8"


def test_inspect_shows_a_table(run: Path) -> None:
    words = ["--protocol", "digits", "--nfe", "1,2", "--n", 4, "--device", "cpu", "--save"]
    assert call("eval", run, *words).exit_code == 0
    text = call("inspect", run / "generator").stdout
    assert "{" not in text
    rows = [line.split() for line in text.splitlines() if line.startswith("digits ")]
    assert [(row[1], row[4]) for row in rows] == [
        (nfe, metric) for nfe in "12" for metric in ("fd_digits@4", "class_accuracy@4")
    ]


def test_inspect_survives_results_of_any_type(run: Path) -> None:
    path = run / "generator" / "config.json"
    document = json.loads(path.read_text())
    document["results"] = [1, {"metrics": 2}, {"metrics": {"a\x1b": [1]}, "sampler": "x"}]
    path.write_text(json.dumps(document))
    result = call("inspect", run / "generator")
    assert result.exit_code in (0, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "\x1b" not in result.output


SOUND = {
    "metrics": {"fd_digits@4": 1.0},
    "protocol": {"name": "digits", "metrics": ["fd_digits"], "features": "digits"},
    "protocol_sha256": "0" * 64,
    "sampler": None,
    "provenance": {"source": "it"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": "1"},
        {"metrics": {}},
        {"provenance": {"recipe_hash": {}}},
        {"provenance": {"images_seen": "1"}},
        {"provenance": {"source_sha256": []}},
        {"repetitions": [{"fd_digits@4": 1.0}]},
        {"repetitions": [{"fd_digits@4": 1.0}, {"fid": 2.0}]},
    ],
    ids=str,
)
def test_what_is_stored_and_no_result_is_refused_until_it_is_measured_again(
    run: Path, change: dict[str, object]
) -> None:
    """The error says to measure again, which then has to work: it may be what an earlier version wrote."""
    path = run / "generator" / "config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"results": [SOUND, SOUND | change]}))
    for words in (("report", run), ("compare", run), ("push-to-hub", run, "me/it", "--dry-run", "--licence", "mit")):
        refused = call(*words)
        assert refused.exit_code == 2
        assert "measure it again by edmdistill eval --save" in refused.stderr
    again = call("eval", run, "--protocol", "digits", "--nfe", 1, "--n", 4, "--device", "cpu", "--save")
    assert again.exit_code == 0, again.output
    assert [result.protocol.n for result in load_results(run / "generator")] == [50000, 4]
    (run / "eval" / "mine.json").write_text(json.dumps(SOUND | change))
    refused = call("report", run)
    assert refused.exit_code == 2
    assert "mine.json holds no results" in refused.stderr
    assert "remove it" in refused.stderr
