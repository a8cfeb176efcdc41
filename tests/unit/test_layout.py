"""The floor plan holds: imports point down, none in a circle, Ray stays out of the science, modules stay short."""

import ast
import graphlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 400  # lines of a module

# From the bottom up. A module is on the floor of the longest name here that begins its own; it may import from its own
# room and from the floors below. CONTRIBUTING.md shows the same list.
FLOORS = [
    ("errors", "console", "preload", "repeat"),
    ("storage",),
    ("records",),
    ("config_text", "ray_internals", "telemetry", "tokenizer"),
    ("model",),
    ("config_sections",),
    ("config",),
    ("cluster",),
    ("data",),
    ("data.text",),
    ("spectral",),
    ("encode",),
    ("probe",),
    ("probe.service",),
    ("train.recovery",),
    ("train",),
    ("report",),
    ("sweep",),
    ("export",),
    ("doctor", "verify", "bench", "submit", "pretrain"),
    ("demo",),
    ("cli_model", "cli_probe", "cli_tokenizer", "node"),
    ("cli", ""),
]
# Plain functions that run in a notebook, and what reads a run where there is no cluster: no module imports Ray, nor one
# that does.
PURE = [
    *("errors", "storage", "tokenizer", "config", "model", "encode.encoders", "encode.vectors", "data", "data.text"),
    *("spectral", "probe", "train.step", "train.feed", "train.ledger", "train.checkpoint"),
    *("records", "report", "export"),
]
WITH_RAY = ["data.stream", "spectral.table", "data.text.prepare", "probe.service"]
# Imports inside a function, which point up for the reason given there.
UPWARD = {("model.bert", "encode.vectors")}


def modules() -> dict[str, Path]:
    """Every module of the package by its name without `raybert.`; the package itself is ""."""
    found = {}
    for path in sorted((ROOT / "raybert").rglob("*.py")):
        parts = path.relative_to(ROOT / "raybert").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """What a file imports, wherever in it: the full name, and whether it happens at the top."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the full name"
            yield from ((f"{node.module}.{alias.name}", node in top) for alias in node.names)


def own(name: str) -> str | None:
    """The module of ours that an imported name lies in; None for one of others."""
    if name.split(".")[0] != "raybert":
        return None
    name = name.removeprefix("raybert").removeprefix(".")
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def floor(module: str) -> tuple[int, str]:
    """The floor of a module, and the room on it."""
    fitting = [
        (len(room), number, room)
        for number, rooms in enumerate(FLOORS)
        for room in rooms
        if module == room or (room and module.startswith(f"{room}."))
    ]
    assert fitting, f"{module} is on no floor: add its room to FLOORS"
    _, number, room = max(fitting)
    return number, room


def lies_in(module: str, rooms: list[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def arrows() -> Iterator[tuple[str, str, bool]]:
    for module, path in MODULES.items():
        for name, at_top in imports(path):
            target = own(name)
            if target is not None and target != module:
                yield module, target, at_top


def test_imports_point_down():
    wrong = []
    for module, target, at_top in arrows():
        (start, room), (end, other) = floor(module), floor(target)
        if room != other and start <= end and (at_top or (module, target) not in UPWARD):
            wrong.append(f"{module} -> {target}")
    assert not wrong, f"imports that point up, or sideways into another room: {sorted(set(wrong))}"


def test_every_exception_is_used():
    lazy = {(module, target) for module, target, at_top in arrows() if not at_top}
    assert lazy >= UPWARD


def test_no_circle():
    graph: dict[str, set[str]] = {}
    for module, target, at_top in arrows():
        # A package imports its modules to show their names, and they import it for its other ones.
        if (at_top or (module, target) not in UPWARD) and not module.startswith(f"{target}."):
            graph.setdefault(module, set()).add(target)
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"imports in a circle: {' <- '.join(error.args[1])}")


def test_the_science_has_no_ray():
    """Neither at the top nor inside a function, and not through what it imports at the top."""
    rayed = {module for module, path in MODULES.items() if any(imports_ray(name) for name, _ in imports(path))}
    pure = {module for module in MODULES if lies_in(module, PURE) and not lies_in(module, WITH_RAY)}
    assert not pure & rayed, f"these import Ray: {sorted(pure & rayed)}"
    ways = [" -> ".join(way) for module in sorted(pure) if (way := way_to_ray(module))]
    assert not ways, f"these import Ray through others: {ways}"


def imports_ray(name: str) -> bool:
    return name.split(".")[0] == "ray"


def way_to_ray(module: str) -> list[str]:
    """The shortest way over imports at the top from a module to one that imports Ray there; empty: there is none."""
    ways, seen = deque([[module]]), {module}
    while ways:
        way = ways.popleft()
        names = [name for name, at_top in imports(MODULES[way[-1]]) if at_top]
        if any(map(imports_ray, names)):
            return way
        for target in (package for name in names for package in packages(own(name))):
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return []


def packages(module: str | None) -> list[str]:
    """A module after the packages that it lies in, which Python runs first."""
    parts = module.split(".") if module else []
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= LONGEST, f"{MODULES[module]} has {lines} lines; a module answers one question"


def test_the_guide_shows_the_floors():
    """CONTRIBUTING.md has one line a floor, from the bottom up."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    block = guide.partition("```floors\n")[2].partition("```")[0]
    shown = [tuple(line.partition("  ")[0].split(", ")) for line in block.splitlines()]
    written = [tuple(room or "__init__" for room in rooms) for rooms in FLOORS]
    assert shown == written
