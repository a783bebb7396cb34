"""The command line as such: help, exit codes and errors. Each command's own test is beside this one."""

import errno
import io
import os
import re
import subprocess
import sys
import termios
import tomllib
import tty
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from edmdistill import __version__, progress
from edmdistill.cli import COMMANDS, main
from edmdistill.cli.options import say
from edmdistill.errors import CheckpointError, printable
from edmdistill.progress import progress_bar, stage_bar

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "scipy", "PIL", "safetensors", "huggingface_hub", "accelerate", "sklearn", "msgspec"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Runs `edmdistill inspect` with a body of the test's own."""

    def run(body) -> Result:
        module = types.ModuleType("edmdistill.cli.inspect")
        module.command = click.command()(body)
        monkeypatch.setitem(sys.modules, "edmdistill.cli.inspect", module)
        return CliRunner().invoke(main, ["inspect"])

    return run


def test_help_lists_every_command_and_imports_nothing_heavy():
    result = python("-X", "importtime", "-m", "edmdistill", "--help")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    for name, help_text in COMMANDS.items():
        assert any(line.split()[:1] == [name] for line in lines)
        assert help_text.split()[0] in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "click" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Usage: main {name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_no_torch(name: str):
    code = f"import sys; from edmdistill.cli import main; main(['{name}', '--help'], standalone_mode=False)"
    result = python("-c", f"{code}; assert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(option: str):
    assert CliRunner().invoke(main, [option]).stdout == f"edmdistill {__version__}\n"


def test_a_shell_completes_the_names_of_commands():
    words = {"_EDMDISTILL_COMPLETE": "bash_complete", "COMP_WORDS": "edmdistill s", "COMP_CWORD": "1"}
    result = CliRunner().invoke(main, prog_name="edmdistill", env=words)
    assert result.output.split() == ["plain,sample", "plain,sweep"]


def test_a_closed_output_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by `edmdistill ... >&- 2>&-`, where Python has no sys.stdout and no sys.stderr."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    main(["recipes", "validate", "cosim/digits"], standalone_mode=False)


@pytest.mark.parametrize("pair", [os.pipe, os.openpty])
def test_a_reader_that_leaves_ends_no_work(run, pair: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch):
    """As `| head` does, `| tee` at a Ctrl-C that is for the command, and a terminal that is closed."""
    ours, theirs = pair()
    done: list[str] = []

    def body() -> None:
        os.close(ours)
        with progress_bar(total=2, delay=0, mininterval=0) as bar:
            for _ in range(2):
                click.echo("a result")
                say("a remark")
                bar.update()
        done.append("all")

    with open(theirs, "w") as stream:
        run(lambda: None)  # sets the command
        monkeypatch.setattr(sys.modules["edmdistill.cli.inspect"], "command", click.command()(body))
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        main(["inspect"], standalone_mode=False)
    assert done == ["all"]


@pytest.mark.parametrize("words", [["--help"], ["recipes", "list"], ["inspect", "nowhere"]])
def test_a_reader_that_has_left_changes_no_exit_code(words: list[str]):
    """Nor adds Python's own words on streams that it cannot flush."""
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "w") as closed:
        half = subprocess.run([sys.executable, "-m", "edmdistill", *words], stdout=closed, stderr=subprocess.PIPE)
        none = subprocess.run([sys.executable, "-m", "edmdistill", *words], stdout=closed, stderr=closed)
    whole = python("-m", "edmdistill", *words)
    assert half.returncode == none.returncode == whole.returncode
    assert half.stderr.decode() == whole.stderr


def test_control_characters_from_files_are_escaped(run) -> None:
    printed = run(lambda: click.echo("a\x1b]0;b\x07\x7f\x9b\u202e\tc\nd")).stdout
    assert printed == "a\\u001b]0;b\\u0007\\u007f\\u009b\\u202e\tc\nd\n"


def test_what_an_encoding_lacks_is_escaped(run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(lambda: click.echo("\N{SNOWMAN} ä"))  # sets the command
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    main(["inspect"], standalone_mode=False)
    assert written.getvalue() == b"\\u2603 \xe4\n"


@pytest.mark.parametrize(
    ("encoding", "advice"), [("utf-8", "rename it"), ("ascii", "set PYTHONUTF8=1, because the locale is not UTF-8")]
)
def test_a_name_that_is_no_text_is_refused(encoding: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither safetensors nor JSON holds such names, so a command would fail after its work."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    result = CliRunner().invoke(main, ["inspect", os.fsdecode(b"a\xff")])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        rf"Error: a\udcff is not text in UTF-8, which names have to be: {advice}."
    )


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\x1b", "\x7f", "\x85", "\u2028"])
@pytest.mark.parametrize(
    "words",
    ["sample RUN --out {}", "train kd TEACHER --run-dir {}", "report {}", "train kd TEACHER --set data.note={}"],
)
def test_a_name_that_breaks_a_printed_command_is_refused(character: str, words: str, tmp_path: Path) -> None:
    arguments = [word.format(tmp_path / f"a{character}b") for word in words.split()]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    (sentence,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert printable(f"a{character}b holds a line break or another control character") in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("character", ["\u202f", "\xa0", "ä", "\u200d"])
def test_other_names_are_taken(character: str) -> None:
    """As that of a screenshot by macOS, or of a picture."""
    result = CliRunner().invoke(main, ["inspect", f"a{character}b"])
    assert f"{printable(f'a{character}b')} does not exist" in result.stderr


@pytest.mark.parametrize("words", [["--message", "One\n\nTwo"], ["--message=One\n\nTwo"]])
def test_a_message_may_have_lines(words: list[str]) -> None:
    assert "nowhere does not exist" in CliRunner().invoke(main, ["push-to-hub", "nowhere", "a/b", *words]).stderr


@pytest.mark.parametrize("words", [["-q", "inspect"], ["inspect", "--quiet"]])
def test_quiet_leaves_results_alone(run, words: list[str]):
    def body() -> None:
        say("a remark")
        with progress_bar(total=1, delay=0) as bar:
            bar.update()
        click.echo("a result")

    assert run(body).stderr.startswith("a remark\n")
    result = CliRunner().invoke(main, words)
    assert (result.stdout, result.stderr) == ("a result\n", "")


def test_where_stderr_is_no_terminal_progress_is_whole_lines(run):
    def body() -> None:
        with progress_bar(total=3, desc="drawing", delay=0, mininterval=0) as bar:
            for _ in range(3):
                bar.update()

    result = run(body)
    lines = result.stderr.split("\n")
    assert lines.pop() == ""
    assert "\r" not in result.stderr
    assert [line.split("/3")[0].split()[-1] for line in lines] == ["0", "1", "2", "3"]
    assert all(line.startswith("drawing: ") for line in lines)


@pytest.mark.parametrize(("columns", "end"), [(0, "\n"), (40, "\r")])
def test_a_terminal_without_a_width_gets_lines(columns: int, end: str, monkeypatch: pytest.MonkeyPatch):
    """As that of `script` and of some containers, where tqdm would draw nothing."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (columns and 24, columns))
    tty.setraw(theirs)
    with open(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(total=3, delay=0, mininterval=0, leave=False) as bar:
            bar.update()
    shown = ""
    with suppress(OSError):  # Linux's end of a terminal
        while some := os.read(ours, 1000).decode():  # what was written may come in parts
            shown += some
    os.close(ours)
    assert "1/3" in shown
    assert end in shown
    assert ("\r" in shown) == (end == "\r")


def test_a_stage_that_lasts_is_shown_while_it_lasts(run, monkeypatch: pytest.MonkeyPatch):
    """By a timer, for nothing else is heard of a stage before its end; stages that end soon are not shown."""
    timers = []

    class Timer:
        def __init__(self, seconds: float, end: Callable[[], None]) -> None:
            self.seconds, self.end, self.state = seconds, end, "made"
            timers.append(self)

        def start(self) -> None:
            self.state = "started"

        def cancel(self) -> None:
            self.state = "cancelled"

    monkeypatch.setattr(progress, "Timer", Timer)

    def body() -> None:
        with stage_bar("exporting") as on_progress:
            for stage in ("loading", "writing", "comparing"):
                on_progress(stage)
                states.append([timer.state for timer in timers])
                if timers and stage == "writing":
                    timers[-1].end()

    states: list[list[str]] = []
    result = run(body)
    assert states == [["started"], ["cancelled", "started"], ["cancelled", "cancelled", "started"]]
    assert [timer.state for timer in timers] == ["cancelled"] * 3
    assert {timer.seconds for timer in timers} == {progress.DELAY}
    assert re.match(r"exporting: writing \[\d\d:\d\d\]\n", result.stderr)
    assert "loading" not in result.stderr

    timers.clear()
    quiet = CliRunner().invoke(main, ["-q", "inspect"])
    assert (quiet.exit_code, quiet.stderr, timers) == (0, "", [])


@pytest.mark.parametrize(
    ("word", "sentence"),
    [("smaple", "There is no command 'smaple'. Did you mean 'sample'?"), ("xyz", "There is no command 'xyz'.")],
)
def test_an_unknown_command_gets_a_suggestion(word: str, sentence: str):
    result = CliRunner().invoke(main, [word])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: {sentence}"


def test_an_unknown_option_is_the_users_error():
    assert CliRunner().invoke(main, ["--nope"]).exit_code == 2


def test_a_users_error_is_one_sentence_and_exit_2(run):
    def body() -> None:
        raise CheckpointError("a.pkl is no checkpoint; give another")

    result = run(body)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "Error: a.pkl is no checkpoint; give another\n"


def test_verbose_adds_the_traceback_of_a_users_error(run):
    def body() -> None:
        raise CheckpointError("a.pkl is no checkpoint; give another")

    assert "Traceback" not in run(body).stderr
    lines = CliRunner().invoke(main, ["inspect", "-v"]).stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "Error: a.pkl is no checkpoint; give another"


@pytest.mark.parametrize("words", [(), ("decoding with 'cp437' codec failed (KeyboardInterrupt: )",)])
def test_ctrl_c_is_one_line_and_exit_130(run, words):
    def body() -> None:
        raise KeyboardInterrupt(*words)  # with words: as a codec makes it of one that came while it decoded

    result = run(body)
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


STOP = """
import runpy, sys
class Stop:
    def find_spec(name, *rest):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop)
sys.argv = ["edmdistill", "--version"]
"""


@pytest.mark.parametrize("module", ["edmdistill.cli", "click"])
@pytest.mark.parametrize(
    "begin", ["runpy.run_module('edmdistill', run_name='__main__')", "from {0} import {1}; sys.exit({1}())"]
)
def test_ctrl_c_while_it_is_imported_is_one_line_too(module: str, begin: str):
    """As a module, and by the script that pip installs."""
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["edmdistill"]
    result = python("-c", STOP.format(module=module) + begin.format(*script.split(":")))
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


SLOW = """
import signal, time
signal.raise_signal(signal.SIGINT)
time.sleep(0.1)
print("imported")
"""
IMPORTS = """
import importlib, sys, time, types
def command(prog_name):
    importlib.import_module("slow")
    time.sleep(60)
sys.modules["edmdistill.cli"] = types.SimpleNamespace(main=command)
from edmdistill.__main__ import main
main()
"""


def test_ctrl_c_waits_for_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torch's and numpy's make other errors of an exception in their midst."""
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    result = python("-c", IMPORTS)
    assert (result.returncode, result.stdout, result.stderr) == (130, "imported\n", "Interrupted.\n")


def test_ctrl_c_while_words_are_parsed_is_one_line_too(monkeypatch: pytest.MonkeyPatch):
    def parse(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(main), "parse_args", parse)
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


@pytest.mark.parametrize("error", [EOFError("ours"), BrokenPipeError(errno.EPIPE, "ours")])
def test_an_unexpected_end_of_a_file_or_pipe_keeps_its_traceback(run, error: Exception):
    """Of an EOFError, click would say no more than `Aborted!`; of a pipe, nothing."""

    def body() -> None:
        raise error

    result = run(body)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"{type(error).__name__}: {error}"


def test_a_fault_of_ours_keeps_its_traceback(run):
    def body() -> None:
        raise ZeroDivisionError("ours")

    result = run(body)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)
