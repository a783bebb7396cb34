"""Results inside a checkpoint: they come back as they were, and the latest of a setting takes its place."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edmdistill.checkpoints.config import read_config, write_config
from edmdistill.checkpoints.layout import CONFIG
from edmdistill.errors import CheckpointError, EdmDistillError
from edmdistill.evaluation.protocol import PROTOCOLS, Protocol
from edmdistill.evaluation.results import (
    Result,
    add_results,
    find_results_folder,
    load_results,
    results_in_config,
    save_results,
)
from edmdistill.sampling.spec import SamplerRecord

GENERATOR = Path(__file__).parents[1] / "checkpoints" / "format-1.0"
EMPTY = replace(read_config(GENERATOR), results=())
OTHER = replace(PROTOCOLS["digits"], seeds="5000-9999")


def measured(protocol: Protocol, sampler: SamplerRecord | None, fd: float) -> Result:
    return Result(
        metrics={"fd_digits": fd}, protocol=protocol, protocol_sha256=protocol.sha256(), sampler=sampler, provenance={}
    )


samplers = st.builds(
    SamplerRecord,
    solver=st.just("gamma"),
    nfe=st.integers(1, 2),
    gamma=st.sampled_from([0.0, 1.0]),
    sigmas=st.sampled_from([(80.0,), (80.0, 5.0)]),
)
results = st.builds(measured, st.sampled_from([PROTOCOLS["digits"], OTHER]), st.none() | samplers, st.floats(0, 500))


@given(st.lists(st.lists(results)))
def test_of_each_protocol_and_sampler_the_latest_stays(rounds: list[list[Result]]):
    config = EMPTY
    for found in rounds:
        config = add_results(config, found)
    latest = {(one.protocol_sha256, one.sampler): one for found in rounds for one in found}
    assert results_in_config(config) == list(latest.values())
    assert replace(config, results=()) == EMPTY


def test_levels_stand_there_as_they_were_given():
    """The sampler has them by times, or in float32."""
    sampler = SamplerRecord(solver="gamma", nfe=2, gamma=0.0, sigmas=(80.00000000000027, 0.30000001192092896))
    given = replace(sampler, sigmas=(80.0, 0.3))
    assert measured(OTHER, sampler, 1.0).sampler == given
    config = add_results(add_results(EMPTY, [measured(OTHER, sampler, 2.0)]), [measured(OTHER, given, 1.0)])
    assert results_in_config(config) == [measured(OTHER, given, 1.0)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GENERATOR, tmp_path / "run" / "generator"))


def test_a_checkpoint_on_the_disk_keeps_them(folder: Path):
    before = read_config(folder)
    one, two = measured(OTHER, None, 1.5), measured(OTHER, SamplerRecord(solver="heun", nfe=35), 2.5)
    save_results(folder, [one])
    save_results(folder, [two])
    after = read_config(folder)
    assert results_in_config(after)[-2:] == [one, two]
    assert replace(after, results=before.results, format_version=before.format_version) == before


def test_a_place_is_a_checkpoint_or_a_run(folder: Path):
    assert (find_results_folder(folder), find_results_folder(str(folder.parent))) == (folder, folder.parent)
    with pytest.raises(EdmDistillError, match=r"--save is for .* but me/generator is no folder here: use --out"):
        find_results_folder("me/generator")
    (folder / CONFIG).write_text("{")
    with pytest.raises(CheckpointError):
        find_results_folder(folder)


def test_a_runs_results_outlive_its_checkpoint(folder: Path):
    run = folder.parent
    (run / "recipe.toml").touch()
    before = read_config(folder)
    one, two = (
        replace(measured(OTHER, None, fd), provenance={"images_seen": n}) for n, fd in ((896, 9.5), (1000, 2.5))
    )
    save_results(run, [one])
    save_results(run, [two])
    save_results(run, [two])
    assert {*map(repr, load_results(run))} == {*map(repr, [*results_in_config(before), one, two])}
    assert len(list((run / "eval").iterdir())) == 2
    write_config(folder, before)  # as the run does when it goes on
    assert [result in load_results(run) for result in (one, two)] == [True, True]


def test_results_of_somebody_else_are_refused():
    with pytest.raises(EdmDistillError, match=r"cannot be read .*: measure it again"):
        results_in_config(replace(EMPTY, results=({"fid": 2.0},)))
