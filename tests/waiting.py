"""Waiting for what another process does: until it is done, or until nothing has been seen of it for a long time.

A limit on a wait is there to end a hang, and never says how fast something has to be. So it counts from the last sign
of life, is more than ten times what a slow and busy machine needs between two of them, and leaves every stack behind.
"""

import faulthandler
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

SILENCE = 600.0  # seconds without a sign of life
LONGEST = 1800.0  # seconds of a wait altogether: what spins may well give signs of life
LOOK = 2.0  # seconds between two looks for signs

# What gives signs of life: a file or a directory, in which something appears or grows, or a value that changes.
Sign = str | Path | Callable[[], object]


def wait_for(
    what: str,
    found: Callable[[], Any],
    *,
    signs: Iterable[Sign] = (),
    told: Callable[[], str] = str,
    pause: float = 0.1,
) -> Any:
    """Poll until `found()` is true, and return it.

    Args:
        signs: where the life of those who are waited for can be seen.
        told: what the message of a wait that is given up tells beside.

    Raises:
        AssertionError: nothing was seen for `SILENCE` seconds, or it takes longer than `LONGEST`.
    """
    signs = tuple(signs)
    begun = looked = moved = time.monotonic()
    seen = _look(signs)
    while not (result := found()):
        now = time.monotonic()
        if now - looked > LOOK:
            looked, before, seen = now, seen, _look(signs)
            moved = now if seen != before else moved
        if now - moved > SILENCE or now - begun > LONGEST:
            print(stacks(), flush=True)
            times = f"{now - begun:.0f} s, the last {now - moved:.0f} of them without a sign of life"
            raise AssertionError(f"waited for {what} for {times}\n{told()}")
        time.sleep(pause)
    return result


def wait_for_end(
    process: "subprocess.Popen[Any]", what: str, *, signs: Iterable[Sign] = (), told: Callable[[], str] = str
) -> int:
    """Wait until a process has ended, and return its exit code. One that is given up is killed, and all below it."""
    try:
        wait_for(f"the end of {what}", lambda: process.poll() is not None, signs=signs, told=told, pause=0.05)
    except AssertionError:
        end_process(process)
        raise
    return process.returncode


def run(
    arguments: Sequence[str | Path], *, signs: Iterable[Sign] = (), **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a command, which gives signs of life by what it prints, and return its code and what it printed."""
    with tempfile.TemporaryDirectory(prefix="run-", ignore_cleanup_errors=True) as folder:
        out, error = Path(folder, "out"), Path(folder, "error")

        def said() -> list[str]:
            return [path.read_text(errors="replace") for path in (out, error)]

        with open(out, "wb") as stdout, open(error, "wb") as stderr:
            process = subprocess.Popen(arguments, stdout=stdout, stderr=stderr, **options)
        try:
            name = " ".join(map(str, arguments))[:200]
            wait_for_end(process, name, signs=[out, error, *signs], told=lambda: "\n".join(said())[-4000:])
        finally:
            end_process(process)
        return subprocess.CompletedProcess(arguments, process.returncode, *said())


def end_process(process: "subprocess.Popen[Any]") -> None:
    """Kill a process, and all below it. (`ray stop` would end every Ray on the machine.)"""
    if process.poll() is not None:
        return
    parent = psutil.Process(process.pid)
    tree = [parent, *parent.children(recursive=True)]
    for each in tree:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(tree, timeout=60)


def stacks() -> str:
    """Of all threads of this process and of the Python processes below it."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        found = [f"process {os.getpid()}, this one\n{file.read().decode(errors='replace')}"]
    dump = [Path(sys.executable).with_name("py-spy"), "dump", "--nonblocking", "--pid"]
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if "python" not in title and "ray::" not in title:
                continue
            done = subprocess.run([*dump, str(process.pid)], capture_output=True, text=True, timeout=30)
            found.append(f"{done.stdout}{done.stderr}")
        except (psutil.Error, OSError, subprocess.TimeoutExpired) as error:
            found.append(f"{process}: {error!r}")
    return "\n".join(found)


def _look(signs: Sequence[Sign]) -> list[object]:
    return [sign() if callable(sign) else _size(Path(sign)) for sign in signs]


def _size(path: Path) -> tuple[int, int]:
    """How many files, and bytes in them."""
    sizes = []
    for each in (path, *path.rglob("*")):
        try:
            sizes.append(each.lstat().st_size)
        except OSError:
            continue  # not there yet, or gone again
    return len(sizes), sum(sizes)
