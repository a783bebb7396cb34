"""Libraries of an extra: what needs one says how to install it, or why it cannot be imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from edmdistill.errors import EdmDistillError

PACKAGES = {"sklearn": "scikit-learn"}
"""Packages by the modules whose names are not theirs."""


@contextmanager
def importing(
    library: str, *, extra: str, needed_by: str, error: type[EdmDistillError] = EdmDistillError, instead: str = ""
) -> Iterator[None]:
    """A context for the import of a library, whose failures become one sentence.

    Args:
        library: the package, as pip names it.
        extra: of edmdistill, which brings it.
        needed_by: the beginning of the sentence, with its verb.
        error: what is raised.
        instead: the end of the sentence: another way out.
    Raises: `error`: it, or what it imports, is not installed, or cannot be imported.
    """
    try:
        yield
    except Exception as reason:  # a library that does not fit the others fails in any way
        module = (reason.name or "").partition(".")[0] if isinstance(reason, ModuleNotFoundError) else ""
        if module and find_spec(module) is None:
            missing = PACKAGES.get(module, module)
            raise error(_not_installed(missing, extra, needed_by) + instead) from reason
        why = " ".join(str(reason).split()) or type(reason).__name__
        raise error(
            f"{needed_by} {library}, which is installed, but cannot be imported ({why.rstrip('.')}): "
            f"pip install --upgrade {library}{instead}"
        ) from reason


def require_installed(library: str, *, extra: str, needed_by: str, error: type[EdmDistillError]) -> None:
    """Checks at once, without its slow import, that a library is there; it may still fail.

    Args, Raises: as for `importing`; the package has its module's name.
    """
    if find_spec(library) is None:
        raise error(_not_installed(library, extra, needed_by))


def _not_installed(library: str, extra: str, needed_by: str) -> str:
    return f"{needed_by} {library}, which is not installed: pip install 'edmdistill[{extra}]'"
