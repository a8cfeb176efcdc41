"""Charts as inline SVG whose colours are the page's CSS variables, so that one drawing serves light and dark.

Matplotlib writes fixed colours. Each is drawn here in the light page's value and then replaced by the variable of that
name. Legends are left to the page, where they wrap and never cover data.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from raybert.encode import POOLINGS
from raybert.report.read import WAITS, Baselines, Probe, RunData, Score

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
POOLING_COLOURS = dict(zip(POOLINGS, ("blue", "orange", "green"), strict=True))
WAIT_COLOURS = dict(zip(WAITS, ("blue", "orange", "green", "purple"), strict=True))
MARKERS = {"blue": "o", "orange": "s", "green": "D"}
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
RAW: dict[str, Any] = {"alpha": 0.35, "linewidth": 0.9, "clip_on": False}
MAX_POINTS = 600
"""Points of a drawn curve: about what the screen can show, and a bound on the page's size."""

PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %")

Mark = Literal["line", "faint", "dash", "dot", "point", "area"]


@dataclass(frozen=True)
class Key:
    """An entry of a legend; `colour` is a name of COLOURS."""

    label: str
    colour: str
    mark: Mark = "line"


@dataclass(frozen=True)
class Chart:
    """A drawing with the texts that the page sets around it."""

    id: str
    title: str
    svg: str
    keys: Sequence[Key] = field(default_factory=tuple)


def learning_charts(run: RunData) -> list[Chart]:
    """Losses and accuracies; a chart without any data is left out."""
    charts = (
        _curve(run, "mlm-loss", "Masked-language-model loss", "mlm_loss", "nats per masked token"),
        _curve(run, "nsp-loss", "Next-sentence loss", "nsp_loss", "nats per pair", chance=float(np.log(2))),
        _curve(run, "mlm-accuracy", "Masked tokens predicted right", "mlm_accuracy", "of masked tokens", share=True),
        _curve(run, "nsp-accuracy", "Sentence pairs told apart", "nsp_accuracy", "of pairs", share=True, chance=0.5),
    )
    return [chart for chart in charts if chart is not None]


def machine_charts(run: RunData) -> list[Chart]:
    """Speed, waits, schedule and gradient; a chart without any data is left out."""
    charts = (
        _throughput(run),
        _waits(run),
        _plain(run, "lr", "Learning rate", "lr", "learning rate"),
        _plain(run, "grad-norm", "Gradient norm before clipping", "grad_norm", "L2 norm"),
    )
    return [chart for chart in charts if chart is not None]


def probe_chart(probes: Sequence[Probe], name: str, *, wide: bool) -> Chart:
    """Test accuracy by step of one task: a line a pooling with its 95 % intervals, and the baselines across."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure((10.5, 4.2) if wide else (6.0, 4.2))
        keys = []
        poolings = list(dict.fromkeys(pooling for probe in probes for pooling in probe.scores))
        span = max(probe.step for probe in probes)
        for place, pooling in enumerate(poolings):
            colour = POOLING_COLOURS.get(pooling, "purple")
            shown = [(probe.step, probe.scores[pooling]) for probe in probes if pooling in probe.scores]
            # Side by side, so that intervals at one step do not cover each other.
            shift = (place - (len(poolings) - 1) / 2) * span * 0.006
            x = [step + shift for step, _ in shown]
            y = np.array([score.accuracy for _, score in shown])
            low, high = np.array([score.interval or (score.accuracy,) * 2 for _, score in shown]).T
            axes.errorbar(
                x,
                y,
                yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)],
                color=COLOURS[colour],
                marker=MARKERS.get(colour, "^"),
                markersize=4.5,
                elinewidth=1.3,
                clip_on=False,
            )
            keys.append(Key(f"{pooling}, 95 % interval", colour))
        keys += _baseline_lines(axes, probes[-1].baselines)
        axes.set_ylabel("test accuracy")
        axes.yaxis.set_major_formatter(PERCENT)
        axes.margins(y=0.08)
        _steps(axes, span * 1.02)
        return Chart(name, "Test accuracy by step", _svg(figure, name), keys)


def _baseline_lines(axes: Axes, baselines: Baselines) -> list[Key]:
    lines: list[tuple[str, Score | None, str, Mark, Any]] = [
        (f"untrained {pooling}", score, POOLING_COLOURS.get(pooling, "purple"), "dash", (0, (5, 3)))
        for pooling, score in baselines.untrained.items()
    ]
    lines.append(("majority class", baselines.majority, "ink", "dot", (0, (1, 2))))
    lines.append(("TF-IDF + logistic regression", baselines.tfidf, "ink", "line", "solid"))
    for _, score, colour, _, style in lines:
        if score is not None:
            axes.axhline(score.accuracy, color=COLOURS[colour], linestyle=style, linewidth=1.3)
    return [Key(label, colour, mark) for label, score, colour, mark, _ in lines if score is not None]


def _curve(
    run: RunData, name: str, title: str, key: str, unit: str, *, share: bool = False, chance: float | None = None
) -> Chart | None:
    """A training curve, raw and smoothed, with the validation points of the same key."""
    steps, values = run.series(key)
    validation_steps, validation = run.series(f"validation.{key}")
    if not steps and not validation_steps:
        return None
    keys = []
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        if steps:
            axes.plot(*downsample(steps, values), color=COLOURS["blue"], **RAW)
            axes.plot(*thin(steps, smooth(values)), color=COLOURS["blue"], **_dot(steps))
            keys = [Key("train, as logged", "blue", "faint"), Key("train, moving average", "blue")]
        if validation_steps:
            few = len(validation_steps) <= 40
            axes.plot(
                *thin(validation_steps, validation),
                color=COLOURS["orange"],
                marker="o" if few else None,
                markersize=4,
                linewidth=1 if few else 1.6,
                clip_on=False,
            )
            keys.append(Key("validation", "orange", "point" if few else "line"))
        if chance is not None:
            axes.axhline(chance, color=COLOURS["muted"], linestyle=(0, (1, 2)), linewidth=1.3)
            keys.append(Key("chance: 50 %" if share else "chance: ln 2", "muted", "dot"))
        if share:
            axes.yaxis.set_major_formatter(PERCENT)
        axes.set_ylabel(unit)
        _steps(axes, run.steps_done)
        return Chart(name, title, _svg(figure, name), keys)


def _plain(run: RunData, name: str, title: str, key: str, unit: str) -> Chart | None:
    steps, values = run.series(key)
    if not steps:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        axes.plot(*downsample(steps, values), color=COLOURS["blue"], **_dot(steps))
        axes.set_ylabel(unit)
        axes.set_ylim(0, 1.05 * max(values) or 1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        _steps(axes, run.steps_done)
        return Chart(name, title, _svg(figure, name))


def _throughput(run: RunData) -> Chart | None:
    """Tokens a second over all workers, and below it the share of the measured peak."""
    if not run.series("tokens_per_second")[0]:
        return None
    with matplotlib.rc_context(STYLE):
        figure, (upper, lower) = _figure(rows=2)
        for axes, key, colour in ((upper, "tokens_per_second", "blue"), (lower, "mfu", "green")):
            steps, values = run.series(key)
            if steps:
                axes.plot(*downsample(steps, values), color=COLOURS[colour], **RAW)
                axes.plot(*thin(steps, smooth(values)), color=COLOURS[colour], **_dot(steps))
                axes.set_ylim(0, 1.15 * max(values) or 1.0)
            _steps(axes, run.steps_done)
        upper.set_xlabel("")
        upper.tick_params(labelbottom=False)
        upper.set_ylabel("tokens/s")
        upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        lower.set_ylabel("MFU")
        lower.yaxis.set_major_formatter(PERCENT)
        for axes in (upper, lower):
            axes.yaxis.set_major_locator(MaxNLocator(4))
        figure.align_ylabels()
        keys = [
            Key("tokens/s, all workers", "blue"),
            Key("MFU: share of the measured peak", "green"),
            Key("as logged", "muted", "faint"),
        ]
        return Chart("throughput", "Throughput", _svg(figure, "throughput"), keys)


def _waits(run: RunData) -> Chart | None:
    """Shares of wall time that the step waited, stacked."""
    columns = {kind: dict(zip(*run.series(f"wait_{kind}"), strict=True)) for kind in WAITS}
    steps = sorted({step for column in columns.values() for step in column})
    if not steps:
        return None
    shown = [kind for kind in WAITS if columns[kind]]
    values = np.array([[columns[kind].get(step, 0.0) for step in steps] for kind in shown])
    edges, heights = bin_means(steps, values)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        base = np.zeros(heights.shape[1])
        for kind, height in zip(shown, heights, strict=True):
            axes.stairs(base + height, edges, baseline=base, fill=True, color=COLOURS[WAIT_COLOURS[kind]], linewidth=0)
            base = base + height
        axes.set_ylabel("% of wall time")
        # A well-fed run waits for almost nothing: a scale that ends below 2 % would make that look like a lot.
        axes.set_ylim(0, max(0.02, 1.1 * float(base.max())))
        axes.yaxis.set_major_formatter(PERCENT)
        _steps(axes, run.steps_done)
        keys = [
            Key(f"{kind} {100 * (run.wait_share(kind) or 0.0):.2g} %", WAIT_COLOURS[kind], "area") for kind in shown
        ]
        return Chart("waits", "Time the step waited for (legend: share of the whole run)", _svg(figure, "waits"), keys)


# -- drawing ----------------------------------------------------------------------------------------------------


def _figure(inches: tuple[float, float] = (6.0, 3.1), *, rows: int = 1) -> tuple[Figure, Any]:
    """A figure and its axes (an array of them for several rows). The page scales it; only its shape matters."""
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.subplots(rows, 1)
    for one in np.atleast_1d(axes):
        one.grid(visible=False, axis="x")
    return figure, axes


def _dot(steps: Sequence[int]) -> dict[str, Any]:
    """Options of a line that must not be cut at the edges, nor be invisible when it is one point."""
    return {"marker": "o" if len(steps) == 1 else None, "clip_on": False}


def _steps(axes: Axes, last: float) -> None:
    axes.set_xlim(0, max(last, 1))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element: transparent, sized by the page, coloured by its variables, ids its own."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<[^>]+>", lambda tag: _tag(tag[0], name), svg)
    for colour, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{colour})")
    return svg


def _tag(tag: str, name: str) -> str:
    """One tag as the page wants it: its size and font from the page, ids of this chart, hundredths of a point."""
    if tag.startswith("<svg"):
        return re.sub(r' (?:width|height|version|xmlns(?::\w+)?)="[^"]*"', "", tag)
    tag = re.sub(r'\bid="', f'id="{name}-', tag).replace('xlink:href="#', f'href="#{name}-')
    tag = tag.replace("url(#", f"url(#{name}-")
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    return re.sub(r"(\.\d\d)\d+", r"\1", tag)


# -- curves -----------------------------------------------------------------------------------------------------


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
