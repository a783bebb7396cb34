"""Publishing to the Hub: the files that sampling needs, in one commit, verified by downloading them again.

Files that the Hub has are not sent again, so repeating an interrupted push resumes it.
"""

from __future__ import annotations

import filecmp
import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is, by name
from msgspec.structs import replace
from torch import Tensor

from edmdistill import __version__
from edmdistill.atomic import expanded, sha256_file, temporary_folder
from edmdistill.checkpoints.config import CheckpointConfig, default_nfe, read_config
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.hub_client import REPOSITORY, hub_calls
from edmdistill.checkpoints.layout import CARD, CONFIG, MODEL, PROGRESS, checkpoint_in
from edmdistill.checkpoints.licences import check_licence
from edmdistill.checkpoints.load import load_model
from edmdistill.errors import CheckpointError, HubError, NoDecoder, counted, without_secrets
from edmdistill.evaluation.results import Result, add_results, is_of_teacher, load_results
from edmdistill.export.parity import IMAGE_TOLERANCE, difference_of
from edmdistill.networks.flow import Denoiser
from edmdistill.publish.card import card, was_measured_on
from edmdistill.report.summary import read_run
from edmdistill.sampling.decode import Decoder, model_decoder
from edmdistill.sampling.generate import require_finite, sample
from edmdistill.sampling.grid import image_grid, thumbnails
from edmdistill.training.identity import RECIPE

GRID = "samples.png"
SIGNATURE = re.compile(
    rb"(?m)^edmdistill_card: ([0-9a-f]{64})\nedmdistill_model: ([0-9a-f]{64})\n"
    rb"(?:edmdistill_samples: ([0-9a-f]{64})\n)?"
)
"""Lines of a card's header: sha256 of the card without them, and of the weights and the picture published with it."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".onnx", ".pt2", ".h5", ".msgpack", ".gguf", ".npz")
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
        files: their paths or contents, by their names on the Hub.
        samples: of COMPARISON_SEEDS.
    """

    repository: str
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
    """The published revision, whether the Hub already had all of it, and whether the card there was kept."""

    url: str
    revision: str
    unchanged: bool
    kept_card: bool = False


def build_package(source: str | Path, repository: str, licence: str | None = None, vae: str | None = None) -> Package:
    """Collects the files to publish from a checkpoint or a run; nothing is sent.

    Args:
        source: a checkpoint folder, or a run directory.
        repository: OWNER/NAME.
        licence: of the weights, if the checkpoint has none, or a stricter one.
        vae: what decodes a latent generator's picture; see `open_decoder`. There is none without it.
    Raises: HubError: an invalid repository name or licence, or optimizer states.
        CheckpointError: no checkpoint, a damaged one, or a licence that the Hub does not accept.
    """
    path = expanded(source)
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise HubError(f"{repository} is not a repository name: {error}") from error
    if not REPOSITORY.fullmatch(repository):
        raise HubError(f"{repository} is not a repository name: write OWNER/NAME")
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
    results = _publishable_results(config, path, repository)
    config = add_results(config, [result for result in results if was_measured_on(result, config)])

    model = load_model(folder)
    files: dict[str, Path | bytes] = {MODEL: folder / MODEL}
    grid = picture = None
    decoder = _decoder(model, vae)
    if isinstance(model, Generator) and decoder is not None:
        nfe = default_nfe(config)
        files[GRID] = picture = _grid(model, nfe, decoder)
        grid = GRID, f"Seeds 0 to {GRID_SIZE - 1}, in {counted(nfe, 'evaluation')}."
    files[CONFIG] = msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"
    text = card(config, repository, run=run, results=results, grid=grid)
    files[CARD] = _signed(text, Signature(sha256_file(folder / MODEL), _digest(picture))).encode()
    return Package(repository, config, files, _comparison_samples(model))


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
    branch: str | None = None,
    message: str | None = None,
    replace_model: bool = False,
    overwrite_card: bool = False,
    on_message: Callable[[str], object] = lambda stage: None,
) -> Published:
    """Publishes a package, downloads it again, and compares its bytes, and the samples of two seeds up to rounding.

    A picture of an earlier push is removed if the package has none. Other files stay.

    Args:
        private: create the repository as private, or require that it is.
        branch: created if it does not exist; default: main.
        message: of the commit.
        replace_model: replace another model in the repository.
        overwrite_card: replace a card that was written or edited by hand.
        on_message: called with the name of each stage.
    Raises: HubError: the Hub refuses or cannot be reached, the download differs, or the repository has another model.
    """
    repository, api = package.repository, HfApi(library_name="edmdistill", library_version=__version__)
    if get_token() is None:
        raise HubError("you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    with hub_calls(f"{repository} is not published"):
        on_message("asking the Hub")
        api.create_repo(repository, private=private or None, exist_ok=True)
        try:
            before = api.model_info(repository, revision=branch, files_metadata=True)
        except RevisionNotFoundError:
            before = api.model_info(repository, files_metadata=True)  # the branch will start from it
        if private and not before.private:
            raise HubError(f"{repository} exists and is public: make it private in its settings, or choose another")
        contents = _read_repository(repository, before)
        if not replace_model and (other := _other_model(contents, package.config)):
            there = "" if branch is None else f" in the branch {branch} alone"
            raise HubError(
                f"{repository} holds {other}: choose another repository, or add --replace to replace it{there}"
            )
        kept_card = (
            not overwrite_card and contents.card not in (None, package.card) and _signature(contents.card) is None
        )
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        on_message("sending")
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, file) for name, file in package.files.items() if not (kept_card and name == CARD)]
            + [CommitOperationDelete(name) for name in contents.ours if name not in package.files],
            commit_message=message or f"A {package.config.stage} by edmdistill {__version__}",
            revision=branch,
            parent_commit=before.sha,
        )
    on_message("comparing")
    _verify_download(package, commit.oid)
    return Published(f"{api.endpoint}/{repository}/tree/{commit.oid}", commit.oid, commit.oid == before.sha, kept_card)


class RepositoryContents(NamedTuple):
    """The contents of a repository.

    Attributes:
        names: of its files.
        config: the downloaded config.json; None: it has none.
        card: the text of its README.md.
        model_sha256: of model.safetensors, if the Hub reports it.
        ours: names of files that an earlier push of ours made, which a package may lack.
    """

    names: list[str]
    config: Path | None
    card: bytes | None
    model_sha256: str | None
    ours: list[str]


def _read_repository(repository: str, info: ModelInfo) -> RepositoryContents:
    """Reads a repository, without its weights."""
    names = [file.rfilename for file in info.siblings or ()]

    def download(name: str) -> Path | None:
        return Path(hf_hub_download(repository, name, revision=info.sha)) if name in names else None

    path = download(CARD)
    card = path.read_bytes() if path else None
    model = next((file.lfs for file in info.siblings or () if file.rfilename == MODEL), None)
    signature = _signature(card)  # None for a card edited by hand, which may show the picture
    picture = download(GRID) if signature and signature.samples else None
    ours = [GRID] if picture and signature and sha256_file(picture) == signature.samples else []
    return RepositoryContents(names, download(CONFIG), card, model.sha256 if model else None, ours)


def _other_model(contents: RepositoryContents, config: CheckpointConfig) -> str | None:
    """Describes another model in the repository; None: it has this model, an earlier state of it, or none."""
    if contents.config is None:
        if foreign := [name for name in contents.names if name != MODEL and name.endswith(WEIGHTS)]:
            return f"the weights of another program, {foreign[0]}"
        return "weights that edmdistill did not put there" if MODEL in contents.names else None
    try:
        published = read_config(contents.config.parent)
    except CheckpointError:
        return f"another program's model, with a {CONFIG} of its own"
    theirs, ours = _identity(published), _identity(config)
    if others := [name for name, value in ours.items() if theirs[name] != value]:
        return (
            f"another model, {_describe(published)}, where this is {_describe(config)}, with another "
            f"{' and another '.join(others)}"
        )
    signed = _signature(contents.card)  # None for a card edited by hand
    if signed and contents.model_sha256 not in (None, signed.model):
        return f"a {MODEL} that edmdistill did not put there"
    return None


def _identity(config: CheckpointConfig) -> dict[str, object]:
    """Returns the fields that further training, measuring and averaging do not change, by their names."""
    origin = config.provenance
    return {
        "stage": config.stage,
        "method": config.method,
        "recipe": config.recipe_hash,
        "source": origin.sha256,
        "parent": origin.parent,
        "guide": origin.guide,
        "init": origin.init,
    }


def _describe(config: CheckpointConfig) -> str:
    origin = config.provenance
    by = f" by {config.method}, recipe {config.recipe_hash or '-':.12}," if config.method else ""
    return f"a {config.stage}{by} from {origin.source} ({origin.sha256 or origin.parent or '-':.12})"


class Signature(NamedTuple):
    """sha256 of what was published with a card: the weights, and the picture if there was one."""

    model: str
    samples: str | None


def _signed(card: str, signature: Signature) -> str:
    """Returns the card with a header that shows later changes of it, or of what is published beside it."""
    lines = f"edmdistill_card: {_digest(card.encode())}\nedmdistill_model: {signature.model}\n"
    lines += f"edmdistill_samples: {signature.samples}\n" if signature.samples else ""
    return card.replace("\n---\n", f"\n{lines}---\n", 1)


def _digest(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _signature(card: bytes | None) -> Signature | None:
    """Returns what a card was published with; None: the card was edited or is not ours."""
    text = (card or b"").replace(b"\r\n", b"\n")
    match = SIGNATURE.search(text)
    if match is None or _digest(SIGNATURE.sub(b"", text, count=1)) != match[1].decode():
        return None
    return Signature(match[2].decode(), match[3].decode() if match[3] else None)


def _verify_download(package: Package, revision: str) -> None:
    """Downloads a revision.  Raises: HubError: its files, or the samples from it, differ from those sent."""
    where = f"{package.repository}@{revision:.8}"
    with temporary_folder() as fresh:
        with hub_calls(f"{where} is published, but cannot be downloaded to check it", temporary=True):
            snapshot_download(
                package.repository, revision=revision, local_dir=fresh, allow_patterns=list(package.files)
            )
        sent = {name: file for name, file in package.files.items() if name != CARD}  # the card there may have been kept
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
    image_grid(thumbnails(decoder(images)), GRID_COLUMNS).save(data := io.BytesIO(), "png")
    return data.getvalue()


def _publishable_results(config: CheckpointConfig, path: Path, repository: str) -> list[Result]:
    """Returns the results of a checkpoint and of its teacher, without paths of this machine."""
    measured = load_results(path)
    results = [_with_source(result, repository) for result in measured if was_measured_on(result, config)]
    return results + [_with_source(result, None) for result in measured if is_of_teacher(result)]


def _with_source(result: Result, source: str | None) -> Result:
    return replace(result, provenance=result.provenance | {"source": source})
