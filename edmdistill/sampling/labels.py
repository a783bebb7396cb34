"""Finds classes by number or name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from edmdistill.errors import EdmDistillError, comma_separated


def find_classes(words: Sequence[str], label_dim: int, names: Sequence[str] | None) -> list[int]:
    """Returns the classes that words mean: each a name or number, see `find_class`, or a list of numbers as in 0,3-5.

    A comma is part of many names, so only numbers can be listed.
    Raises: EdmDistillError: no such class, or several of that name.
    """
    classes: list[int] = []
    for word in words:
        if re.fullmatch(r"\s*[0-9]+(-[0-9]+)?(\s*,\s*[0-9]+(-[0-9]+)?)*\s*", word) and not word.strip().isdecimal():
            for part in comma_separated(word, "--class"):
                first, _, last = part.partition("-")
                low, high = (find_class(number, label_dim, None) for number in (first, last or first))
                if low > high:
                    raise EdmDistillError(f"the classes {part} run backwards: write the lower number first")
                classes += range(low, high + 1)
        else:
            classes.append(find_class(word, label_dim, names))
    return classes


def find_class(word: str, label_dim: int, names: Sequence[str] | None) -> int:
    """Returns the class that a word means: a number, or a name, in any case.

    A whole name comes first, then one of its comma-separated synonyms, then the first words of one.
    Raises: EdmDistillError: no such class, or several of that name.
    """
    if not label_dim:
        raise EdmDistillError(f"class {word!r} was requested, but this network is unconditional: leave the class out")
    name, names = _normalize(word), names or ()
    synonyms = [[_normalize(part) for part in entry.split(",")] for entry in names]
    exact = [number for number, entry in enumerate(names) if _normalize(entry) == name]
    among = [number for number, parts in enumerate(synonyms) if name in parts]
    prefixed = [
        number for number, parts in enumerate(synonyms) if any(f"{part} ".startswith(f"{name} ") for part in parts)
    ]
    if name.isdecimal() and not exact and not among:
        matches = [int(name)] if len(name) < 10 else []
        if not matches or matches[0] >= label_dim:
            raise EdmDistillError(
                f"class {name[:30]} does not exist: this network's classes run from 0 to {label_dim - 1}"
            )
    else:
        matches = exact or among or (prefixed if name else [])
    if len(matches) == 1:
        return matches[0]
    if matches:
        candidates = ", ".join(f"{number} ({names[number]})" for number in matches[:8]) + (
            ", ..." if matches[8:] else ""
        )
        raise EdmDistillError(f"{word!r} means {len(matches)} classes, {candidates}: use the number of one")
    if not names:
        raise EdmDistillError(
            f"this checkpoint has no class names, so {word!r} cannot be found: use a number from 0 to {label_dim - 1}"
        )
    is_number = re.fullmatch(r"[-+.\d]+", name)
    near = [] if is_number else get_close_matches(name, [part for parts in synonyms for part in parts], n=3)
    hint = f"; classes run from 0 to {label_dim - 1}"
    if near:
        hint = f": did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?"
    elif label_dim <= 10 and not is_number:
        hint = f": classes are {', '.join(f'{number} ({entry})' for number, entry in enumerate(names))}"
    raise EdmDistillError(f"there is no class {word!r}{hint}")


def _normalize(name: str) -> str:
    """Returns a name in lower case, with single spaces."""
    return " ".join(name.lower().split())
