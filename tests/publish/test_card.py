"""The card: what it says is what the checkpoint and its run say, and the Hub's own reader reads it."""

import re
import shutil
from pathlib import Path

import msgspec
import pytest
from huggingface_hub import ModelCard
from msgspec.structs import replace

from edmdistill.checkpoints.config import CheckpointConfig, Guidance, SamplingDefaults, read_config
from edmdistill.checkpoints.source import repository_of
from edmdistill.checkpoints.tuning import Tuning
from edmdistill.evaluation.protocol import PROTOCOLS, Reference
from edmdistill.evaluation.results import Result
from edmdistill.methods import METHODS
from edmdistill.publish.card import CITATIONS, card, was_measured_on
from edmdistill.recipes.library import load_recipe
from edmdistill.report.summary import read_run
from edmdistill.sampling.spec import SamplerRecord

GENERATOR = Path(__file__).parent.parent / "checkpoints" / "format-1.0"
CONFIG = read_config(GENERATOR)


def result(fd: float, nfe: int, config: CheckpointConfig | None = None, **said: object) -> Result:
    """A measurement of a generator, or of a teacher if there is no configuration."""
    reference = Reference(source="digits", split="train", n=1500, sha256="9" * 64)
    protocol = replace(PROTOCOLS["digits"], reference=reference)
    origin = {name: getattr(config, name) for name in ("method", "recipe_hash", "images_seen")} if config else {}
    return Result(
        metrics={"fd_digits": fd},
        protocol=protocol,
        protocol_sha256=protocol.sha256(),
        sampler=SamplerRecord(solver="gamma" if config else "heun", nfe=nfe),
        provenance=origin | said,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with the generator of format-1.0 in it, trained by a file of its author's."""
    path = tmp_path / "run"
    shutil.copytree(GENERATOR, path / "generator")
    recipe = load_recipe("cosim/digits-quickstart", "cosim", ["training.seed=3"])
    (path / "recipe.resolved.json").write_bytes(recipe.to_json())
    (path / "recipe.toml").write_text(f"# Trained by --recipe {tmp_path}/mine.toml\n#   --set training.seed=3\n")
    data = {"name": "digits", "images": 1500, "resolution": 4, "channels": 1, "classes": 3}
    (path / "run.json").write_bytes(msgspec.json.encode({"data": data}))
    return path


def test_the_header_is_what_the_hub_reads():
    source = "hf://karras/edm/edm.pkl@v1"
    config = replace(CONFIG, provenance=replace(CONFIG.provenance, source=source))
    results = [result(4.5, 2, config), result(1.5, 35), result(9.0, 2, replace(config, images_seen=7))]
    data = ModelCard(card(config, "me/digits", results=results)).data
    assert (data.license, data.library_name) == ("cc-by-nc-sa-4.0", "edmdistill")
    assert (data.pipeline_tag, data.base_model) == ("unconditional-image-generation", "karras/edm")
    assert data.tags == ["diffusion", "distillation", "generator", "cosim"]
    (only,) = data.eval_results  # of the teacher, and of the generator at another time, nothing
    assert (only.metric_type, only.metric_value) == ("fd_digits", 4.5)
    assert (only.dataset_type, only.dataset_split, data.model_name) == ("digits", "train", "digits")
    assert only.metric_args == {"nfe": 2, "protocol": "digits", "protocol_sha256": results[0].protocol_sha256}


def test_of_several_gammas_the_best_is_shown_and_named():
    def at(gamma: float, fd: float, nfe: int = 2) -> Result:
        return replace(result(fd, nfe, CONFIG), sampler=SamplerRecord(solver="gamma", nfe=nfe, gamma=gamma))

    text = card(
        CONFIG, "me/digits", results=[at(0.0, 6.0), at(0.5, 4.0), at(1.0, 5.0), at(0.0, 8.0, 1), at(1.0, 8.0, 1)]
    )
    assert [line for line in text.splitlines() if line.startswith("| generator")] == [
        "| generator | 1 | 8.000 |  |",
        "| generator | 2 | 4.000 | gamma 0.5 |",
    ]
    by_score = replace(result(3.0, 3, CONFIG), sampler=SamplerRecord(solver="heun", nfe=3))
    (only,) = ModelCard(card(CONFIG, "me/digits", results=[by_score])).data.eval_results
    assert "gamma" not in only.metric_args
    shown = ModelCard(text).data.eval_results
    found = [(one.metric_value, one.metric_args["nfe"], one.metric_args.get("gamma")) for one in shown]
    assert sorted(found) == [(4.0, 2, 0.5), (8.0, 1, None)]  # in one step no gamma plays


def test_guidance_and_the_average_are_named():
    config = replace(CONFIG, guidance=Guidance("network", (2.0, 2.0)))
    guided = replace(result(4.5, 2, config), sampler=SamplerRecord(solver="gamma", nfe=2, guidance=2.0))
    text = card(config, "me/digits", results=[guided])
    (only,) = ModelCard(text).data.eval_results
    assert only.metric_args["guidance"] == 2.0
    for said in (
        "- Guidance of the teacher: by another network at weight 2",
        "- Weight average (EMA): half_life_images 50, rampup_ratio 0.05",
        f"- Initialized from: the checkpoint with sha256 `{'1' * 64}`",
        "- Images seen: 1,000",
    ):
        assert said in text, said
    ranged = card(replace(CONFIG, guidance=Guidance("classes", (1.0, 3.0))), "me/digits")
    assert "by its classes: --guidance takes 1 to 3" in ranged


def test_a_generator_that_began_from_another_says_so_and_how_to_repeat_it(run: Path):
    began = replace(CONFIG.provenance, init="2" * 64, guide="3" * 64)
    text = card(replace(CONFIG, provenance=began), "me/digits", run=read_run(run))
    assert f"- Initialized from: the generator with sha256 `{'2' * 64}`" in text
    assert f"- Guide: the checkpoint with sha256 `{'3' * 64}`" in text
    assert "\nedmdistill train cosim TEACHER --guide GUIDE --init GENERATOR --data digits --recipe" in text
    plain = card(CONFIG, "me/digits", run=read_run(run))
    assert "- Guide: " not in plain
    assert "\nedmdistill train cosim TEACHER --data digits --recipe" in plain


def test_a_method_that_makes_its_network_is_given_no_teacher(run: Path):
    recipe = load_recipe("diffusion/digits", "diffusion")
    (run / "recipe.resolved.json").write_bytes(recipe.to_json())
    (run / "recipe.toml").write_text("# Trained by --recipe diffusion/digits\n")
    text = card(replace(CONFIG, stage="teacher", method="diffusion"), "me/digits", run=read_run(run))
    assert "\nedmdistill train diffusion --data digits --recipe diffusion/digits --run-dir RUN\n" in text


def test_without_a_teacher_none_is_spoken_of():
    known = CONFIG.provenance
    nothing = replace(known, parent=None)  # what a generator without a teacher began from
    for method, origin, taught in (
        *(
            ("sct", known, False),
            ("scd", known, True),
            ("ctm", nothing, False),
            ("tcm", known, False),
            ("pd", known, True),
        ),
        ("consistency-model", known, True),  # another program's
    ):
        text = card(replace(CONFIG, method=method, provenance=origin), "me/digits")
        assert ("the teacher's faults" in text) is ("- Teacher: " in text) is taught
        assert ("distillation" in ModelCard(text).data.tags) is taught


def test_the_page_says_what_the_run_says(run: Path):
    config = replace(CONFIG, images_seen=1_000, images_total=80_000)
    text = card(config, "me/digits", run=read_run(run), results=[result(4.5, 2, config), result(1.5, 35)])
    assert re.findall("^## (.*)$", text, re.MULTILINE) == [
        *("Use", "Quality", "Schedule", "How it was made", "Limits", "Licence", "Citation")
    ]
    for said in (
        "edmdistill sample me/digits --nfe 2",
        'load_generator("me/digits")',
        "| teacher | 35 | 1.500 |",
        "| generator | 2 | 4.500 | 3.00 x |",
        "3.00 times the teacher's best of 1.500 with 35",
        "Protocol digits, sha256",
        "| 2 | 80 2.515 |",
        "gamma = 1",
        f"edm.pkl, sha256 `{'0' * 64}`",
        "Recipe: mine.toml --set training.seed=3, hash `abab",
        "edmdistill train cosim TEACHER --data digits --recipe mine.toml --set training.seed=3 --run-dir RUN",
        '"seed": 3,',
        "This generator is unfinished: 1,000 of 80,000 images seen.",
        "Commercial use is not permitted. Derivatives must use the same licence.",
        "Continuous Semi-Implicit Models",
        "Analyzing and Improving the Training Dynamics",
    ):
        assert said in text, said
    assert str(run.parent) not in text


def test_a_checkpoint_alone_says_less_and_nothing_wrong():
    text = card(replace(CONFIG, sampling=SamplingDefaults()), "me/digits")
    assert "Not measured." in text
    assert "All numbers of evaluations use EDM's schedule" in text
    assert "unfinished" not in text
    assert "RUN" not in text
    assert "model-index" not in text
    assert "model_name" not in text
    assert "It has schedules for" not in text


def test_what_is_unknown_is_not_said():
    origin = replace(CONFIG.provenance, sha256=None, licence=None, parent=None)
    text = card(replace(CONFIG, provenance=origin), "me/digits")
    assert re.search("^- Source: .*$", text, re.MULTILINE)[0] == "- Source: edm.pkl"  # type: ignore[index]
    assert "The weights are under an unknown licence." in text
    assert "None" not in text


def test_defaults_are_those_of_the_generator():
    text = card(replace(CONFIG, sampling=SamplingDefaults({"4": (80.0, 9.0, 2.0, 0.5)}, gamma=0.3)), "me/digits")
    assert "edmdistill sample me/digits --nfe 4 " in text
    assert "edmdistill.sample(model, nfe=4, " in text
    assert "gamma = 0.3 by default" in text


def test_names_from_strangers_stay_text():
    strange = "<b>x</b>*y*[z](http://z)"
    origin = replace(CONFIG.provenance, source=strange, licence=strange)
    text = card(replace(CONFIG, method=strange, provenance=origin, ema={strange: strange}), "me/digits")
    body = text.partition("\n---\n")[2]
    assert strange not in body
    for pattern in ("<b>", r"(?<!\\)\*y", r"(?<!\\)\[z"):
        assert not re.search(pattern, body), pattern


def test_a_teacher_has_a_card_too():
    config = replace(CONFIG, stage="teacher", method=None, recipe_hash=None, images_seen=None, ema=None)
    assert "\n- Source: edm.pkl, sha256 " in card(config, "me/teacher")  # whose weights another's may have been
    text = card(config, "me/teacher", results=[result(1.5, 35)])
    assert "model-index" not in text  # no result says that it is this network's
    assert 'load_denoiser("me/teacher")' in text
    assert "edmdistill sample me/teacher --nfe 35" in text
    assert "A diffusion model of 4x4 images, of 3 classes" in text
    assert "## Schedule" not in text
    assert "None" not in text


def test_without_classes_none_are_spoken_of():
    assert "The seed also chooses the class" in card(CONFIG, "me/digits")
    text = card(replace(CONFIG, label_dim=0, label_names=None), "me/digits")
    assert "A few-step generator of 4x4 images, without classes" in text
    assert "The seed also chooses the class" not in text


def test_schedules_are_in_order_and_only_those_in_use_are_tuned():
    levels = {"10": tuple(80.0 - i for i in range(10)), "2": (80.0, 2.0)}
    facts = {"metric": "fid", "protocol": "digits", "reference": None, "gamma": 1.0, "n": 50, "source_sha256": None}
    facts |= {
        "search_seeds": "0-49",
        "held_out_seeds": "50-99",
        "schedules": 3,
        "images": 300,
        "gain": 1.0,
        "spread": 0.1,
    }
    values = {"values": (2.0, 2.2), "before_values": (3.0, 3.2), "before": (80.0, 5.0)}
    tunings = {
        "2": Tuning(sigmas=(80.0, 2.0), **values, **facts),
        "10": Tuning(sigmas=(80.0,) * 10, **values, **facts),  # which was replaced by hand
        "12": Tuning(sigmas=(80.0,) * 12, **values, **facts),
    }
    levels["12"] = tunings["12"].sigmas
    config = replace(CONFIG, sampling=SamplingDefaults(levels), tunings=tunings)
    text = card(config, "me/digits")
    assert text.index("| 2 | 80 2 |") < text.index("| 10 | 80 79 78")
    assert "EDM's schedule from sigma 80 to 0.002" in text
    assert "schedules for 2, 10, 12 evaluations" in text
    tuned = text.partition("Noise levels tuned by")[2].partition("##")[0]
    assert re.findall("^- (.*?):", tuned, re.MULTILINE) == ["2", "12"]
    assert "fid 3.1 ± 0.14 -&gt; 2.1 ± 0.14 on 2 x 50 held-out seeds, protocol digits; before, they were 80 5" in tuned


def test_one_is_singular():
    config = replace(CONFIG, sampling=SamplingDefaults({"1": (80.0,)}), label_dim=1, label_names=None)
    text = card(config, "me/digits")
    assert "It has schedules for 1 evaluation; other numbers work too" in text
    assert "images, of 1 class, made by" in text


def test_results_of_images_are_no_results_of_the_generator():
    images = replace(result(1.0, 2, CONFIG), sampler=None)
    text = card(CONFIG, "me/digits", results=[images])
    assert "Not measured." in text
    assert "Its quality was measured only by" not in text
    assert "Its quality was measured only by" in card(CONFIG, "me/digits", results=[result(1.0, 2, CONFIG)])


def test_a_licence_is_read_by_its_parts():
    def terms(licence: str) -> str:
        config = replace(CONFIG, provenance=replace(CONFIG.provenance, licence=licence))
        return card(config, "me/digits").partition("## Licence")[2].partition("##")[0]

    for licence, commercial, alike in (
        ("ncsa", True, False),
        ("cc-by-nc-4.0", False, False),
        ("cc-by-sa-4.0", True, True),
    ):
        assert ("Commercial use is not permitted" in terms(licence)) is not commercial
        assert ("Derivatives must use the same licence" in terms(licence)) is alike


def test_latents_are_said_to_be_latents():
    encoder = {"kind": "StabilityVAEEncoder", "vae_name": "stabilityai/sd-vae-ft-mse"}
    text = card(replace(CONFIG, encoder=encoder), "me/latents")
    assert "A few-step generator of 4x4 latents of a VAE, of 3 classes" in text
    assert "pip install 'edmdistill[latent]'" in text
    assert "--vae stabilityai/sd-vae-ft-mse --out images" in text
    assert 'model_decoder(model, "stabilityai/sd-vae-ft-mse")(latents)' in text
    assert "the VAE that decodes them, stabilityai/sd-vae-ft-mse, is not included" in text
    assert "--vae DIR --out images" in card(replace(CONFIG, encoder=encoder | {"vae_name": "a folder"}), "me/latents")


def test_whose_result_it_is():
    assert was_measured_on(result(1, 2, CONFIG), CONFIG)
    assert not was_measured_on(result(1, 2), CONFIG)
    assert not was_measured_on(result(1, 2, CONFIG, recipe_hash="cd" * 32), CONFIG)
    assert not was_measured_on(replace(result(1, 2, CONFIG), sampler=None), CONFIG)


def test_every_method_is_cited():
    entries = re.findall(r"^@\w+\{(\w+),$", CITATIONS.read_text(), re.MULTILINE)
    assert len(entries) == len(set(entries))
    assert {key for method in METHODS.values() for key in method.citations} <= set(entries)
    for method in METHODS:
        text = card(replace(CONFIG, method=method), "me/digits")
        cited = text.partition("```bibtex\n")[2].partition("```")[0]
        assert re.findall(r"\{(\w+),\n", cited) == [*METHODS[method].citations, "karras2024edm2"]
        assert cited.count("{") == cited.count("}")
    for kind in ("song", "adm"):
        edm = card(replace(CONFIG, network=replace(CONFIG.network, kind=kind)), "me/digits")
        assert "{karras2022edm," in edm
        assert "{karras2024edm2," not in edm


@pytest.mark.parametrize(
    ("source", "repository"),
    [
        ("hf://me/teachers/sub/edm.pkl@v1", "me/teachers"),
        ("hf://me/teacher@v1", "me/teacher"),
        ("me/teacher", "me/teacher"),
        ("me/teacher@refs/pr/1", "me/teacher"),
        ("https://host/me/teacher", None),
        ("edm.pkl", None),
        ("a network trained by diffusion on digits", None),
    ],
)
def test_the_repository_of_a_source(source: str, repository: str | None):
    assert repository_of(source) == repository
