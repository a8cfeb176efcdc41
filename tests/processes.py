"""The processes of one Ray among all those on the machine: starting a node, finding what is below it by its title."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.waiting import Sign, end_process, wait_for

STARTS = 6


def descendants(root: int) -> dict[int, str]:
    """Process id -> title of everything that `root` started, directly or not."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text()
            title = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        except OSError:
            continue  # it ended while we looked
        pid = int(path.name)
        # The name in brackets may hold anything.
        parents[pid], titles[pid] = int(stat.rpartition(")")[2].split()[1]), title
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: titles[pid] for pid in found - {root} if pid in titles}


def titled(root: int, *marks: str) -> list[int]:
    """The Ray processes below `root` whose title holds one of the marks, oldest first."""
    names = descendants(root)
    return sorted(pid for pid, title in names.items() if title.startswith("ray::") and any(m in title for m in marks))


def start_node(
    start: Callable[[], "subprocess.Popen[Any]"], up: Callable[[], bool], *, signs: list[Sign], told: Callable[[], str]
) -> "subprocess.Popen[Any]":
    """Start a node of Ray, and once more where it fails: a raylet whose agents are not up after 15 seconds ends.

    Args:
        start: starts it, as a process that runs for as long as the node.
        up: whether it has come up.
    """
    for _ in range(STARTS):
        process = start()
        wait_for("a node to come up", lambda: _has_failed(process) or up(), signs=signs, told=told)  # noqa: B023
        if not _has_failed(process):
            return process
        end_process(process)
    raise AssertionError(f"{STARTS} times a node has not come up\n{told()}")


def _has_failed(process: "subprocess.Popen[Any]") -> bool:
    if process.poll() is not None:
        return True
    try:
        below = psutil.Process(process.pid).children(recursive=True)
        return any(each.name() == "raylet" and each.status() == psutil.STATUS_ZOMBIE for each in below)
    except psutil.NoSuchProcess:  # ended while we looked
        return False
