"""The command line. One file a command; the table here answers `--help` without importing any of them."""

import errno
import importlib
import io
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from typing import Any, TextIO, cast

import click

from edmdistill import __version__
from edmdistill.errors import EdmDistillError, Interrupted, PeerFailed, causes, printable, printable_lines
from edmdistill.machine.host import LIMITS, keep_freed_memory
from edmdistill.methods import METHODS

COMMANDS = {
    "inspect": "Show what is in a checkpoint, ours or an official pickle, without running it.",
    "convert": "Convert an official checkpoint to ours, and print the conversion error.",
    "train": f"Train a network by a method: {', '.join(METHODS)}.",
    "ema": "Reconstruct a moving average of another length after training (post-hoc EMA).",
    "sample": "Sample images from a teacher or a generator.",
    "eval": "Evaluate a checkpoint or a folder of images against a data set.",
    "sweep": "Evaluate a grid of step counts, gammas, guidance weights, solvers or schedules: a table, a plot.",
    "tune-schedule": "Choose a generator's noise levels by a metric, and store them if they hold on other seeds.",
    "compare": "Put results side by side, or say why they may not stand there.",
    "diagnose": "Measure single jumps of a generator by noise level, and say where it is weak.",
    "loss": "Compare the diffusion loss of two teachers by noise level.",
    "data": "Prepare, encode, measure and inspect data sets.",
    "fetch": "Download official files: teachers, references, Inception, DINOv2, the VAE.",
    "recipes": "List, show, copy and check the recipes.",
    "plan": "Estimate a run's memory, FLOPs and time on each GPU.",
    "export": "Write a checkpoint for another program: diffusers, onnx, torch-export, nvidia, space.",
    "push-to-hub": "Publish a checkpoint or a run on the Hugging Face Hub.",
    "report": "Write a one-page HTML report of a run.",
    "doctor": "Check versions, devices and disk, and say how to fix problems.",
}


class Failure(click.ClickException):
    """A user's error as click shows it: `Error: ` and one sentence on stderr."""

    exit_code = 2


REFUSALS = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EFBIG", "EIO", "ELOOP", "EMFILE", "ENAMETOOLONG", "ENOSPC", "EPERM", "EROFS")
}
"""OSErrors caused by the user's files and disk; all others are bugs and keep their traceback."""
NO_FOLDER = "No usable temporary directory"
"""What tempfile says where it finds no folder that can be written."""
VERBOSE = "edmdistill.verbose"


def _be_quiet(ctx: click.Context, param: click.Parameter, quiet: bool) -> None:
    if quiet:
        from edmdistill.progress import set_quiet

        set_quiet(True)
        ctx.call_on_close(lambda: set_quiet(False))


def _be_verbose(ctx: click.Context, param: click.Parameter, verbose: bool) -> None:
    if verbose:
        ctx.meta[VERBOSE] = True


def _switch(*names: str, callback: Callable[[click.Context, click.Parameter, bool], None], help: str) -> click.Option:
    return click.Option(names, is_flag=True, expose_value=False, callback=callback, help=help)


EVERYWHERE = (
    _switch("-q", "--quiet", callback=_be_quiet, help="Print only results and errors."),
    _switch("-v", "--verbose", callback=_be_verbose, help="Print the traceback of an error."),
)
"""Options of every command, accepted before or after its name."""


class LazyGroup(click.Group):
    """A group whose commands are imported when called.

    Args:
        summaries: of the commands, by name.
        prefix: the command NAME is the object `command` of edmdistill.cli.PREFIXNAME.
    """

    def __init__(self, *args: Any, summaries: Mapping[str, str], prefix: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self.summaries, self.prefix = summaries, prefix

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.summaries)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.summaries:
            return None
        command = importlib.import_module(f"edmdistill.cli.{self.prefix}{name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        for each in (command, *(command.commands.values() if isinstance(command, click.Group) else ())):
            each.params += [option for option in EVERYWHERE if option not in each.params]
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.summaries.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.summaries and not name.startswith("-") and not ctx.resilient_parsing:
            near = get_close_matches(name[:100], self.summaries, n=1)
            ctx.fail(f"There is no command {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ends the process with 130 at Ctrl-C, of which click would say "Aborted!", and give 1.

    The main process says so, and what the command that was interrupted has to say; see `cli.options.interruptible`.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            said = isinstance(interrupt, Interrupted)  # others may hold a library's text, as a codec's
            click.echo(f"Interrupted: {printable_lines(str(interrupt))}" if said else "Interrupted.", err=True)
        sys.exit(130)


class MainGroup(LazyGroup):
    """The group of all commands, which turns errors into a sentence and an exit code."""

    @_interruptible()
    def make_context(self, *args: Any, **options: Any) -> click.Context:
        return super().make_context(*args, **options)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for before, text in zip(["", *args], args, strict=False):
            try:
                text.encode()
            except UnicodeEncodeError:
                utf8 = sys.getfilesystemencoding() == "utf-8"
                advice = "rename it" if utf8 else "set PYTHONUTF8=1, because the locale is not UTF-8"
                ctx.fail(f"{printable(text)} is not text in UTF-8, which names have to be: {advice}.")
            is_message = before == "--message" or text.startswith("--message=")
            if not is_message and any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text):
                ctx.fail(
                    f"{printable(text)} holds a line break or another control character, with which no command that "
                    "is printed here could be pasted: leave it out, or rename the file."
                )
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **options: Any) -> Any:
        with _open_streams():
            return super().main(*args, **options)

    @_interruptible()
    def invoke(self, ctx: click.Context) -> object:
        keep_freed_memory()
        try:
            _require_working_directory()
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a full disk can still be reported
            return result
        except PeerFailed:
            sys.exit(Failure.exit_code)
        except click.NoSuchOption as error:
            from edmdistill.cli.other_names import name_here

            if error.ctx is None or (here := name_here(error.option_name, error.ctx.command)) is None:
                raise
            raise click.UsageError(f"No such option {error.option_name!r}: {here}.", error.ctx) from error
        except EdmDistillError as error:
            if VERBOSE in ctx.meta:
                traceback.print_exc()
            failure = Failure(_no_temporary_folder(error) or str(error))
            failure.exit_code = error.exit_code  # type: ignore[misc]  # a class variable to click's stubs
            raise failure from error
        except (EOFError, BrokenPipeError):  # a bug, of which click would say "Aborted!" or nothing
            traceback.print_exc()
            sys.exit(1)
        except (OSError, RuntimeError) as error:
            _forget_refused_output()
            if (sentence := _refusal(error)) is None:
                raise
            if VERBOSE in ctx.meta:
                traceback.print_exc()
            raise Failure(sentence) from error


def _forget_refused_output() -> None:
    """Drops output that cannot be written; Python 3.14 would try again at its end, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refusal(error: OSError | RuntimeError) -> str | None:
    """Returns a sentence if the machine has refused something: a file, a process or thread, or a GPU its memory."""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        advice = LIMITS.get(error.errno)
        name = printable(str(error.filename or "the output"))
        return f"{name}: {error.strerror}{f'; {advice}' if advice else ''}."
    no_thread = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    is_blocked = isinstance(error, BlockingIOError) and not hasattr(error, "characters_written")  # not by a full pipe
    if no_thread or is_blocked:
        return f"no more processes or threads can be started: {LIMITS[errno.EAGAIN]}."
    if isinstance(error, OSError):
        return _no_temporary_folder(error)
    if "torch" not in sys.modules:  # click's Exit is a RuntimeError too
        return None

    from edmdistill.transfer import is_out_of_memory

    if not is_out_of_memory(error):
        return None
    return (
        f"the GPU's memory is full ({str(error).partition('.')[0]}): free some of it, choose another --device, "
        "or give a smaller --batch or --dtype float16 where the command has them"
    )


def _no_temporary_folder(error: BaseException) -> str | None:
    """Returns a sentence if an error comes from tempfile, which found no folder that can be written; else None."""
    if any(isinstance(cause, FileNotFoundError) and NO_FOLDER in str(cause) for cause in causes(error)):
        return "there is no folder where temporary files can be written: set TMPDIR to one"
    return None


class _Lasting:
    """A text stream that outlives its reader: a pipe's other end, or a terminal. The rest is discarded."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._is_terminal = stream, stream.isatty()

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._discard(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        if error.errno != errno.EPIPE and not (self._is_terminal and error.errno == errno.EIO):
            raise error
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Printable(_Lasting):
    """Escapes control characters too, whoever chose them, as JSON does; lines and tabs stay."""

    def write(self, text: str) -> int:
        if not text.replace("\n", "").isprintable():
            text = "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)
        return super().write(text)


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


@contextmanager
def _open_streams() -> Iterator[None]:
    """Lets no control character through standard output: names in it may be a stranger's.

    A command whose standard output or error is closed (`>&-`), or loses its reader (`| head`, or a `| tee` that Ctrl-C
    ends as well), does its work, and what it prints is discarded. Characters that the encoding of standard output lacks
    are escaped, as they are on standard error anyway.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    closed = [name for name in ("stdout", "stderr") if getattr(sys, name) is None]
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            for name in closed:
                setattr(sys, name, nowhere)
            out, err = cast(TextIO, _Printable(sys.stdout)), cast(TextIO, _Lasting(sys.stderr))
            with redirect_stdout(out), redirect_stderr(err):
                yield
        finally:
            for name in closed:
                setattr(sys, name, None)


def _require_working_directory() -> None:
    """Raises: EdmDistillError: the working directory was removed, so relative paths cannot be resolved."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise EdmDistillError("the working directory no longer exists: change to another one") from error


@click.group(
    cls=MainGroup,
    summaries=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    params=list(EVERYWHERE),
)
@click.version_option(__version__, "-V", "--version", prog_name="edmdistill", message="%(prog)s %(version)s")
def main() -> None:
    """Turn pretrained EDM and EDM2 diffusion checkpoints into few-step generators."""
