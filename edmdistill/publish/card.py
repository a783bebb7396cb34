"""The model card: a checkpoint's page on the Hub, written from the checkpoint and the run that made it.

It replaces the short README.md that every checkpoint on disk has.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from edmdistill import __version__
from edmdistill.checkpoints.config import CheckpointConfig, default_nfe, unfinished
from edmdistill.checkpoints.documents import code, code_block, front_matter, markdown
from edmdistill.checkpoints.encoder import vae_words
from edmdistill.checkpoints.licences import licence_fields
from edmdistill.checkpoints.source import repository_of
from edmdistill.errors import counted
from edmdistill.evaluation.results import Result
from edmdistill.evaluation.tables import GeneratorId, best_gamma_results, result_tables
from edmdistill.methods import METHODS
from edmdistill.report.summary import RunSummary

TASK = "unconditional-image-generation"
CITATIONS = Path(__file__).parent.parent / "assets" / "citations.bib"


def card(
    config: CheckpointConfig,
    address: str,
    *,
    run: RunSummary | None = None,
    results: Sequence[Result] = (),
    grid: tuple[str, str] | None = None,
) -> str:
    """Returns the text of README.md: the Hub's metadata, then the sections.

    Args:
        address: OWNER/NAME, where the checkpoint is published, or OWNER/NAME@BRANCH.
        run: the run that made it.
        results: of it and of its teacher; of those that differ only in gamma, the best is shown.
        grid: the file name of a picture, and its caption.
    """
    results, repository = best_gamma_results(results), address.partition("@")[0]
    sections = {
        "Use": _use(config, address),
        "Quality": _quality(config, results),
        "Schedule": _schedule(config),
        "How it was made": _made(config, run),
        "Limits": _list(_limits(config, run, results)),
        "Licence": _licence(config),
        "Citation": code_block(_citations(config), "bibtex"),
    }
    picture = f"![{grid[1]}]({grid[0]})\n\n{grid[1]}\n\n" if grid else ""
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    title = f"# {markdown(repository.partition('/')[2])}\n\n{_what(config)}"
    return f"{_header(config, repository, results)}\n{title}\n\n{picture}{body}\n"


def was_measured_on(result: Result, config: CheckpointConfig) -> bool:
    """Returns whether a result was measured on this checkpoint, by its provenance."""
    origin = result.provenance
    same = (origin.get("recipe_hash"), origin.get("images_seen")) == (config.recipe_hash, config.images_seen)
    return result.sampler is not None and origin.get("method") is not None and same


def _header(config: CheckpointConfig, repository: str, results: Sequence[Result]) -> str:
    """Returns the Hub's metadata."""
    evaluated = [point for result in results if was_measured_on(result, config) for point in _evaluated(result)]
    data = ModelCardData(
        **licence_fields(config.provenance.licence),  # type: ignore[arg-type]  # names it accepts too
        library_name="edmdistill",
        pipeline_tag=TASK,
        tags=["diffusion", *["distillation"] * _has_teacher(config), config.stage, *filter(None, [config.method])],
        base_model=repository_of(config.provenance.source),
        model_name=repository.partition("/")[2] if evaluated else None,
        eval_results=evaluated or None,
    )
    return front_matter(data.to_dict())  # type: ignore[no-untyped-call]


def _evaluated(result: Result) -> list[EvalResult]:
    """Returns a result as entries of the Hub's model-index, one for each metric."""
    protocol, sampler = result.protocol, result.sampler
    assert sampler is not None
    assert protocol.reference is not None
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=protocol.reference.source,
            dataset_name=protocol.reference.source,
            dataset_split=protocol.reference.split,
            metric_type=metric,
            metric_value=value,
            metric_name=f"{metric}, {sampler.nfe} NFE",
            metric_args={"nfe": sampler.nfe}
            | ({"gamma": sampler.gamma} if sampler.gamma is not None and sampler.nfe > 1 else {})
            | ({"guidance": sampler.guidance} if sampler.guidance != 1 else {})
            | {"protocol": protocol.name, "protocol_sha256": result.protocol_sha256},
        )
        for metric, value in result.metrics.items()
    ]


# Sections.


def _what(config: CheckpointConfig) -> str:
    """Says what this is in a sentence."""
    size, classes = config.network.arguments["img_resolution"], config.label_dim
    kind = "latents of a VAE" if config.latent else "images"
    content = f"{size}x{size} {kind}, {'of ' + counted(classes, 'class') if classes else 'without classes'}"
    if config.stage != "generator":
        return f"A diffusion model of {content}, in edmdistill's TrigFlow format."
    method = METHODS.get(config.method or "")
    how = f" {method.summary}" if method else ""
    origin = markdown(f"made by {config.method} from {config.provenance.source}")
    return f"A few-step generator of {content}, {origin}.{how}"


def _use(config: CheckpointConfig, address: str) -> str:
    latent, generator = config.latent, config.stage == "generator"
    nfe = default_nfe(config) if generator else 35
    load = "load_generator" if generator else "load_denoiser"
    classes = " The seed also chooses the class, unless `--class` or `labels` name one." if config.label_dim else ""
    vae, repository = vae_words(config.encoder), address.partition("@")[0]
    words = ["edmdistill", "sample", address, "--nfe", str(nfe), "--seeds", "0-63", *vae, "--out", "images"]
    package = "'edmdistill[latent]'" if latent else "edmdistill"
    shell = f"pip install {package}\n{shlex.join(words)}"
    python = (
        f'import edmdistill\n\nmodel = edmdistill.{load}("{address}")\n'
        f"{'latents' if latent else 'images'} = edmdistill.sample(model, nfe={nfe}, seeds=range(64))"
    )
    if latent:
        python = f"from edmdistill.sampling.decode import model_decoder\n{python}\n"
        python += f"images = model_decoder(model, {json.dumps(vae[1])})(latents)"
    return (
        f"{code_block(shell, 'sh')}\n\n{code_block(python, 'python')}\n\n"
        f"Made with edmdistill {__version__}; older versions may not read it. "
        f"`{repository}@REVISION` names a branch, tag or commit. Only the first use needs the network.{classes}"
    )


def _quality(config: CheckpointConfig, results: Sequence[Result]) -> str:
    generator = GeneratorId(config.recipe_hash or "", config.images_seen or 0)
    measured = result_tables([result for result in results if result.sampler], generator)
    if not measured:
        return "Not measured."
    return "\n\n".join(
        "\n\n".join(filter(None, (t.to_markdown(), markdown(t.caption), markdown(t.claim)))) for t in measured
    )


def _schedule(config: CheckpointConfig) -> str:
    if config.stage != "generator":
        return ""
    sampling = config.sampling
    schedules = sorted(sampling.sigmas.items(), key=lambda item: int(item[0]))
    rows = [f"| {nfe} | {' '.join(f'{sigma:g}' for sigma in sigmas)} |" for nfe, sigmas in schedules]
    table = "\n".join(["| NFE | noise levels sigma |", "|---|---|", *rows]) + "\n\n" if rows else ""
    return (
        f"{table}{'Other' if rows else 'All'} numbers of evaluations use EDM's schedule from sigma "
        f"{config.sigma_max:g} to {config.sigma_min:g}. Between two evaluations, the share of fresh noise is gamma = "
        f"{sampling.gamma:g} by default; `--gamma` changes it.{_tuned(config)}"
    )


def _tuned(config: CheckpointConfig) -> str:
    """Returns the measurements by which schedules were tuned, as a list."""
    used = {nfe: one for nfe, one in config.tunings.items() if config.sampling.sigmas.get(nfe) == one.sigmas}
    if not used:
        return ""
    lines = [
        f"{nfe}: {markdown(f'{one.words}, protocol {one.protocol}')}; before, they were "
        f"{' '.join(f'{sigma:.4g}' for sigma in one.before)}"
        for nfe, one in sorted(used.items(), key=lambda item: int(item[0]))
    ]
    return f"\n\nNoise levels tuned by `tune-schedule`, by number of evaluations:\n\n{_list(lines)}"


def _initialized(config: CheckpointConfig) -> str | None:
    """Returns the network from which it was trained: a generator by --init, else the teacher; None: it is unknown."""
    origin = config.provenance
    if origin.init:
        return f"the generator with sha256 {code(origin.init)}"
    return f"the checkpoint with sha256 {code(origin.parent)}" if origin.parent else None


def _made(config: CheckpointConfig, run: RunSummary | None) -> str:
    origin = config.provenance
    rows: dict[str, str | None] = {
        "Teacher" if _has_teacher(config) else "Source": markdown(origin.source)
        + (f", sha256 {code(origin.sha256)}" if origin.sha256 else ""),
        "Guide": f"the checkpoint with sha256 {code(origin.guide)}" if origin.guide else None,
        "Initialized from": _initialized(config),
        "Network": markdown(f"{config.network.kind}, preconditioned as {config.preconditioning['kind']}"),
        "Method": markdown(config.method or ""),
        "Guidance of the teacher": config.guidance.words if config.guidance else None,
        "Recipe": f"hash {code(config.recipe_hash)}" if config.recipe_hash else None,
        "Images seen": f"{config.images_seen:,}" if config.images_seen is not None else None,
        "Weight average (EMA)": markdown(_words(config.ema)),
    }
    if run is None:
        return _list(f"{name}: {text}" for name, text in rows.items() if text)
    data = run.data
    _, name, *sets = run.train_arguments
    recipe = [Path(name).name if name.endswith(".toml") else name, *sets]  # its folder is private
    rows["Recipe"] = f"{markdown(shlex.join(recipe))}, {rows['Recipe']}"
    rows["Data"] = markdown(
        f"{data['name']}, {counted(data['images'], 'image')}, {data['resolution']}x{data['resolution']}"
    )
    networks = [] if run.recipe.network else ["TEACHER"]
    networks += ["--guide", "GUIDE"] if origin.guide else []
    networks += ["--init", "GENERATOR"] if origin.init else []
    words = ["edmdistill", "train", run.recipe.method_name, *networks, "--data", data["name"], "--recipe", *recipe]
    whole = run.recipe.to_json().decode().strip()
    return (
        f"{_list(f'{name}: {text}' for name, text in rows.items() if text)}\n\n"
        f"{code_block(f'{shlex.join(words)} --run-dir RUN', 'sh')}\n\n"
        f"<details><summary>The recipe, with every default</summary>\n\n{code_block(whole, 'json')}\n\n</details>"
    )


def _limits(config: CheckpointConfig, run: RunSummary | None, results: Sequence[Result]) -> list[str]:
    """Returns the limits that its own files show."""
    generator = config.stage == "generator"
    limits = ["It reproduces its training data, with their gaps and biases, and does not take text prompts."]
    if generator:
        if _has_teacher(config):
            limits.append("It imitates its teacher, so it has the teacher's faults in addition to its own.")
        numbers = sorted(map(int, config.sampling.sigmas))
        if numbers:
            most = counted(numbers.pop(), "evaluation")
            limits.append(
                f"It has schedules for {', '.join([*map(str, numbers), most])}; other numbers work too, but quality "
                "may be lower."
            )
    if config.latent:
        name = markdown(str(config.encoder.get("vae_name", "that they were encoded by")))
        limits.append(f"It generates latents; the VAE that decodes them, {name}, is not included.")
    if sentence := unfinished(config):
        limits.append(sentence)
    if any(was_measured_on(result, config) for result in results):
        limits.append(
            "Its quality was measured only by the protocols above; results of other protocols do not compare."
        )
    return limits


def _has_teacher(config: CheckpointConfig) -> bool:
    """Returns whether it is a generator that had a teacher."""
    method = METHODS.get(config.method or "")
    if config.stage != "generator" or config.provenance.parent is None:  # CTM has none when trained from scratch
        return False
    if method is None:
        return True
    kind = method.load()
    return "teacher" in kind.roles and (not kind.first_stages or "diffusion" in kind.first_stages)


def _licence(config: CheckpointConfig) -> str:
    licence = config.provenance.licence or "an unknown licence"
    parts = [f"The weights are under {markdown(licence)}."]
    if "-nc" in licence:
        parts.append("Commercial use is not permitted.")
    if "-sa" in licence:
        parts.append("Derivatives must use the same licence.")
    return " ".join(parts)


def _citations(config: CheckpointConfig) -> str:
    """Returns BibTeX of the papers of the method and the network."""
    text = CITATIONS.read_text(encoding="utf-8")
    entries = {re.split("[{,]", entry)[1]: entry.strip() for entry in text.split("\n\n")}
    network = "karras2024edm2" if config.network.kind == "edm2" else "karras2022edm"
    method = METHODS.get(config.method or "")
    return "\n\n".join(entries[key] for key in (*(method.citations if method else ()), network))


def _words(values: Mapping[str, object] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items())


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
