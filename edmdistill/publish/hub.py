"""Publishing to the Hub: the files that sampling needs, in one commit, verified by downloading them again.

Files that the Hub has are not sent again, so repeating an interrupted push resumes it.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import msgspec
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # they are, by name
    hf_raise_for_status,
    validate_repo_id,
)
from msgspec.structs import replace
from torch import Tensor

from edmdistill import __version__
from edmdistill.atomic import expanded, sha256_file, temporary_folder
from edmdistill.checkpoints.config import CheckpointConfig, default_nfe, read_config
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.hub_client import REASONS, REPOSITORY, hub_calls
from edmdistill.checkpoints.layout import CARD, CONFIG, MODEL, PROGRESS, RECIPE, checkpoint_in
from edmdistill.checkpoints.licences import check_licence
from edmdistill.checkpoints.load import load_model
from edmdistill.errors import HubError, HubUnreachable, NoDecoder, counted, without_secrets
from edmdistill.evaluation.results import Result, add_results, is_of_teacher, load_results
from edmdistill.export.parity import IMAGE_TOLERANCE, difference_of
from edmdistill.networks.flow import Denoiser
from edmdistill.publish.card import card, was_measured_on
from edmdistill.publish.repository import GRID, other_model, read_contents, sign_card, signed_png
from edmdistill.report.summary import read_run
from edmdistill.sampling.decode import Decoder, model_decoder
from edmdistill.sampling.generate import require_finite, sample
from edmdistill.sampling.grid import image_grid, thumbnails

NOT_A_BRANCH = re.compile(
    r"^[-/]|^(?:HEAD|@)?$|[\x00-\x20\x7f~^:?*\[\\#\x22\x27`]|\.\.|@\{|//|(?:^|/)\.|\.lock(?:/|$)|[./]$"
)
"""What git does not take in the name of a branch, and # and quotes, which would end it in a command or in code."""
GRID_SIZE, GRID_COLUMNS = 24, 8
"""Samples in the grid."""
COMPARISON_SEEDS = 0, 1
"""Seeds whose samples are compared after the download."""
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
"""Licences from permissive to strict. Share-alike licences, and those not listed, cannot be replaced."""


class Package(NamedTuple):
    """The files to publish.

    Attributes:
        repository: OWNER/NAME.
        branch: of it; None: main.
        files: their paths or contents, by their names on the Hub.
        samples: of COMPARISON_SEEDS.
    """

    repository: str
    branch: str | None
    config: CheckpointConfig
    files: dict[str, Path | bytes]
    samples: Tensor

    @property
    def card(self) -> bytes:
        """The text of README.md."""
        text = self.files[CARD]
        assert isinstance(text, bytes)
        return text

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in self.files.items()}


class Published(NamedTuple):
    """The published revision, whether the Hub had all of it already, and which of card and picture there were kept."""

    url: str
    revision: str
    unchanged: bool
    kept: tuple[str, ...] = ()


class PushPlan(NamedTuple):
    """What a push finds.

    Attributes:
        commit: the one to build on.
        kept: files made by hand that stay.
        removed: files of an earlier push that the package lacks.
    """

    commit: str | None
    kept: tuple[str, ...]
    removed: list[str]


def build_package(
    source: str | Path,
    repository: str,
    licence: str | None = None,
    vae: str | None = None,
    branch: str | None = None,
) -> Package:
    """Collects the files to publish from a checkpoint or a run; nothing is sent.

    Args:
        source: a checkpoint folder, or a run directory.
        repository: OWNER/NAME.
        licence: of the weights, if the checkpoint has none, or a stricter one.
        vae: what decodes a latent generator's picture; see `open_decoder`. There is none without it.
        branch: of the repository, which the card's commands name; default: main.
    Raises: HubError: an invalid name of a repository or a branch, an invalid licence, or optimizer states.
        CheckpointError: no checkpoint, a damaged one, or a licence that the Hub does not accept.
    """
    path = expanded(source)
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise HubError(f"{repository} is not a repository name: {error}") from error
    if not REPOSITORY.fullmatch(repository):
        raise HubError(f"{repository} is not a repository name: write OWNER/NAME")
    if branch is not None and NOT_A_BRANCH.search(branch):
        raise HubError(f"'{branch}' cannot name a branch: use letters, digits and -, with a / between two parts")
    address = repository if branch is None else f"{repository}@{branch}"
    if (path / PROGRESS).is_file():
        raise HubError(f"{path} is a training state, which is not published: use its run directory")
    if not path.is_dir():
        name, _, revision = str(source).partition("@")
        of_hub = f"hf download {name}{revision and f' --revision {revision}'} --local-dir DIR"
        advice = f"; `{of_hub}` makes one of a repository" if REPOSITORY.fullmatch(name) else ""
        raise HubError(f"{path} is not a folder: use a checkpoint folder or a run directory{advice}")
    folder = checkpoint_in(path)
    run = read_run(path) if (path / RECIPE).is_file() else None
    config = read_config(folder)
    origin = config.provenance
    terms = choose_licence(origin.licence, licence)
    config = replace(config, provenance=replace(origin, licence=terms, source=without_secrets(origin.source)))
    results = _publishable_results(config, path, address)
    config = add_results(config, [result for result in results if was_measured_on(result, config)])

    model = load_model(folder)
    files: dict[str, Path | bytes] = {MODEL: folder / MODEL}
    grid = None
    decoder = _decoder(model, vae)
    if isinstance(model, Generator) and decoder is not None:
        nfe = default_nfe(config)
        files[GRID] = _grid(model, nfe, decoder)
        grid = GRID, f"Seeds 0 to {GRID_SIZE - 1}, in {counted(nfe, 'evaluation')}."
    files[CONFIG] = msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"
    text = card(config, address, run=run, results=results, grid=grid)
    files[CARD] = sign_card(text, sha256_file(folder / MODEL)).encode()
    return Package(repository, branch, config, files, _comparison_samples(model))


def choose_licence(theirs: str | None, requested: str | None) -> str:
    """Returns the licence to publish under.

    Args:
        theirs: of the weights, or of those they derive from.
        requested: by the user.
    Raises: HubError: neither is known, or the requested one is more permissive.
    """
    theirs, requested = (None if licence is None else check_licence(licence) for licence in (theirs, requested))
    if theirs is None and requested is None:
        raise HubError("the checkpoint has no licence: add --licence with the Hub's identifier")
    if theirs is None or requested is None or requested == theirs:
        return requested or theirs or ""
    free = theirs in STRICTNESS and "-sa" not in theirs
    if not free or STRICTNESS.get(requested, -1) < STRICTNESS[theirs]:
        raise HubError(
            f"the weights are under {theirs}, or derived from such weights, and {requested} is not as strict: "
            "leave --licence out"
        )
    return requested


def push(
    package: Package,
    *,
    private: bool = False,
    message: str | None = None,
    replace_model: bool = False,
    overwrite_card: bool = False,
    on_message: Callable[[str], object] = lambda stage: None,
) -> Published:
    """Publishes a package, downloads it again, and compares its bytes, and the samples of two seeds up to rounding.

    A picture of an earlier push is removed if the package has none. Other files stay.

    Args:
        private: create the repository as private, or require that it is.
        message: of the commit.
        replace_model: replace another model in the repository.
        overwrite_card: replace a card or a picture that was made or edited by hand.
        on_message: called with the name of each stage.
    Raises: HubError: the Hub refuses or cannot be reached, the download differs, or the repository has another model.
    """
    repository, branch, api = package.repository, package.branch, _client()
    with hub_calls(f"{repository} is not published"):
        on_message("asking the Hub")

        def ask() -> PushPlan | None:
            return _plan_push(api, package, private, replace_model, overwrite_card)

        if (plan := ask()) is None:
            api.create_repo(repository, private=private or None, exist_ok=True)
            if (plan := ask()) is None:
                raise HubError(f"{repository} is not published: {REASONS[404]}")
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        on_message("sending")
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, file) for name, file in package.files.items() if name not in plan.kept]
            + [CommitOperationDelete(name) for name in plan.removed],
            commit_message=message or f"A {package.config.stage} by edmdistill {__version__}",
            revision=branch,
            parent_commit=plan.commit,
        )
    on_message("comparing")
    _verify_download(package, commit.oid, plan.kept)
    url = f"{api.endpoint}/{repository}/tree/{commit.oid}"
    return Published(url, commit.oid, commit.oid == plan.commit, plan.kept)


def rehearse(
    package: Package, *, private: bool = False, replace_model: bool = False, overwrite_card: bool = False
) -> PushPlan | None:
    """Asks the Hub what `push` would find, and changes nothing there.

    Returns: None: the repository does not exist yet.
    Raises: HubError: the push would be refused.  HubUnreachable: the Hub cannot be asked.
    """
    repository, api = package.repository, _client()
    with hub_calls(f"{repository} would not be published"):
        if (plan := _plan_push(api, package, private, replace_model, overwrite_card)) is not None:
            api.auth_check(repository, write=True)
            return plan
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(f"{repository} would not be published: {REASONS[403]}")
        names = [user["name"], *(group["name"] for group in user.get("orgs", ()))]
        if repository.partition("/")[0].casefold() not in map(str.casefold, names):
            raise HubError(f"{repository} would not be published: your login may write to {' and '.join(names)} alone")
        return None


def _client() -> HfApi:
    """Returns the Hub's client.  Raises: HubUnreachable: it has no login."""
    if get_token() is None:
        raise HubUnreachable("you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    return HfApi(library_name="edmdistill", library_version=__version__)


def _check_card(text: str) -> None:
    """Asks the Hub whether it takes a card.

    The client's ModelCard.validate does so, too, but before version 2.2 asks huggingface.co whatever HF_ENDPOINT is.

    Raises: ValueError: it does not; its words.  What the Hub's client raises.
    """
    asked = {"repoType": "model", "content": text}
    answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=asked)
    if answer.status_code == 400:
        raise ValueError(answer.text)
    hf_raise_for_status(answer)


def _plan_push(
    api: HfApi, package: Package, private: bool, replace_model: bool, overwrite_card: bool
) -> PushPlan | None:
    """Returns what a push finds, with the arguments of `push`; None: the repository does not exist.

    Raises: HubError: it is public where it should be private, or holds what may not be replaced unasked.
        What the Hub's client raises.
    """
    repository, branch = package.repository, package.branch
    _check_card(package.card.decode())
    try:
        before = api.model_info(repository, revision=branch, files_metadata=True)
    except RevisionNotFoundError:
        before = api.model_info(repository, files_metadata=True)  # the branch will start from it
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
    if private and not before.private:
        raise HubError(f"{repository} exists and is public: make it private in its settings, or choose another")
    contents = read_contents(repository, before)
    if not replace_model and (other := other_model(contents, package.config)):
        where = "" if branch is None else f" in the branch {branch} alone"
        raise HubError(f"{repository} holds {other}: choose another repository, or add --replace to replace it{where}")
    kept = () if overwrite_card else tuple(contents.by_hand(package.files))
    if GRID in kept and CARD not in kept:
        raise HubError(
            f"{repository} holds a {GRID} that edmdistill did not put there, where the card shows one: rename it "
            "there, or add --overwrite-card to replace it"
        )
    return PushPlan(before.sha, kept, contents.left_behind(package.files))


def _verify_download(package: Package, revision: str, kept: Collection[str]) -> None:
    """Downloads a revision.  Raises: HubError: its files but `kept`, or the samples from it, differ from those sent."""
    where = f"{package.repository}@{revision:.8}"
    with temporary_folder() as fresh:
        with hub_calls(f"{where} is published, but cannot be downloaded to check it", temporary=True):
            snapshot_download(
                package.repository, revision=revision, local_dir=fresh, allow_patterns=list(package.files)
            )
        sent = {name: file for name, file in package.files.items() if name not in kept}
        whole = all(_has_bytes(Path(fresh) / name, file) for name, file in sent.items())
        same = whole and difference_of(_comparison_samples(load_model(fresh)), package.samples) <= IMAGE_TOLERANCE
    if not same:
        raise HubError(
            f"{where} was published, but draws other images than here: do not use it, and run the same command again"
        )


def _has_bytes(path: Path, content: Path | bytes) -> bool:
    """Returns whether a file has these bytes, or those of another file."""
    return path.read_bytes() == content if isinstance(content, bytes) else filecmp.cmp(path, content, shallow=False)


def _comparison_samples(model: Generator | Denoiser) -> Tensor:
    nfe = default_nfe(model.config) if isinstance(model, Generator) else 3
    return require_finite(sample(model, nfe, seeds=COMPARISON_SEEDS), COMPARISON_SEEDS)


def _decoder(model: Generator | Denoiser, vae: str | None) -> Decoder | None:
    """Returns what turns the model's images into pictures; None for latents whose VAE is not on this machine.

    Raises: CheckpointError: the VAE cannot be used.  EdmDistillError: a VAE for a network that works on pixels.
    """
    try:
        return model_decoder(model, vae)
    except NoDecoder:
        if vae is not None:
            raise
        return None


def _grid(model: Generator, nfe: int, decoder: Decoder) -> bytes:
    """Returns a picture of the first seeds, with class = seed modulo the number of classes."""
    classes = model.flow.label_dim
    labels = [seed % classes for seed in range(GRID_SIZE)] if classes else None
    images = require_finite(sample(model, nfe, seeds=range(GRID_SIZE), labels=labels), range(GRID_SIZE))
    return signed_png(image_grid(thumbnails(decoder(images)), GRID_COLUMNS))


def _publishable_results(config: CheckpointConfig, path: Path, address: str) -> list[Result]:
    """Returns the results of a checkpoint and of its teacher, without paths of this machine."""
    measured = load_results(path)
    results = [_with_source(result, address) for result in measured if was_measured_on(result, config)]
    return results + [_with_source(result, None) for result in measured if is_of_teacher(result)]


def _with_source(result: Result, source: str | None) -> Result:
    return replace(result, provenance=result.provenance | {"source": source})
