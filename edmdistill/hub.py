"""Publishing to the Hub: only what is needed to draw, in one commit, and not done before it has come back the same.

What the Hub has is not sent again, so a push that was interrupted goes on when it is repeated.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import msgspec
import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is, by name
from msgspec.structs import replace
from torch import Tensor

from edmdistill import __version__
from edmdistill.card import card, is_own, usual_nfe
from edmdistill.checkpoints.convert import load_model
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.source import REPOSITORY, hub_calls
from edmdistill.checkpoints.store import CARD, CONFIG, MODEL, CheckpointConfig, checkpoint_in, read_config
from edmdistill.errors import HubError
from edmdistill.evaluation.protocol import Result
from edmdistill.evaluation.saved import saved_results, with_results
from edmdistill.evaluation.tables import read_results
from edmdistill.networks.flow import Denoiser
from edmdistill.report.summary import read_run
from edmdistill.sampling.generate import is_latent, sample
from edmdistill.sampling.grid import image_grid, to_uint8
from edmdistill.training.run_dir import RECIPE
from edmdistill.training.state import PROGRESS

GRID = "samples.png"
SHOWN, COLUMNS = 24, 8
"""Samples in the grid."""
COMPARED = 0, 1
"""Seeds whose samples must come back the same."""
STRICTNESS = {
    "cc0-1.0": 0,
    "mit": 1,
    "bsd-3-clause": 1,
    "apache-2.0": 2,
    "cc-by-4.0": 3,
    "cc-by-sa-4.0": 4,
    "cc-by-nc-4.0": 5,
    "cc-by-nc-sa-4.0": 6,
}
"""Licences from loose to strict. Of the share-alike ones, and of any other, nothing but the same will do."""


class Package(NamedTuple):
    """What is to be published.

    Attributes:
        files: by their names on the Hub: where they are, or what they hold.
        samples: of the seeds COMPARED.
    """

    repository: str
    config: CheckpointConfig
    files: dict[str, Path | bytes]
    samples: Tensor

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in self.files.items()}


class Published(NamedTuple):
    """Where it is: the revision, and whether the Hub had all of it before."""

    url: str
    revision: str
    unchanged: bool


def pack(source: str | Path, repository: str, licence: str | None = None) -> Package:
    """Puts together what is published of a checkpoint or of a run; nothing is sent.

    Args:
        source: a checkpoint folder of ours, or a run directory.
        repository: OWNER/NAME.
        licence: of the weights, where the checkpoint knows none, or a stricter one.
    Raises: HubError: no name for a repository, a licence that will not do, or optimiser states.
        CheckpointError: no checkpoint, or a damaged one.
    """
    path = Path(source).expanduser()
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise HubError(f"{repository} is no name for a repository: {error}") from error
    if not REPOSITORY.fullmatch(repository):
        raise HubError(f"{repository} is no name for a repository of yours: write OWNER/NAME")
    if (path / PROGRESS).is_file():
        raise HubError(f"{path} is a training state, with its optimisers, and those are not published: give the run")
    if not path.is_dir():
        raise HubError(f"{path} is no folder: give a checkpoint of ours, or a run directory")
    folder = checkpoint_in(path)
    run = read_run(path) if (path / RECIPE).is_file() else None
    config = read_config(folder)
    origin = config.provenance
    config = replace(config, provenance=replace(origin, licence=settle_licence(origin.licence, licence)))
    results = _results(config, path, repository)
    config = with_results(config, [result for result in results if is_own(result, config)])

    model = load_model(folder)
    files: dict[str, Path | bytes] = {MODEL: folder / MODEL}
    grid = None
    if isinstance(model, Generator) and not is_latent(model):
        nfe = usual_nfe(config)
        files[GRID] = _grid(model, nfe)
        grid = GRID, f"Seeds 0 to {SHOWN - 1}, in {nfe} {'evaluation' if nfe == 1 else 'evaluations'}."
    files[CONFIG] = msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"
    files[CARD] = card(config, repository, run=run, results=results, grid=grid).encode()
    return Package(repository, config, files, _compared(model))


def settle_licence(theirs: str | None, asked: str | None) -> str:
    """The licence to publish under.

    Args:
        theirs: that of the weights, or of those that they come from.
        asked: what the user wants.
    Raises: HubError: neither is known, or what is asked for is looser.
    """
    if theirs is None and asked is None:
        raise HubError("the checkpoint does not say its licence: say --licence, as the Hub writes it")
    if theirs is None or asked is None or asked == theirs:
        return asked or theirs or ""
    free = theirs in STRICTNESS and "-sa" not in theirs
    if not free or STRICTNESS.get(asked, -1) < STRICTNESS[theirs]:
        raise HubError(
            f"the weights are under {theirs}, or come from such, and {asked} allows more or other things: "
            "leave --licence out"
        )
    return asked


def push(
    package: Package,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    note: Callable[[str], object] = lambda stage: None,
) -> Published:
    """Publishes, then downloads what is published and compares the samples of two seeds, bit for bit.

    Args:
        private: make the repository private, or make sure that it is.
        branch: made if it is not there; default: main.
        message: of the commit.
        note: hears what is being done.
    Raises: HubError: the Hub refuses, cannot be reached, or gives back something else.
    """
    repository, api = package.repository, HfApi(library_name="edmdistill", library_version=__version__)
    if get_token() is None:
        raise HubError("nobody is logged in on this machine: log in by `hf auth login`, or set HF_TOKEN")
    with hub_calls(f"{repository} is not published"):
        note("asking the Hub")
        api.create_repo(repository, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        before = api.model_info(repository, revision=branch)
        if private and not before.private:
            raise HubError(f"{repository} exists and is public: make it private in its settings, or name another")
        note("sending")
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, file) for name, file in package.files.items()],
            commit_message=message or f"A {package.config.stage} by edmdistill {__version__}",
            revision=branch,
            parent_commit=before.sha,
        )
    note("comparing")
    _require_same(package, commit.oid)
    return Published(f"{api.endpoint}/{repository}/tree/{commit.oid}", commit.oid, commit.oid == before.sha)


def _require_same(package: Package, revision: str) -> None:
    """Raises: HubError: what the Hub gives back does not draw what was sent."""
    where = f"{package.repository}@{revision:.8}"
    with TemporaryDirectory() as fresh:
        with hub_calls(f"{where} is published, but cannot be had back"):
            snapshot_download(
                package.repository, revision=revision, local_dir=fresh, allow_patterns=list(package.files)
            )
        samples = _compared(load_model(fresh))
    if not torch.equal(samples, package.samples):
        raise HubError(
            f"{where} is published, but draws otherwise than here: do not use it, and give the same command again"
        )


def _compared(model: Generator | Denoiser) -> Tensor:
    return sample(model, usual_nfe(model.config) if isinstance(model, Generator) else 3, seeds=COMPARED)


def _grid(model: Generator, nfe: int) -> bytes:
    """A picture of the first seeds, their classes in turn."""
    classes = model.flow.label_dim
    labels = [seed % classes for seed in range(SHOWN)] if classes else None
    images = sample(model, nfe, seeds=range(SHOWN), labels=labels)
    image_grid(to_uint8(images), COLUMNS).save(data := io.BytesIO(), "png")
    return data.getvalue()


def _results(config: CheckpointConfig, path: Path, repository: str) -> list[Result]:
    """What was measured of a checkpoint and of its teacher: in it, and in the run's eval/.

    Where they lay on this machine is nobody's business.
    """
    measured = [*saved_results(config), *read_results(sorted((path / "eval").glob("*.json")))]
    latest = {(result.protocol_sha256, result.sampler): result for result in measured}.values()
    own = [_at(result, repository) for result in latest if is_own(result, config)]
    return own + [_at(result, None) for result in latest if result.provenance.get("method") is None]


def _at(result: Result, source: str | None) -> Result:
    return replace(result, provenance=result.provenance | {"source": source})
