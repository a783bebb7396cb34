"""Front matter, licences and names in cards: what comes from outside stays text, and adds no field."""

import ast
import re
import textwrap
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.checkpoints.documents import front_matter
from edmdistill.checkpoints.load import load_flow
from edmdistill.checkpoints.store import _card
from edmdistill.errors import printable
from edmdistill.export.folder import TARGETS
from edmdistill.export.folder import _card as export_card
from edmdistill.publish.card import card

CONFIG = msgspec.json.decode(
    (Path(__file__).parent.parent / "checkpoints" / "format-1.0" / "config.json").read_bytes(), type=CheckpointConfig
)
HOSTILE = 'mit\nlicense: apache-2.0\nextra: "x" # {{a: [b\n---\n# Title\n<script>alert(1)</script>'
NAMES = st.text(max_size=40) | st.sampled_from(
    [
        HOSTILE,
        "---",
        "a\n---\nb",
        "yes",
        "null",
        "1e3",
        "- a",
        "a: b",
        "`x`",
        "``` \n# x",
        "| a |",
        "\u202egnp.exe",
        "\x1b[2J",
    ]
)


def written_cards(config: CheckpointConfig) -> list[str]:
    """Every kind of README.md that is written of a checkpoint."""
    exports = [export_card(target, config, "", ()) for target in TARGETS.values()]
    return [card(config, "me/digits"), _card(config), *exports]


def header(text: str) -> dict[str, object]:
    mark, fields, _ = text.split("---\n", 2)
    assert mark == ""
    loaded = yaml.safe_load(fields)
    assert isinstance(loaded, dict)
    return loaded


def hostile(name: str) -> CheckpointConfig:
    origin = replace(CONFIG.provenance, source=name, licence=name, sha256=name, parent=name)
    return replace(CONFIG, provenance=origin, method=name, recipe_hash=name, ema={name: name}, label_names=None)


@settings(max_examples=40)
@given(NAMES)
@example(HOSTILE)
def test_no_name_adds_a_field_or_ends_the_header(name: str) -> None:
    for text, plain in zip(written_cards(hostile(name)), written_cards(CONFIG), strict=True):
        fields = header(text)
        assert fields.keys() - {"license_name", "base_model"} == header(plain).keys() - {"base_model", "license_name"}
        assert "license" in fields
        assert isinstance(fields["license"], str)
        assert re.fullmatch(r"[a-z0-9.+-]+", fields["license"])
        assert fields.get("title") == header(plain).get("title")


@settings(max_examples=40)
@given(NAMES)
@example(HOSTILE)
def test_no_name_is_markup_or_controls_what_shows_it(name: str) -> None:
    for text, plain in zip(written_cards(hostile(name)), written_cards(CONFIG), strict=True):
        body = text.split("---\n", 2)[2]
        text.encode()  # half a surrogate pair could not be written
        assert "<script" not in re.sub(r"(`+).*?\1", "", body)  # in code it is text
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]", text)
        headings = [line for line in body.splitlines() if re.match("#{1,6} ", line)]
        assert headings == [line for line in plain.split("---\n", 2)[2].splitlines() if re.match("#{1,6} ", line)]
        assert body.count("\n```") == plain.count("\n```")


@given(st.dictionaries(st.sampled_from(["title", "license", "tags"]), NAMES | st.lists(NAMES, max_size=2), min_size=1))
def test_front_matter_is_read_as_it_was_meant(fields: dict[str, object]) -> None:
    found = header(front_matter(fields))
    assert found.keys() == fields.keys()
    for name, value in fields.items():
        if isinstance(value, str):
            assert isinstance(found[name], str)
            assert found[name] == printable(value)


def test_no_name_is_code_in_what_a_readme_tells_to_run(golden: Path) -> None:
    flow, config = load_flow(golden / "edm2-latent-cond.pkl")
    name = '")\nimport os; os.system("x")  # `'
    config = replace(config, stage="generator", encoder={**config.encoder, "vae_name": name})
    for target in ("diffusers", "nvidia"):
        vae = TARGETS[target].without_vae or (lambda config: "")
        blocks = re.findall(r"(?m)((?:^    .*\n)+)", TARGETS[target].readme(flow, config) + vae(config))
        assert blocks
        for block in blocks:
            tree = ast.parse(textwrap.dedent(block))
            assert not any(isinstance(node, ast.Name) and node.id == "os" for node in ast.walk(tree))


def test_no_document_tells_a_secret() -> None:
    source = "https://me:password@host/edm.pkl?token=hf_abcdefghijklmnop#key"
    config = replace(CONFIG, provenance=replace(CONFIG.provenance, source=source))
    for text in [*written_cards(config), front_matter({"title": source})]:
        assert "https://host/edm.pkl" in text
        assert not re.search("password|token|hf_|key", text)


@pytest.mark.parametrize("licence", ["Apache-2.0", "my-licence-1.0", HOSTILE])
def test_the_licence_field_is_one_that_the_hub_takes(licence: str) -> None:
    config = replace(CONFIG, provenance=replace(CONFIG.provenance, licence=licence))
    expected = {
        "Apache-2.0": {"license": "apache-2.0"},
        "my-licence-1.0": {"license": "other", "license_name": "my-licence-1.0"},
        HOSTILE: {"license": "other"},
    }[licence]
    for text in written_cards(config):
        fields = header(text)
        assert {name: fields[name] for name in fields if name.startswith("license")} == expected
