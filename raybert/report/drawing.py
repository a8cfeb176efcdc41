"""What the page's charts and the PNG figure share: colours, legends, curves of at most so many points, probe scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from numpy.typing import ArrayLike

from raybert.encode import POOLINGS
from raybert.probe import kinds
from raybert.report.read import Baselines, Probe, Score

# Okabe and Ito's palette (jfly.uni-koeln.de/color), made for colour-blind readers too; the page has its dark twin.
COLOURS = {
    "ink": "#1d2630",
    "muted": "#6b7683",
    "grid": "#e3e7ec",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "yellow": "#b37a00",
    "purple": "#b0578d",
}
POOLING_TITLES = {"cls": "[CLS]"}  # of those that people do not call as the records do
POOLING_COLOURS = dict(zip(POOLINGS, ("blue", "orange", "green"), strict=True))
MARKERS = {"blue": "o", "orange": "s", "green": "D", "purple": "^"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "raybert",  # the same run gives the same page
    "font.size": 10,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
MAX_POINTS = 600
"""Points of a drawn curve: about what the screen can show, and a bound on the page's size."""

PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %")
POINTS = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}")

Mark = Literal["line", "faint", "dash", "dashdot", "longdash", "dot", "point", "area"]


@dataclass(frozen=True)
class Key:
    """An entry of a legend; `colour` is a name of COLOURS."""

    label: str
    colour: str
    mark: Mark = "line"


# Of the same encoder untrained, and of what the run began with, which has a diamond at step 0 as well.
UNTRAINED: tuple[Mark, Any] = ("dash", (0, (2.5, 2)))
START: tuple[Mark, Any] = ("dashdot", (0, (9, 2, 1.5, 2)))
DIAMOND: dict[str, Any] = {"marker": "D", "markersize": 5.5, "markerfacecolor": "none"}
# Of the baselines without an encoder: mark and matplotlib's line style.
PLAIN: dict[str, tuple[Mark, Any]] = {
    "majority": ("dot", (0, (1, 2))),
    "tfidf": ("line", "solid"),
    "bm25": ("longdash", (0, (9, 3))),
}


def draw_scores(axes: Axes, probes: Sequence[Probe], place: Callable[[list[int], int], ArrayLike]) -> list[Key]:
    """The headline of each pooling with its 95 % intervals.

    Args:
        place: steps and the number of the pooling -> where they stand on the x axis.
    """
    keys = []
    for number, pooling in enumerate(dict.fromkeys(pooling for probe in probes for pooling in probe.scores)):
        colour, title = POOLING_COLOURS.get(pooling, "purple"), POOLING_TITLES.get(pooling, pooling)
        shown = [(probe.step, probe.scores[pooling]) for probe in probes if pooling in probe.scores]
        y = np.array([score.value for _, score in shown])
        low, high = np.array([score.interval or (score.value,) * 2 for _, score in shown]).T
        axes.errorbar(
            place([step for step, _ in shown], number),
            y,
            yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)],
            color=COLOURS[colour],
            marker=MARKERS.get(colour, "^"),
            markersize=4.5,
            elinewidth=1.3,
            clip_on=False,
            label=title,
        )
        keys.append(Key(f"{title}, 95 % interval", colour))
    return keys


def draw_baselines(axes: Axes, baselines: Baselines) -> list[Key]:
    """A line across for each baseline: in the pooling's colour, dashed for the same encoder untrained, and dashed and
    dotted, with a diamond, for what the run began with, unless they are the same."""
    lines: list[tuple[str, Score, str, Mark, Any]] = []
    for name, scores, style in (("untrained", baselines.untrained, UNTRAINED), ("start", baselines.start, START)):
        for pooling, score in scores.items():
            if name == "untrained" or score != baselines.untrained.get(pooling):
                title = f"{name} {POOLING_TITLES.get(pooling, pooling)}"
                lines.append((title, score, POOLING_COLOURS.get(pooling, "purple"), *style))
    for name, title in kinds.BASELINES.items():
        if name in baselines.plain:
            lines.append((title, baselines.plain[name], "ink", *PLAIN[name]))
    for _, score, colour, mark, style in lines:
        diamond = DIAMOND | {"markevery": [0], "clip_on": False, "in_layout": False} if mark == START[0] else {}
        axes.axhline(score.value, color=COLOURS[colour], linestyle=style, linewidth=1.3, **diamond)
    return [Key(label, colour, mark) for label, _, colour, mark, _ in lines]


def smooth(values: Sequence[float]) -> np.ndarray:
    """Moving average over a fiftieth of the curve, 5 points at least, centred as far as there are points. (N,)"""
    half = max(2, len(values) // 100)
    totals = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    here = np.arange(len(values))
    low, high = np.maximum(here - half, 0), np.minimum(here + half + 1, len(values))
    return (totals[high] - totals[low]) / (high - low)


def thin(steps: Sequence[int], values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points, evenly taken, the first and the last among them."""
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).round().astype(int))
    return np.asarray(steps)[kept], np.asarray(values)[kept]


def downsample(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: the lowest and the highest of every bucket, so that no spike is lost."""
    x, y = np.asarray(steps), np.asarray(values, dtype=float)
    if len(x) <= MAX_POINTS:
        return x, y
    buckets = np.array_split(np.arange(len(x)), MAX_POINTS // 2)
    kept = np.unique([pick for b in buckets for pick in (b[y[b].argmin()], b[y[b].argmax()])])
    return x[kept], y[kept]


def bin_means(steps: Sequence[int], values: np.ndarray, bins: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Means over runs of neighbouring columns of values (K, N), with the steps where they begin and end.

    Returns:
        edges (M + 1,) and means (K, M), M <= bins.
    """
    size = -(-len(steps) // bins)
    groups = [range(start, min(start + size, len(steps))) for start in range(0, len(steps), size)]
    edges = np.array([0, *(steps[group[-1]] for group in groups)])
    return edges, np.stack([values[:, group].mean(axis=1) for group in groups], axis=1)
