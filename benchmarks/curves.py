"""What `benchmarks.record` measured, as a picture: probes against minutes of training, and against tokens.

    python -m benchmarks.record | tail -n 1 | python -m benchmarks.table append
    python -m benchmarks.curves docs/images/record.png

Shown are the lines of one machine, the newest line's unless another is named, and of one length of training, its
longest: runs of other lengths have other schedules. A panel a task, a colour a side, a line a seed. TF-IDF is a line of
its own for each set of texts: the halves are of each side's own shards.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.table import RESULTS
from raybert.report.drawing import COLOURS, MARKERS, PLAIN
from raybert.report.figure import PNG

# task -> the pooler's figure, and the title of its panel
PANELS = {
    "ag_news": ("test_accuracy", "AG News, accuracy"),
    "stsb": ("spearman", "STS-B, rank correlation"),
    "neighbours": ("mrr_at_10", "text halves, MRR@10"),
}
SIDES = {
    "recipe": ("blue", "jobs/record.yaml"),
    "original": ("orange", "jobs/compact.yaml"),
    "transformers": ("purple", "transformers"),
}
ACROSS = {"minutes": (1.0, "minutes"), "tokens": (1e-6, "million tokens")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("png", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS / "record.jsonl")
    parser.add_argument("--machine", help="as in the file")
    parser.add_argument("--minutes", type=float, help="the length of the runs")
    chosen = parser.parse_args()
    lines = [json.loads(line) for line in chosen.results.read_text(encoding="utf-8").splitlines()]
    machine = chosen.machine or lines[-1]["machine"]
    draw(points_of(lines, machine, chosen.minutes), machine, chosen.png)


def points_of(lines: Sequence[dict[str, Any]], machine: str, minutes: float | None = None) -> list[dict[str, Any]]:
    """The points of all lines of that machine and length."""
    own = [line for line in lines if line["machine"] == machine]
    minutes = minutes or max(map(length, own), default=0.0)
    return [point for line in own if length(line) == minutes for point in line["result"]["curves"]]


def length(line: dict[str, Any]) -> float:
    """Minutes of a line's runs."""
    return max(float(point["mark"]) for point in line["result"]["curves"])


def draw(curves: Sequence[dict[str, Any]], machine: str, path: Path) -> None:
    """Write the picture of these points, each of one side, seed and mark; of equal ones the last counts."""
    points = list({(p["side"], p["seed"], p["mark"]): p for p in curves}.values())
    measured = {probe["task"] for point in points for probe in point["probes"]}
    tasks = [task for task in PANELS if task in measured]
    with matplotlib.rc_context(PNG):
        figure = Figure(figsize=(3.7 * len(tasks), 5.8), layout="constrained")
        named: dict[str, Any] = {}
        for row, across in zip(figure.subplots(len(ACROSS), len(tasks), squeeze=False), ACROSS, strict=True):
            for axes, task in zip(row, tasks, strict=True):
                _panel(axes, points, task, across)
                handles, labels = axes.get_legend_handles_labels()
                named |= dict(zip(labels, handles, strict=True))
        figure.suptitle(machine, fontsize=9, x=0.01, ha="left")
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), fontsize=9)
        figure.savefig(path, metadata={"Software": None})


def _panel(axes: Axes, points: Sequence[dict[str, Any]], task: str, across: str) -> None:
    (figure, title), (unit, label) = PANELS[task], ACROSS[across]
    lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
    baselines: dict[float, str] = {}  # TF-IDF of a set of texts -> a side that is judged by them
    for point in points:
        for probe in point["probes"]:
            if probe["task"] == task:
                places = lines.setdefault((point["side"], point["seed"]), [])
                places.append((unit * point[across], probe["pooler"][figure]))
                baselines.setdefault(probe["tfidf"][figure], point["side"])
    for (side, _), places in sorted(lines.items()):
        colour, name = SIDES[side]
        style: dict[str, Any] = {"color": COLOURS[colour], "marker": MARKERS[colour], "markersize": 4}
        axes.plot(*zip(*sorted(places), strict=True), **style, label=f"{name}, pooler")
    for value, side in baselines.items():
        colour, name = SIDES[side] if len(baselines) > 1 else ("ink", "")
        label_of_line = f"TF-IDF on the texts of {name}" if name else "TF-IDF"
        axes.axhline(value, color=COLOURS[colour], linestyle=PLAIN["tfidf"][1], linewidth=1.2, label=label_of_line)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="x")


if __name__ == "__main__":
    main()
