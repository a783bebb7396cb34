"""The errors that a user can cause: one sentence with what happened, where, and what to do.

The command line prints them without a traceback and exits with 2. Everything else is a bug and keeps its
traceback.
"""

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that it came from, each once, although an error may be raised from itself."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def printable(text: str) -> str:
    """Returns text on one line, safe to print: control, format and undecodable characters are escaped.

    Everything printed that comes from a file, a server or a user goes through here.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Returns text of several lines, each of them safe to print, as `printable` makes it."""
    return "\n".join(map(printable, text.split("\n")))


def without_secrets(text: str) -> str:
    """Returns text with URLs reduced to scheme, host and path, and without Hub tokens.

    User, password, query and fragment may be secret, and must not be stored, printed or published.
    """
    text = re.sub(r"\bhf_\w{8,}", "hf_***", text)
    return _ADDRESS.sub(_without_secrets, text)


_SCHEME, _QUERY = r"[a-z][a-z0-9+.-]{0,30}://", r"(?:[?#]|%3f|%23)"
_ADDRESS = re.compile(rf"(?i){_SCHEME}(?:(?!{_SCHEME}|{_QUERY})\S)*(?:{_QUERY}\S*)?")
"""An address to the next blank, because any other character may be in a query; or, before a query, to the next one."""


def _without_secrets(match: re.Match[str]) -> str:
    address = match[0].rstrip("]'\"<>).,;:")
    return public_address(address) + match[0][len(address) :]


def public_address(url: str) -> str:
    """Returns only the scheme, host and path of a URL, and the revision of an hf:// address."""
    scheme, slashes, rest = url.partition("://")
    host, slash, path = re.split(rf"(?i){_QUERY}", rest, maxsplit=1)[0].partition("/")
    host = host.rpartition("@")[2]
    if re.search(r":(?!\d*$)", host) and not host.startswith("["):  # no port: a password that holds a slash
        host, slash, path = "***", "", ""
    return scheme + slashes + host + slash + path


def _without_endless_words(text: str) -> str:
    return re.sub(r"\S{1000,}", lambda match: f"{match[0][:300]}...{match[0][-300:]}", text)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a sentence on what is kept, and what is lost."""


class EdmDistillError(Exception):
    """Base of all errors that the user can fix: a sentence, and more lines if needed.

    Its text is printable and contains no secrets, whatever names are in it, and of names without end it has the ends.
    """

    def __str__(self) -> str:
        return "\n".join(_without_endless_words(printable(without_secrets(str(line)))) for line in self.args)

    exit_code = 2
    """The exit code of a command that ends with this error."""


class CheckpointError(EdmDistillError):
    """A checkpoint cannot be found, read, trusted or written."""


INTACT = "use an intact copy"
"""What to do about a damaged file."""


class Damaged(CheckpointError):
    """A file of a checkpoint is not what was written.

    Attributes:
        fault: the sentence without what to do.
    """

    def __init__(self, fault: str, advice: str = INTACT) -> None:
        super().__init__(f"{fault}; {advice}")
        self.fault = fault


class NoDecoder(CheckpointError):
    """Nothing on this machine turns a network's images into pictures."""


class RecipeError(EdmDistillError):
    """A recipe or an override is invalid.

    Long values are shortened.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(re.sub(r"\S{200,}", lambda match: f"{match[0][:100]}...", sentence))


class DatasetError(EdmDistillError):
    """A data set or a folder of images cannot be read, or does not fit the network."""


class TrainingError(EdmDistillError):
    """A run cannot start, continue or resume."""


class PeerFailed(TrainingError):
    """Another process of the run has failed and reports it: this one ends silently."""


class NotFiniteError(EdmDistillError):
    """Samples or metrics contain NaN or infinity: the command ran, but its result is not usable."""

    exit_code = 1


class HubError(EdmDistillError):
    """The Hugging Face Hub refused a request, or cannot be reached."""


class HubUnreachable(HubError):
    """The Hugging Face Hub cannot be asked: without a network or a login, or while it is out of order."""


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, as in 1 image, 2,000 images or 10 classes."""
    plural = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}" + ("" if number == 1 else plural)


def duration(seconds: float) -> str:
    """Returns a time in the unit in which it reads best, as in 0.05 seconds, 12 seconds, 1.5 minutes or 33.6 hours."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    shown = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2f}" if seconds >= 0.01 else "less than 0.01"
    return f"{shown} seconds"


def comma_separated(text: str, option: str = "") -> list[str]:
    """Returns the entries of a list that a user typed, as in 1,2,4, without the spaces around them.

    Args:
        option: named by the error.
    Raises: EdmDistillError: an entry is empty.
    """
    entries = [entry.strip() for entry in text.split(",")]
    typed = f"{option} {text!r}".lstrip()
    if entries == [""]:
        raise EdmDistillError(f"{typed} is an empty list: give it an entry")
    if not all(entries):
        raise EdmDistillError(f"{typed} has an empty entry: write one comma between two entries, and none at the end")
    return entries


def did_you_mean(word: str, known: Iterable[str], most: int = 10, more: str = "") -> str:
    """Returns the end of a sentence on an unknown name: the name that was probably meant, or the choices.

    Args:
        most: the largest number of names to list.
        more: the command that lists the others.
    """
    names = list(known)
    if near := get_close_matches(word[:100], names, n=1):
        return f"did you mean {near[0]!r}?"
    listed = f"choose one of {', '.join(names[:most])}"
    if len(names) <= most:
        return listed
    return f"{listed} or {len(names) - most} more" + (f", which `{more}` lists" if more else "")


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}
_BOUNDS = {">=": "at least ", "<=": "at most ", ">": "above ", "<": "below ", None: ""}
_EXPECTED = re.compile(r"Expected `(.+?)`(?: of length (?:(\S+) )?(\d+))?(?: ([<>]=?) (\S+))?(?:, got .*)?")


def validation_in_words(problem: str) -> str:
    """Returns the rest of a sentence on a value that msgspec refused, as in " must be at least 1".

    Args:
        problem: msgspec's words, or those of a ValueError that it passes on, without the place.
    """
    if expected := _EXPECTED.fullmatch(problem):
        kinds, bound, length, limit, number = expected.groups()
        if number is not None:
            return f" must be {_BOUNDS[limit]}{float(number):.12g}"
        named = " or ".join(_KINDS.get(kind, kind) for kind in kinds.split(" | ") if kind != "null")
        unit = "character" if kinds == "str" else "value"
        return f" must be {named}" + ("" if length is None else f" of {_BOUNDS[bound]}{counted(int(length), unit)}")
    if field := re.fullmatch(r"Object missing required field `(.*)`", problem):
        return f" lacks {field[1]}"
    return f": {problem[:1].lower()}{problem[1:]}"
