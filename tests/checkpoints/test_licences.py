"""Licences: what the Hub takes, and what becomes of the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.checkpoints.licences import HUB_LICENCES, NAME, check_licence, licence_fields, licence_words
from edmdistill.errors import CheckpointError


@given(st.sampled_from(sorted(HUB_LICENCES)))
def test_every_identifier_of_the_hub_is_taken_in_any_case(licence: str) -> None:
    assert check_licence(f" {licence.upper()} ") == licence
    assert licence_fields(licence.title()) == {"license": licence}


@given(st.text() | st.from_regex(NAME, fullmatch=True))
def test_what_is_taken_is_an_identifier_or_a_name(text: str) -> None:
    try:
        licence = check_licence(text)
    except CheckpointError:
        assert licence_fields(text) == {"license": "other"}
        return
    assert licence in HUB_LICENCES or NAME.fullmatch(licence)
    assert check_licence(licence) == licence


def test_a_licence_without_an_identifier_keeps_its_name() -> None:
    assert licence_fields("NVIDIA-NC-1.0") == {"license": "other", "license_name": "nvidia-nc-1.0"}
    assert licence_fields(None) == {"license": "other"}


@pytest.mark.parametrize(
    "text", ["", " ", "mit\nlicense: apache-2.0", "mit\0", "my licence", "---", "a" * 200, "ÉTALAB", "<b>"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"^the licence .* is neither an identifier of the Hub nor a name"):
        check_licence(text)


def test_the_refusal_says_how_to_write_it() -> None:
    with pytest.raises(CheckpointError, match=r"write 'my-own-licence-1\.0'$"):
        check_licence("My Own Licence 1.0")
    with pytest.raises(CheckpointError, match=r"write 'our-licence-v2'$"):
        check_licence("(Our) licence (v2)")


def test_a_readme_says_what_is_known() -> None:
    assert licence_words(None) == "The licence of its weights is unknown."
    assert licence_words("my_*own*") == r"Its weights are under this licence: my\_\*own\*."
