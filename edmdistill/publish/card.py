"""The card: a checkpoint's page on the Hub, all of it from the checkpoint and the run that made it.

The note that every checkpoint on a disk carries is store.py's; this takes its place when the checkpoint is published.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from edmdistill import __version__
from edmdistill.checkpoints.config import CheckpointConfig, unfinished
from edmdistill.checkpoints.documents import code, code_block, front_matter, markdown
from edmdistill.checkpoints.licences import licence_fields
from edmdistill.checkpoints.source import repository_of
from edmdistill.evaluation.results import Result
from edmdistill.evaluation.tables import GeneratorId, best_gamma_results, result_tables
from edmdistill.methods import METHODS
from edmdistill.report.summary import RunSummary

TASK = "unconditional-image-generation"
CITATIONS = Path(__file__).parent.parent / "assets" / "citations.bib"


def card(
    config: CheckpointConfig,
    repository: str,
    *,
    run: RunSummary | None = None,
    results: Sequence[Result] = (),
    grid: tuple[str, str] | None = None,
) -> str:
    """The text of README.md: the Hub's header, then what a stranger has to know.

    Args:
        repository: OWNER/NAME, where the checkpoint is going to be.
        run: the run that made it.
        results: of it and of its teacher; where they differ in gamma alone, the best is shown.
        grid: a picture's file name there, and what is on it.
    """
    results = best_gamma_results(results)
    sections = {
        "Use": _use(config, repository),
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
    """Whether a result was measured on this checkpoint, by what it says of where it comes from."""
    said = result.provenance
    same = (said.get("recipe_hash"), said.get("images_seen")) == (config.recipe_hash, config.images_seen)
    return result.sampler is not None and said.get("method") is not None and same


def _header(config: CheckpointConfig, repository: str, results: Sequence[Result]) -> str:
    """The Hub's metadata."""
    evaluated = [point for result in results if was_measured_on(result, config) for point in _evaluated(result)]
    data = ModelCardData(
        **licence_fields(config.provenance.licence),  # type: ignore[arg-type]  # of names that it takes as well
        library_name="edmdistill",
        pipeline_tag=TASK,
        tags=["diffusion", *["distillation"] * _taught(config), config.stage, *filter(None, [config.method])],
        base_model=repository_of(config.provenance.source),
        model_name=repository.partition("/")[2] if evaluated else None,
        eval_results=evaluated or None,
    )
    return front_matter(data.to_dict())  # type: ignore[no-untyped-call]


def _evaluated(result: Result) -> list[EvalResult]:
    """A result as the Hub's model-index has it, a point for each metric."""
    own, sampler = result.protocol, result.sampler
    assert sampler is not None
    assert own.reference is not None
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=own.reference.source,
            dataset_name=own.reference.source,
            dataset_split=own.reference.split,
            metric_type=metric,
            metric_value=value,
            metric_name=f"{metric}, {sampler.nfe} NFE",
            metric_args={"nfe": sampler.nfe}
            | ({"gamma": sampler.gamma} if sampler.gamma is not None and sampler.nfe > 1 else {})
            | ({"guidance": sampler.guidance} if sampler.guidance != 1 else {})
            | {"protocol": own.name, "protocol_sha256": result.protocol_sha256},
        )
        for metric, value in result.metrics.items()
    ]


# Sections.


def _what(config: CheckpointConfig) -> str:
    """What this is, in a sentence."""
    size, classes = config.network.arguments["img_resolution"], config.label_dim
    kind = "images" if config.encoder["kind"] == "pixels" else "latents of a VAE"
    draws = f"{size}x{size} {kind}, {f'of {classes} classes' if classes else 'without classes'}"
    if config.stage != "generator":
        return f"A diffusion model of {draws}, in edmdistill's TrigFlow format."
    method = METHODS.get(config.method or "")
    how = f" {method.summary}" if method else ""
    origin = markdown(f"made by {config.method} from {config.provenance.source}")
    return f"A few-step generator of {draws}, {origin}.{how}"


def _use(config: CheckpointConfig, repository: str) -> str:
    latent, generator = config.encoder["kind"] != "pixels", config.stage == "generator"
    nfe = default_nfe(config) if generator else 35
    out = "latents.npz" if latent else "images"
    load = "load_generator" if generator else "load_denoiser"
    own = " Each seed draws its own class, unless `--class` or `labels` name one." if config.label_dim else ""
    shell = f"pip install edmdistill\nedmdistill sample {repository} --nfe {nfe} --seeds 0-63 --out {out}"
    python = (
        f'import edmdistill\n\nmodel = edmdistill.{load}("{repository}")\n'
        f"images = edmdistill.sample(model, nfe={nfe}, seeds=range(64))"
    )
    return (
        f"{code_block(shell, 'sh')}\n\n{code_block(python, 'python')}\n\n"
        f"Made by edmdistill {__version__}; an older one may not read it. "
        f"`{repository}@REVISION` is another branch, a tag or a commit. What was downloaded once needs no network.{own}"
    )


def _quality(config: CheckpointConfig, results: Sequence[Result]) -> str:
    own = GeneratorId(config.recipe_hash or "", config.images_seen or 0)
    measured = result_tables([result for result in results if result.sampler], own)
    if not measured:
        return "It was not measured."
    return "\n\n".join(
        "\n\n".join(filter(None, (t.to_markdown(), markdown(t.caption), markdown(t.claim)))) for t in measured
    )


def _schedule(config: CheckpointConfig) -> str:
    if config.stage != "generator":
        return ""
    own = config.sampling
    rows = [f"| {nfe} | {' '.join(f'{sigma:g}' for sigma in own.sigmas[nfe])} |" for nfe in sorted(own.sigmas, key=int)]
    table = "\n".join(["| NFE | noise levels sigma |", "|---|---|", *rows]) + "\n\n" if rows else ""
    return (
        f"{table}{'Other numbers' if rows else 'All numbers'} of evaluations take EDM's curve from sigma "
        f"{config.sigma_max:g} to {config.sigma_min:g}. Between two evaluations the share of fresh noise is gamma = "
        f"{own.gamma:g}, unless `--gamma` says otherwise."
    )


def _made(config: CheckpointConfig, run: RunSummary | None) -> str:
    origin = config.provenance
    facts: dict[str, str | None] = {
        "Teacher" if _taught(config) else "Source": markdown(origin.source)
        + (f", sha256 {code(origin.sha256)}" if origin.sha256 else ""),
        "Started from": f"the checkpoint of sha256 {code(origin.parent)}" if origin.parent else None,
        "Network": markdown(f"{config.network.kind}, preconditioned as {config.preconditioning['kind']}"),
        "Method": markdown(config.method or ""),
        "Guidance of the teacher": config.guidance.words if config.guidance else None,
        "Recipe": f"hash {code(config.recipe_hash)}" if config.recipe_hash else None,
        "Images seen": f"{config.images_seen:,}" if config.images_seen is not None else None,
        "Average of the weights": markdown(_words(config.ema)),
    }
    if run is None:
        return _list(f"{name}: {fact}" for name, fact in facts.items() if fact)
    data = run.data
    _, name, *sets = run.train_arguments
    recipe = [Path(name).name if name.endswith(".toml") else name, *sets]  # where it lies is nobody's business
    facts["Recipe"] = f"{markdown(shlex.join(recipe))}, {facts['Recipe']}"
    facts["Data"] = markdown(f"{data['name']}, {data['images']:,} images, {data['resolution']}x{data['resolution']}")
    teacher = [] if run.recipe.network else ["TEACHER"]
    words = ["edmdistill", "train", run.recipe.method_name, *teacher, "--data", data["name"], "--recipe", *recipe]
    whole = run.recipe.to_json().decode().strip()
    return (
        f"{_list(f'{name}: {fact}' for name, fact in facts.items() if fact)}\n\n"
        f"{code_block(f'{shlex.join(words)} --run-dir RUN', 'sh')}\n\n"
        f"<details><summary>The recipe, with every default</summary>\n\n{code_block(whole, 'json')}\n\n</details>"
    )


def _limits(config: CheckpointConfig, run: RunSummary | None, results: Sequence[Result]) -> list[str]:
    """What it cannot do, as far as its own files tell."""
    generator = config.stage == "generator"
    limits = ["It draws what its training data show, with their gaps and their biases, and knows no text."]
    if generator:
        if _taught(config):
            limits.append("It was made to be like its teacher, and has the teacher's faults as well as its own.")
        named = ", ".join(sorted(config.sampling.sigmas, key=int))
        if named:
            limits.append(
                f"Beyond one evaluation, its schedules are for {named}; other numbers work, and may draw worse."
            )
    if config.encoder["kind"] != "pixels":
        limits.append("It draws latents; the VAE that turns them into images is not part of it.")
    if sentence := unfinished(config):
        limits.append(sentence)
    if any(was_measured_on(result, config) for result in results):
        limits.append(
            "Its quality is known under the protocols above alone; figures of other protocols do not compare."
        )
    return limits


def _taught(config: CheckpointConfig) -> bool:
    """Whether it is a generator that had a teacher."""
    method = METHODS.get(config.method or "")
    if config.stage != "generator" or config.provenance.parent is None:  # CTM has none if it began from nothing
        return False
    return method is None or "teacher" in method.load().roles


def _licence(config: CheckpointConfig) -> str:
    licence = config.provenance.licence or "a licence that is not known"
    parts = [f"The weights are under {markdown(licence)}."]
    if "-nc" in licence:
        parts.append("They are not for commercial use.")
    if "-sa" in licence:
        parts.append("What is made from them goes under the same licence.")
    return " ".join(parts)


def _citations(config: CheckpointConfig) -> str:
    """BibTeX of the method's papers and the network's."""
    text = CITATIONS.read_text(encoding="utf-8")
    entries = {re.split("[{,]", entry)[1]: entry.strip() for entry in text.split("\n\n")}
    network = "karras2024edm2" if config.network.kind == "edm2" else "karras2022edm"
    method = METHODS.get(config.method or "")
    return "\n\n".join(entries[key] for key in (*(method.citations if method else ()), network))


def default_nfe(config: CheckpointConfig) -> int:
    """How many evaluations to show a generator with: 2, or the fewest that it has a schedule for."""
    own = [int(nfe) for nfe in config.sampling.sigmas]
    return 2 if 2 in own or not own else min(own)


def _words(facts: Mapping[str, object] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (facts or {}).items())


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
