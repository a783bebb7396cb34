"""Tables of results: who is compared with whom, and by what."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.compare import Row, compare
from edmdistill.evaluation.protocol import PROTOCOLS, Reference
from edmdistill.evaluation.results import Result, read_results, results_json
from edmdistill.evaluation.tables import (
    GeneratorId,
    best_gamma_results,
    markdown_table,
    number,
    result_tables,
    sampler_words,
    sweep_table,
    sweep_tables,
)
from edmdistill.evaluation.training_seeds import over_seeds
from edmdistill.sampling.spec import SamplerRecord

OURS = GeneratorId("ab" * 32, 1000)
DONE = replace(PROTOCOLS["digits"], reference=Reference(source="digits", n=1500, sha256="cd"))


def teacher(nfe: int, fd: float, protocol=DONE, **more: float) -> Result:
    return Result(
        metrics={"fd_digits": fd, **more},
        protocol=protocol,
        protocol_sha256=protocol.sha256(),
        sampler=SamplerRecord(solver="heun", nfe=nfe),
        provenance={"source": "teacher"},
    )


def generator(nfe: int, fd: float, images: int = 1000, **more: float) -> Result:
    return replace(
        teacher(nfe, fd, **more),
        sampler=SamplerRecord(solver="gamma", nfe=nfe, gamma=1.0, sigmas=(80.0, 2.5)[:nfe]),
        provenance={"method": "cosim", "recipe_hash": OURS.recipe_hash, "images_seen": images},
    )


def test_teacher_and_generator_by_nfe():
    (table,) = result_tables([generator(2, 6.0, class_accuracy=0.98), teacher(35, 4.0), teacher(3, 551.0)], OURS)
    assert table.rows == [
        ["", "NFE", "digits-FD", "class accuracy", "vs teacher's best", "sampler"],
        ["teacher", "3", "551.0", "-", "137.75 x", "heun"],
        ["teacher", "35", "4.000", "-", "1.00 x", "heun"],
        ["generator", "2", "6.000", "0.9800", "1.50 x", "gamma 1, sigma 80 2.5"],
    ]
    assert table.claim == (
        "With 2 evaluations the generator reaches digits-FD 6.000, 1.50 times the teacher's best of 4.000 with 35."
    )
    assert [*table.curves.items()] == [("generator", [(2, 6.0)]), ("teacher", [(3, 551.0), (35, 4.0)])]


@pytest.mark.parametrize(
    ("metric", "title"),
    [
        ("fd_dinov2[0ca71705]@16", "FD-DINOv2[0ca71705]@16"),
        ("fid@5000", "FID@5000"),
        ("is", "IS"),
        ("fd_dinov2-dgm", "dinov2-dgm-FD"),
        ("precision_inception[58f4bf92]", "precision inception[58f4bf92]"),
    ],
)
def test_metrics_have_the_names_of_papers(metric: str, title: str):
    (table,) = result_tables([replace(teacher(35, 4.0), metrics={metric: 4.0})], OURS)
    assert table.rows[0][2] == title


def test_generators_are_named_by_what_is_known_of_them():
    facts = [{}, {"images_seen": 5}, {"recipe_hash": "cd" * 32}, {"recipe_hash": OURS.recipe_hash, "images_seen": 1000}]
    facts += [facts[-1] | {"weights": "raw"}, {"weights": "raw"}]
    found = [replace(generator(1, 5.0 + i), provenance={"method": "ctm"} | one) for i, one in enumerate(facts)]
    names = ["another generator", "another generator at 5 images", "generator, recipe cdcdcdcd", "generator"]
    names += ["raw weights at 1,000 images", "raw weights"]
    assert [result_tables([one], OURS)[0].rows[1][0] for one in found] == names
    converted = result_tables(found, GeneratorId("", 0))[0]
    assert [row[0] for row in converted.rows[1:]].count("generator") == 1, "the one of which nothing is known"
    # Raw weights do not stand in for the average, though they are better.
    average, raw = (replace(one, sampler=replace(one.sampler, nfe=2)) for one in (found[3], found[4]))
    better = replace(raw, metrics={"fd_digits": 1.0}, sampler=replace(raw.sampler, gamma=0.0))
    assert best_gamma_results([average, better]) == [average, better]


def test_schedules_that_are_nearly_equal_have_rows_of_their_own():
    def at(sigma: float, fd: float) -> Result:
        found = generator(2, fd)
        return replace(found, sampler=replace(found.sampler, sigmas=(80.0, sigma)))

    near = sweep_table([at(2.515, 6.0), at(2.52, 5.0), at(0.5, 7.0)])
    levels = ("80 2.515", "80 2.52", "80 0.5")
    assert [row[0] for row in near.rows[1:]] == [f"digits-FD, gamma 1, sigma {level}" for level in levels]
    assert [row[1] for row in near.rows[1:]] == ["6.000", "5.000", "7.000"]
    far = sweep_table([at(2.515, 6.0), at(2.6, 5.0), at(2.6 * (1 + 1e-12), 5.0)])  # as a time in radians and back
    assert [row[0] for row in far.rows[1:]] == [f"digits-FD, gamma 1, sigma 80 {level}" for level in ("2.52", "2.6")]


def test_protocols_are_never_mixed():
    other = replace(DONE, seeds="5000-9999")
    first, second = result_tables([teacher(35, 4.0), generator(2, 6.0), teacher(35, 1.0, other)], OURS)
    assert (first.protocol, second.protocol) == (DONE, other)
    assert [row[0] for row in first.rows[1:]] == ["teacher", "generator"]
    assert [row[0] for row in second.rows[1:]] == ["teacher"]
    assert "4.000 with 35" in first.claim
    assert second.claim == ""


def test_another_generator_is_called_by_its_recipe_and_images():
    (table,) = result_tables([generator(1, 7.0, images=500), generator(1, 6.0)], OURS)
    assert [row[0] for row in table.rows[1:]] == ["generator", "generator at 500 images, recipe abababab"]
    assert table.rows[0] == ["", "NFE", "digits-FD", "sampler"]  # nothing to compare with


def test_a_curve_has_the_best_at_each_nfe():
    for results in ([generator(2, 7.0), generator(2, 6.0)], [generator(2, 6.0), generator(2, 7.0)]):
        (table,) = result_tables(results, OURS)
        assert table.curves == {"generator": [(2, 6.0)]}
        assert len(table.rows) == 3
        assert table.claim == ""  # without a teacher


def at_gamma(gamma: float, nfe: int, fd: float, images: int = 1000) -> Result:
    one = generator(nfe, fd, images)
    return replace(one, sampler=replace(one.sampler, gamma=gamma))


def test_a_sweep_is_of_one_generator_at_several_gammas():
    own = [at_gamma(1.0, 1, 9.0), at_gamma(1.0, 2, 6.0), at_gamma(0.0, 2, 7.0), at_gamma(0.0, 2, 5.0)]
    (table,) = sweep_tables([*own, teacher(35, 4.0), at_gamma(0.5, 2, 1.0, images=7)], OURS)
    assert table.rows == [
        ["NFE", "1", "2", "best NFE"],
        ["digits-FD, gamma 1", "9.000", "6.000", "2"],
        ["digits-FD, gamma 0", "-", "5.000", "2"],
    ]
    assert table.curves == {"gamma 0": [(2, 5.0)], "gamma 1": [(1, 9.0), (2, 6.0)]}
    assert sweep_tables([at_gamma(1.0, 1, 9.0), at_gamma(1.0, 2, 6.0)], OURS) == []


def test_the_best_of_a_metric_may_be_the_highest():
    precise = [replace(generator(nfe, 0), metrics={"precision_dinov2": value}) for nfe, value in ((1, 0.5), (2, 0.7))]
    assert sweep_table(precise).claim == "precision dinov2 is highest with 2 evaluations, gamma 1: 0.7000."
    worse = replace(precise[1], metrics={"precision_dinov2": 0.6}, sampler=replace(precise[1].sampler, gamma=0.0))
    assert best_gamma_results([worse, precise[1]]) == [precise[1]]


def test_of_one_step_no_gamma_is_told_for_none_plays():
    (table,) = sweep_tables([at_gamma(1.0, 1, 5.0), at_gamma(0.0, 1, 5.0), at_gamma(0.0, 2, 6.0)], OURS)
    assert table.claim == "digits-FD is lowest with 1 evaluation: 5.000."
    weighed = at_gamma(0.0, 1, 5.0)
    weighed = replace(weighed, sampler=replace(weighed.sampler, guidance=1.5))
    (table,) = result_tables([weighed, at_gamma(0.0, 2, 6.0)], OURS)
    assert [row[-1] for row in table.rows[1:]] == ["guidance 1.5, sigma 80", "gamma 0, sigma 80 2.5"]


def test_one_step_is_one_row_whatever_gamma_it_was_measured_with():
    """In the first table of a report, which has a row for every other setting, and in a comparison."""
    swept = [at_gamma(gamma, nfe, 5.0 + nfe * gamma * (nfe > 1)) for gamma in (0.0, 0.5, 1.0) for nfe in (1, 2)]
    (table,) = result_tables(swept, OURS)
    assert [row[1:3] for row in table.rows[1:]] == [["1", "5.000"], ["2", "5.000"], ["2", "6.000"], ["2", "7.000"]]
    compared = compare([Row("a", one) for one in swept])
    assert [row[1] for row in compared.cells()[1:]] == ["1", "2", "2", "2"]
    assert len(compared.to_csv().splitlines()) == 5
    assert len(over_seeds(compared).cells()) == 5
    assert len(json.loads(compared.to_json())["rows"]) == 6  # the records of all measurements
    assert len(compare([Row("a", swept[0]), Row("b", swept[2])]).cells()) == 3  # of two sources


def test_of_several_gammas_the_best_stays():
    better, worse, other = at_gamma(0.0, 2, 5.0), at_gamma(1.0, 2, 6.0), at_gamma(1.0, 2, 9.0, images=7)
    same = at_gamma(0.5, 2, 5.0)
    weighed = replace(worse, sampler=replace(worse.sampler, guidance=2.0))
    rest = [teacher(35, 4.0), teacher(35, 5.0), at_gamma(1.0, 1, 8.0), weighed]
    assert best_gamma_results([worse, better, same, other, *rest]) == [better, other, *rest]


def sampled(one: Result, **changes: object) -> Result:
    assert one.sampler is not None
    return replace(one, sampler=replace(one.sampler, **changes))


def test_a_sweep_is_by_what_varies():
    """Guidance at one gamma; noise levels of one number of steps; and each protocol by itself."""
    guided = [sampled(generator(2, fd), guidance=weight) for weight, fd in ((1.0, 6.0), (1.5, 5.0))]
    (table,) = sweep_tables(guided, OURS)
    assert list(table.curves) == ["gamma 1, guidance 1", "gamma 1, guidance 1.5"]
    assert table.claim == "digits-FD is lowest with 2 evaluations, gamma 1, guidance 1.5: 5.000."
    levels = [sampled(generator(1, fd), sigmas=sigmas) for sigmas, fd in (((80.0,), 6.0), ((40.0,), 7.0))]
    assert sweep_table(levels).claim == "digits-FD is lowest with 1 evaluation, gamma 1, sigma 80: 6.000."
    assert list(sweep_table([*levels[:1], generator(2, 5.0)]).curves) == ["gamma 1"]
    mixed = sweep_table([*levels, sampled(generator(1, 8.0), sigmas=None)])
    assert list(mixed.curves) == ["gamma 1, sigma 80", "gamma 1, sigma 40", "gamma 1"]
    several = sweep_table([*levels, generator(2, 5.0)])  # of one number of steps there is one schedule
    assert list(several.curves) == ["gamma 1, sigma 80", "gamma 1, sigma 40", "gamma 1, sigma 80 2.5"]
    by_score = sampled(at_gamma(0.0, 2, 7.0), solver="heun", gamma=None)
    (solvers,) = sweep_tables([at_gamma(0.0, 2, 6.0), by_score], OURS)
    assert list(solvers.curves) == ["heun", "gamma 0"]
    other = replace(DONE, seeds="5000-9999")
    elsewhere = [replace(one, protocol=other, protocol_sha256=other.sha256()) for one in guided]
    assert [table.protocol for table in sweep_tables([*guided, *elsewhere], OURS)] == [DONE, other]
    assert sweep_tables([guided[0], elsewhere[1]], OURS) == []


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"dtype": "bfloat16"}, ["gamma 1, float32", "gamma 1, bfloat16"]),
        ({"churn": (40.0, 0.05, 50.0, 1.003)}, ["gamma 1", "gamma 1, churn 40 0.05 50 1.003"]),
        ({"solver": "ddim", "gamma": None}, ["ddim", "gamma 1"]),
        ({"guide": "ab" * 32}, ["gamma 1", "gamma 1, guide abababab"]),
    ],
)
def test_settings_that_differ_have_different_names(changes: dict[str, object], names: list[str]) -> None:
    one = generator(2, 6.0)
    (table,) = sweep_tables([one, sampled(generator(2, 5.0), **changes)], OURS)
    assert list(table.curves) == names
    assert sorted(curve[0][1] for curve in table.curves.values()) == [5.0, 6.0]


def test_a_sweep_of_several_metrics_is_judged_by_the_first():
    (table,) = sweep_tables([
        sampled(generator(nfe, fd, accuracy=value), gamma=gamma)
        for nfe, gamma, fd, value in ((2, 1.0, 6.0, 0.9), (1, 1.0, 9.0, 0.8), (1, 0.0, 9.0, 0.7))
    ], OURS)  # fmt: skip
    assert table.rows == [
        ["NFE", "1", "2", "best NFE"],
        ["digits-FD, gamma 0", "9.000", "-", "1"],
        ["digits-FD, gamma 1", "9.000", "6.000", "2"],
        ["accuracy, gamma 0", "0.7000", "-", ""],
        ["accuracy, gamma 1", "0.8000", "0.9000", ""],
    ]
    unsorted = sweep_table([generator(2, 6.0), generator(1, 9.0)])
    assert unsorted.curves == {"gamma 1": [(1, 9.0), (2, 6.0)]}


def test_the_highest_score_is_the_best_and_fewer_steps_are_of_equal_ones():
    scores = [replace(one, metrics={"is": value}) for one, value in (
        (teacher(35, 0), 9.0), (teacher(18, 0), 9.0),
        (generator(2, 0), 7.0), (generator(2, 0), 8.0), (generator(1, 0), 7.5),
    )]  # fmt: skip
    (table,) = result_tables(scores, OURS)
    assert table.curves["generator"] == [(1, 7.5), (2, 8.0)]
    assert table.claim.startswith("With 2 evaluations")
    assert table.claim.endswith("reaches IS 8.000, 0.89 times the teacher's best of 9.000 with 18.")


def test_a_generator_of_another_recipe_or_protocol_is_another():
    other = generator(2, 7.0)
    other = replace(other, provenance=other.provenance | {"recipe_hash": "cd" * 32})
    (table,) = result_tables([generator(2, 6.0), other], OURS)
    assert [row[0] for row in table.rows[1:]] == ["generator", "generator at 1,000 images, recipe cdcdcdcd"]
    seeds = replace(DONE, seeds="5000-9999")
    elsewhere = replace(at_gamma(0.0, 2, 7.0), protocol=seeds, protocol_sha256=seeds.sha256())
    assert best_gamma_results([at_gamma(1.0, 2, 6.0), other, elsewhere]) == [at_gamma(1.0, 2, 6.0), other, elsewhere]


def test_how_images_were_drawn_in_words():
    one = generator(2, 6.0).sampler
    assert one is not None
    drawn = replace(one, guidance=1.5, churn=(40.0, 0.05, 50.0, 1.003), dtype="bfloat16")
    assert sampler_words(drawn) == "gamma 1, guidance 1.5, sigma 80 2.5, churn 40 0.05 50 1.003, bfloat16"
    assert sampler_words(replace(one, nfe=1, sigmas=None)) == ""
    assert [number(value) for value in (1234.4, 551, 0.0001)] == ["1234", "551.0", "0.0001000"]


def test_repetitions_are_told():
    twice = replace(DONE, repeat=2)
    (table,) = result_tables([teacher(35, 4.0, twice)], OURS)
    assert table.to_text().splitlines()[0] == "Protocol digits, 5000 images, means of 2 repetitions."
    assert "means of 2 times 5000 images" in table.caption
    (named,) = result_tables([replace(teacher(35, 4.0), metrics={"a|b": 1.0})], OURS)
    assert named.to_markdown().splitlines()[0] == r"|  | NFE | a\|b | vs teacher's best | sampler |"


def test_numbers_are_aligned_below_a_rule_of_as_many_columns() -> None:
    text = markdown_table([["", "NFE", "FD"], ["teacher", "35", "4.000"]], numbers=2, notes=["Of one seed."])
    assert text.splitlines() == ["|  | NFE | FD |", "|---|---:|---:|", "| teacher | 35 | 4.000 |", "", "Of one seed."]


def test_the_evaluations_of_a_likelihood_are_no_curve() -> None:
    """Its solver chooses them."""
    likelihood = replace(DONE, name="nll", features=None)
    (table,) = result_tables([teacher(nfe, 3.0, likelihood) for nfe in (80, 96)], OURS)
    assert table.curves == {}
    assert "bits per dimension" in table.caption


def test_images_have_no_nfe():
    (table,) = result_tables([replace(teacher(1, 9.0), sampler=None), teacher(3, 4.5)], OURS)
    assert table.rows[-1] == ["images", "-", "9.000", "2.00 x", "-"]
    assert list(table.curves) == ["teacher"]


def test_the_text_is_aligned_and_ends_with_the_claim():
    lines = result_tables([generator(2, 6.0), teacher(35, 4.0)], OURS)[0].to_text().splitlines()
    assert lines[0] == "Protocol digits, 5000 images."
    assert lines[2:4] == [
        "teacher     35      4.000             1.00 x  heun",
        "generator    2      6.000             1.50 x  gamma 1, sigma 80 2.5",
    ]
    assert lines[-1].startswith("With 2 evaluations")


def test_results_are_read_back(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text(results_json([teacher(35, 4.0), generator(2, 6.0)]))
    assert read_results([file]) == [teacher(35, 4.0), generator(2, 6.0)]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": [{"metrics": {}}]}', "\xff"])
def test_what_holds_no_results_is_refused(tmp_path: Path, text: str):
    file = tmp_path / "a.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(EdmDistillError, match=r"a\.json holds no results .* eval --out wrote"):
        read_results([file])


def test_why_a_file_holds_no_results_is_in_words(tmp_path: Path):
    (tmp_path / "none.json").write_text("{}")
    for name, why in (
        ("none.json", "it has no list of them"),
        ("absent.json", "it does not exist"),
        ("", "Is a directory"),
    ):
        with pytest.raises(EdmDistillError, match=rf" holds no results \({why}\): "):
            read_results([tmp_path / name])
