"""The errors that a user can cause: one sentence with what, where, what was found and what to do.

The command line prints them without a traceback and exits with 2. Everything else is a fault of ours and
keeps its traceback.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches


def printable(text: str) -> str:
    """Returns text on one line that says nothing to a terminal: control, format and undecodable characters escaped.

    All that comes from a file, a server or a user and is printed goes through here.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_secrets(text: str) -> str:
    """Returns text whose URLs keep scheme, host and path only, without tokens of the Hub.

    A user, a password, a query and a fragment may be secret; in what is kept, printed or published, they are not.
    """
    text = re.sub(r"\bhf_\w{8,}", "hf_***", text)
    return re.sub(r"(?i)\b[a-z][a-z0-9+.-]*://[^\s'\"<>]*", lambda match: public_address(match[0]), text)


def public_address(url: str) -> str:
    """Returns a URL's scheme, host and path alone.  Of hf://, a revision stays too."""
    scheme, slashes, rest = url.partition("://")
    host, slash, path = re.split(r"(?i)[?#]|%3f|%23", rest, maxsplit=1)[0].partition("/")
    host = host.rpartition("@")[2]
    if re.search(r":(?!\d*$)", host) and not host.startswith("["):  # no port: a password that holds a slash
        host, slash, path = "***", "", ""
    return scheme + slashes + host + slash + path


class EdmDistillError(Exception):
    """Base of every error that the user, not the program, can mend: a sentence, and lines below it if need be.

    What it says is printable and holds no secrets, whoever chose the names in it.
    """

    def __str__(self) -> str:
        return "\n".join(printable(without_secrets(str(line))) for line in self.args)

    exit_code = 2
    """Of a command that ends with it."""


class CheckpointError(EdmDistillError):
    """A checkpoint cannot be found, read, trusted or written."""


class RecipeError(EdmDistillError):
    """A recipe, or an override of it, says something that cannot be computed.

    Whatever it says is quoted, but cut where it is long.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(re.sub(r"\S{200,}", lambda match: f"{match[0][:100]}...", sentence))


class DatasetError(EdmDistillError):
    """A data set or a folder of images cannot be read, or does not fit the network."""


class TrainingError(EdmDistillError):
    """A run cannot start, go on or be resumed."""


class PeerFailed(TrainingError):
    """Another process of the run cannot go on, and says why: this one ends without a word."""


class NotFiniteError(EdmDistillError):
    """Samples or metrics hold NaN or infinity: the command did its work, and the result is not usable."""

    exit_code = 1


class HubError(EdmDistillError):
    """The Hugging Face Hub refused, or could not be reached."""


def did_you_mean(word: str, known: Iterable[str], most: int = 10, more: str = "") -> str:
    """Returns the end of a sentence on a name that is not known: the name that was probably meant, or what there is.

    Args:
        most: how many names are listed at most.
        more: what lists the others, a command.
    """
    names = list(known)
    if near := get_close_matches(word[:100], names, n=1):
        return f"did you mean {near[0]!r}?"
    listed = f"choose one of {', '.join(names[:most])}"
    if len(names) <= most:
        return listed
    return f"{listed} or {len(names) - most} more" + (f", which `{more}` lists" if more else "")
