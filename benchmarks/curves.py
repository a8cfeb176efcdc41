"""What `benchmarks.record` measured, as a picture: probes against minutes of training, and against tokens.

    python -m benchmarks.record | tail -n 1 | python -m benchmarks.table append
    python -m benchmarks.curves docs/images/record.png

A panel a task, a colour a side, a line a seed; dashed, what TF-IDF has on the same texts.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
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
    chosen = parser.parse_args()
    lines = chosen.results.read_text(encoding="utf-8").splitlines()
    draw([point for line in lines for point in json.loads(line)["result"]["curves"]], chosen.png)


def draw(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture of these points, each of one side, seed and time; of equal ones the last counts."""
    points = {(p["side"], p["seed"], p["mark"]): p for p in curves}
    with matplotlib.rc_context(PNG):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        for row, across in zip(figure.subplots(len(ACROSS), len(PANELS)), ACROSS, strict=True):
            for axes, task in zip(row, PANELS, strict=True):
                _panel(axes, points.values(), task, across)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
        figure.savefig(path, metadata={"Software": None})


def _panel(axes: Axes, points: Iterable[dict[str, Any]], task: str, across: str) -> None:
    (figure, title), (unit, label) = PANELS[task], ACROSS[across]
    lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
    baseline = None
    for point in points:
        for probe in point["probes"]:
            if probe["task"] == task:
                lines.setdefault((point["side"], point["seed"]), []).append(
                    (unit * point[across], probe["pooler"][figure])
                )
                baseline = probe["tfidf"].get(figure, baseline)
    named = set()
    for (side, _), places in sorted(lines.items(), key=lambda item: (list(SIDES).index(item[0][0]), item[0][1])):
        colour, name = SIDES[side]
        axes.plot(
            *zip(*sorted(places), strict=True),
            color=COLOURS[colour],
            marker=MARKERS[colour],
            markersize=4,
            label=None if side in named else f"{name}, pooler",
        )
        named.add(side)
    if baseline is not None:
        axes.axhline(baseline, color=COLOURS["ink"], linestyle=PLAIN["bm25"][1], linewidth=1.2, label="TF-IDF")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="x")


if __name__ == "__main__":
    main()
