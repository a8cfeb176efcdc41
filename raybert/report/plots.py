"""Charts as inline SVG whose colours are the page's CSS variables, so that one drawing serves light and dark.

Matplotlib writes fixed colours. Each is drawn here in the light page's value and then replaced by the variable of that
name. Legends are left to the page, where they wrap and never cover data.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from raybert.report.drawing import (
    COLOURS,
    PERCENT,
    POINTS,
    STYLE,
    Key,
    bin_means,
    downsample,
    draw_baselines,
    draw_scores,
    smooth,
    thin,
)
from raybert.report.read import WAITS, Probe, RunData

WAIT_COLOURS = dict(zip(WAITS, ("blue", "orange", "green", "purple"), strict=True))
RAW: dict[str, Any] = {"alpha": 0.35, "linewidth": 0.9, "clip_on": False}


@dataclass(frozen=True)
class Chart:
    """A drawing with the texts that the page sets around it."""

    id: str
    title: str
    svg: str
    keys: Sequence[Key] = field(default_factory=tuple)


def learning_charts(run: RunData) -> list[Chart]:
    """Losses and accuracies; a chart without any data is left out."""
    # A half finds its other half among those of a micro-batch; those of its own document are left out.
    halves = run.setting("train.micro_batch", 0)
    charts = (
        _curve(run, "mlm-loss", "Masked-language-model loss", "mlm_loss", "nats per masked token"),
        _curve(run, "nsp-loss", "Next-sentence loss", "nsp_loss", "nats per pair", chance=2),
        _curve(run, "contrast-loss", "Contrastive loss", "contrast_loss", "nats per pair", chance=halves),
        _curve(run, "bag-loss", "Bag-of-words loss", "bag_loss", "nats per word"),
        _curve(run, "mlm-accuracy", "Masked-token accuracy", "mlm_accuracy", "of masked tokens", share=True),
        _curve(run, "nsp-accuracy", "Next-sentence accuracy", "nsp_accuracy", "of pairs", share=True, chance=2),
        _curve(
            run, "contrast-accuracy", "Contrastive accuracy", "contrast_accuracy", "of pairs", share=True, chance=halves
        ),
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
    """The headline by step of one task: a line a pooling with its 95 % intervals, and the baselines across."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure((10.5, 4.2) if wide else (6.0, 4.2))
        poolings = len({pooling for probe in probes for pooling in probe.scores})
        span = max(probe.step for probe in probes)

        def side_by_side(steps: list[int], number: int) -> list[float]:
            """So that intervals at one step do not cover each other."""
            return [step + (number - (poolings - 1) / 2) * span * 0.006 for step in steps]

        keys = draw_scores(axes, probes, side_by_side) + draw_baselines(axes, probes[-1].baselines)
        headline = probes[-1].kind.headline
        axes.set_ylabel(headline.label)
        axes.yaxis.set_major_formatter(PERCENT if headline.share else POINTS)
        axes.margins(y=0.08)
        _steps(axes, span * 1.02)
        title = headline.title[0].upper() + headline.title[1:]
        return Chart(name, f"{title} by step", _svg(figure, name), keys)


def _curve(
    run: RunData, name: str, title: str, key: str, unit: str, *, share: bool = False, chance: int = 0
) -> Chart | None:
    """A training curve, raw and smoothed, with the validation points of the same key.

    Args:
        chance: among so many the right one is chosen; 0 where nobody says.
    """
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
        if chance > 1:
            guessing = 1 / chance if share else float(np.log(chance))
            axes.axhline(guessing, color=COLOURS["muted"], linestyle=(0, (1, 2)), linewidth=1.3)
            keys.append(Key(f"chance: {100 / chance:.3g} %" if share else f"chance: ln {chance}", "muted", "dot"))
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
        return Chart("waits", "Wait time of the step (legend: share of the run)", _svg(figure, "waits"), keys)


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
