"""Finding the processes of one Ray among all those on the machine: the descendants of a process, by their titles."""

from pathlib import Path


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
