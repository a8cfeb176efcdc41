"""The benchmarks' figures as data, and the table of docs/performance.md that is made from them.

    python -m benchmarks.NAME | tail -n 1 | python -m benchmarks.table append   # to benchmarks/results/NAME.jsonl
    python -m benchmarks.table                                                  # writes the page's table

A line of a file is {"date", "commit", "machine", "result"}, `result` being the JSON line of the script.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- table: python -m benchmarks.table -->", "<!-- end of table -->"
COLUMNS = ("benchmark", "ours", "peer", "ratio", "share", "goal", "met")


@dataclass(frozen=True)
class Row:
    """A row of the table. `limit` is the share of what the machine could do at most, None where there is none."""

    case: str
    ours: float
    peer: float | None
    ratio: float | None
    limit: float | None = None


@dataclass(frozen=True)
class Goal:
    text: str
    met: Callable[[Row], bool]


def at_least(least: float) -> Goal:
    return Goal(f"≥ {least:g}", lambda row: row.ratio is not None and row.ratio >= least)


def at_most(most: float) -> Goal:
    return Goal(f"≤ {most:.3g}", lambda row: row.ratio is not None and row.ratio <= most)


def share(least: float) -> Goal:
    return Goal(f"share ≥ {least:g}", lambda row: row.limit is not None and row.limit >= least)


def seconds(most: float) -> Goal:
    return Goal(f"≤ {most:g} s", lambda row: row.ours <= most)


def rate(least: float) -> Goal:
    return Goal(f"≥ {least / 1e6:g} M", lambda row: row.ours >= least)


# In the order of the table: the row's case, and what it should reach.
GOALS: Mapping[str, tuple[Goal, ...]] = {
    "`step`, compact, B=4 T=512, tokens/s": (at_least(4), share(0.55)),
    "`step`, compact, B=16 T=128, tokens/s": (at_least(4), share(0.55)),
    "`padding`, 50 of 512 tokens real, tokens/s": (at_least(0.9),),
    "`stream`, tokens/s a core": (at_least(20), rate(3e6), share(0.5)),
    "`overhead`, one thread, tokens/s": (at_least(0.97),),
    "`ddp`, beside torchrun, tokens/s": (at_least(0.98),),
    "`ddp`, beside one worker, two threads": (at_least(0.9),),
    "`checkpoint`, compact, s": (at_most(0.05), seconds(0.1)),
    "`checkpoint`, base, s": (at_most(0.05),),
    "`probe`, s": (at_most(1 / 1.5), seconds(30)),
    "`probe`, beside one text at a time": (at_most(1 / 8),),
    "`suite`, four tasks, s": (at_most(0.5),),
    "`interference`, tokens per CPU second": (at_least(0.97),),
    "`start`, cold, s": (seconds(20),),
    "`start`, warm, s": (),
    "`spectral`, s": (seconds(60),),
    "`prepare`, tokens/s": (at_least(1.2), rate(3e6)),
    "`prepare`, all-MiniLM-L6-v2, tokens/s": (at_least(1.1),),
    "`memory`, B=4 T=512, MB": (at_most(0.6),),
    "`memory`, B=16 T=128, MB": (at_most(0.6),),
}


def rows(result: Mapping[str, Any]) -> Iterator[Row]:
    """The rows that a script's line holds; none for a benchmark that the table leaves out."""
    name, ours, peer = result["name"], result.get("ours"), result.get("peer")
    ratio, limit = result.get("ratio"), result.get("share_of_limit")
    for case in result.get("rows", ()):
        shape = f"B={case.get('B')} T={case.get('T')}"
        if name == "step":
            yield Row(
                f"`step`, {case['size']}, {shape}, tokens/s", case["ours"], case["peer"], case["ratio"], case.get("mfu")
            )
        elif name == "memory":
            yield Row(f"`memory`, {shape}, MB", case["ours"], case["peer"], case["ratio"])
        elif name == "checkpoint":
            what = "compact, s" if case["size"] == "compact" else "base, s"
            of_limit = case["share_of_limit"] if "share_of_limit" in case else case["held"] / case["copy"]
            yield Row(f"`checkpoint`, {what}", case["held"], case["blocking"], case["share"], of_limit)
    if name == "padding":
        yield Row("`padding`, 50 of 512 tokens real, tokens/s", ours, peer, ratio)
    elif name == "stream":
        yield Row("`stream`, tokens/s a core", ours, peer, ratio, limit)
    elif name == "overhead":
        yield Row("`overhead`, one thread, tokens/s", ours, peer, ratio)
    elif name == "ddp":
        yield Row("`ddp`, beside torchrun, tokens/s", ours, peer, ratio)
        one = result["one_worker_two_threads"]
        yield Row("`ddp`, beside one worker, two threads", ours, one, result["against_one_worker"])
    elif name == "probe":
        alone = result["one_by_one_to_512"]
        yield Row("`probe`, s", ours, peer, ours / peer, limit)
        yield Row("`probe`, beside one text at a time", ours, alone, ours / alone)
    elif name == "suite":
        yield Row("`suite`, four tasks, s", ours, peer, ours / peer)
    elif name == "interference":
        yield Row("`interference`, tokens per CPU second", ours, peer, ratio, limit)
    elif name == "start" and "ours" in result:
        yield Row("`start`, cold, s", peer, None, None)
        yield Row("`start`, warm, s", ours, None, None)
    elif name == "spectral":
        yield Row("`spectral`, s", ours, peer, ratio, limit)
    elif name == "prepare":
        what = f", {tokenizer}" if (tokenizer := result.get("tokenizer")) else ""
        yield Row(f"`prepare`{what}, tokens/s", ours, peer, ratio, limit)


def lines() -> list[dict[str, Any]]:
    """Every line of every file, those of a benchmark in the order in which they were measured."""
    texts = [path.read_text(encoding="utf-8").splitlines() for path in sorted(RESULTS.glob("*.jsonl"))]
    return [json.loads(line) for text in texts for line in text]


def table() -> str:
    """The newest figures of the machine that the newest line of `step` is of; a mark where only others have any."""
    known = lines()
    newest = [line for line in known if line["result"]["name"] == "step"][-1]
    of_machine = [line for line in known if line["machine"] == newest["machine"]]
    found = {row.case: (row, line["date"]) for line in of_machine for row in rows(line["result"])}
    elsewhere = {row.case: (row, line["machine"]) for line in known for row in rows(line["result"])}
    shown: list[tuple[str, ...]] = []
    notes: dict[str, str] = {}  # machine -> mark
    for case, goals in GOALS.items():
        if case in found:
            shown.append(_cells(found[case][0], goals))
        elif case in elsewhere:
            row, machine = elsewhere[case]
            mark = notes.setdefault(machine, "†" * (len(notes) + 1))
            name, *figures = _cells(row, goals)
            shown.append((f"{name} {mark}", *figures))
    first, last = (pick(date for _, date in found.values()) for pick in (min, max))
    days = first if first == last else f"{first} to {last}"
    head = f"{newest['machine']}, {newest['result'].get('dtype', '').removeprefix('torch.')}, {days}:\n\n"
    below = "".join(f"\n\n{mark} on {machine}" for machine, mark in notes.items())
    return head + "\n".join(f"|{'|'.join(row)}|" for row in [COLUMNS, ("---",) * len(COLUMNS), *shown]) + below


def _cells(row: Row, goals: tuple[Goal, ...]) -> tuple[str, ...]:
    met = [goal.met(row) for goal in goals]
    said = ["yes" if one else "no" for one in met]
    verdict = said[0] if len(set(said)) == 1 else "; ".join(said)
    figures = (_number(value) for value in (row.ours, row.peer, row.ratio, row.limit))
    return (row.case, *figures, "; ".join(goal.text for goal in goals), verdict)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def append(line: str) -> None:
    """Add a script's line, with the day, the commit and the machine, to the file of its benchmark."""
    result = json.loads(line)
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    noted = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit, "machine": result["machine"], "result": result}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{result['name']}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(noted, ensure_ascii=False) + "\n")


def with_table(page: str) -> str:
    """The page with the present table between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{PAGE} has lost a mark of its table"
    assert end, f"{PAGE} has lost a mark of its table"
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["append"], help="add the line on standard input, and print it")
    if parser.parse_args().action:
        line = sys.stdin.read().strip()
        append(line)
        print(line)
    else:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
