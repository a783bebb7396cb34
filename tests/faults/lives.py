"""Commands that are killed: each life is a fork of this process, which has imported everything.

python lives.py FOLDER    reads a life a line from stdin, as JSON, and answers each by a line:
    {"argv": the command, "touches": n, "seconds": s} -> {"status": exit code or -signal, "touches": n, "seconds": s}

What a life imported that came to its end, the next ones find imported.

A life works in FOLDER and is killed, by SIGKILL, at its n-th touch of a file (an open in FOLDER; a rename, a removal, a
new folder or a mode anywhere) or after s seconds; null lets it live. What it prints goes to FOLDER/../said.txt.
"""

import importlib
import json
import mmap
import os
import signal
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

from forks import import_everything

from edmdistill.cli import main

TOUCHES = {f"os.{name}" for name in ("chmod", "link", "mkdir", "remove", "rename", "rmdir", "symlink", "truncate")}


def live(argv: list[str], folder: str, said: str, limit: int | None, count: mmap.mmap) -> None:
    """In the fork: the command, until its end or its last touch."""
    os.chdir(folder)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    touches = 0

    def touched(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal touches
        if event in TOUCHES or (event == "open" and folder in str(arguments[0])):
            touches += 1
            count[:8] = struct.pack("q", touches)
            if touches == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touched)
    status = 0
    try:
        main(argv, prog_name="edmdistill")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else bool(end.code)
    count[8:] = (
        json.dumps([name for name in sys.modules if "." in name or name.islower()]).encode().ljust(len(count) - 8)
    )
    os._exit(status)


def wait(child: int, seconds: float | None) -> int:
    """Returns how the child ended: killed after so many seconds, unless it was faster."""
    killed_at = None if seconds is None else time.monotonic() + seconds
    while killed_at is not None and time.monotonic() < killed_at:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    if killed_at is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    import_everything()
    folder = str(Path(sys.argv[1]).resolve())
    said = str(Path(folder).parent / "said.txt")
    for line in sys.stdin:
        wish = json.loads(line)
        count = mmap.mmap(-1, 2**20)
        start = time.monotonic()
        child = os.fork()
        if not child:
            live(wish["argv"], folder, said, wish["touches"], count)
        status = wait(child, wish["seconds"])
        touches = struct.unpack("q", count[:8])[0]
        seconds = time.monotonic() - start
        # One that was killed may have been saying what it had imported.
        for name in json.loads(count[8:].strip(b"\0 ") or b"[]") if status >= 0 else ():
            with suppress(Exception):
                importlib.import_module(name)
        print(json.dumps({"status": status, "touches": touches, "seconds": seconds}), flush=True)
