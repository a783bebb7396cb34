"""Licences of weights, by the identifiers that the Hugging Face Hub uses."""

from __future__ import annotations

import re

from edmdistill.checkpoints.documents import markdown
from edmdistill.errors import CheckpointError

OTHER = "other"
HUB_LICENCES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0
    grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw openrail openrail++ osl-3.0
    other pddl postgresql unknown unlicense wtfpl zlib
    """.split()  # noqa: SIM905 - ninety lines, one a name, would hide the rest of the file
)
"""Source: https://huggingface.co/docs/hub/repositories-licenses"""
NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,94}[a-z0-9])?")
"""The form of `license_name`, the Hub's field for a licence without an identifier."""


def check_licence(text: str) -> str:
    """Returns a licence as the Hub writes it, in lower case: one of HUB_LICENCES, or a custom name.

    Raises: CheckpointError: the Hub would accept it neither as an identifier nor as a name.
    """
    licence = text.strip().lower()
    if licence in HUB_LICENCES or NAME.fullmatch(licence):
        return licence
    guess = re.sub(r"[^a-z0-9.]+", "-", licence)[:96].strip("-.")
    hint = f"write {guess!r}" if NAME.fullmatch(guess) else "write an identifier such as 'cc-by-4.0'"
    raise CheckpointError(
        f"the licence {text[:80]!r} is neither an identifier of the Hub nor a name of the letters a-z, digits, dots "
        f"and hyphens: {hint}"
    )


def licence_words(licence: str | None) -> str:
    """Returns a sentence for a README, in Markdown, on the licence of a checkpoint's weights; None: it is not known."""
    return (
        "The licence of its weights is unknown."
        if licence is None
        else f"Its weights are under this licence: {markdown(licence)}."
    )


def licence_fields(licence: str | None) -> dict[str, str]:
    """Returns the fields of a card's front matter that state a licence; an invalid name becomes `other`."""
    try:
        known = check_licence(licence or OTHER)
    except CheckpointError:
        known = OTHER
    return {"license": known} if known in HUB_LICENCES else {"license": OTHER, "license_name": known}
