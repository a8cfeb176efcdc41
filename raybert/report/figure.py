"""One picture of a run: losses, and probe accuracy beside its baselines, against the tokens trained on."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from raybert import storage
from raybert.model.objective import TITLES
from raybert.probe import kinds
from raybert.report.drawing import (
    COLOURS,
    DIAMOND,
    MARKERS,
    PERCENT,
    PLAIN,
    POINTS,
    START,
    STYLE,
    UNTRAINED,
    draw_baselines,
    draw_scores,
    smooth,
    thin,
)
from raybert.report.read import RunData, read_run

PNG: dict[Any, Any] = STYLE | {"savefig.dpi": 160, "savefig.facecolor": "white", "legend.frameon": False}


def write_figure(run_uri: str, uri: str) -> None:
    """Draw a run into a PNG file at any URI.

    Raises:
        InputError: it is not a run directory.
    """
    storage.write_bytes(uri, learning_figure(read_run(run_uri)))


def learning_figure(run: RunData) -> bytes:
    """PNG: the losses on the left, on the right the test accuracy of each probe task with its 95 % intervals.

    The tokens are positions of the training samples: steps x global batch x tokens of a sample.
    """
    tasks = [task for task in run.tasks if run.of_task(task)]
    with matplotlib.rc_context(PNG):
        figure = Figure(figsize=(5.6 * (1 + len(tasks)), 3.9), layout="constrained")
        panels = figure.subplots(1, 1 + len(tasks), squeeze=False)[0]
        in_tokens, label = _tokens(run)
        _losses(panels[0], run, in_tokens)
        for axes, task in zip(panels[1:], tasks, strict=True):
            _probes(axes, run, task, in_tokens)
        for axes in panels:
            axes.grid(visible=False, axis="x")
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def _tokens(run: RunData) -> tuple[Callable[[Any], np.ndarray], str]:
    """From steps to millions of tokens; steps stay steps where the run does not say how long a sample is."""
    if not run.seq_len:
        return lambda steps: np.asarray(steps, dtype=float), "step"
    each = run.seq_len * run.setting("train.global_batch", 1) / 1e6
    return lambda steps: np.asarray(steps) * each, "million tokens"


def _losses(axes: Axes, run: RunData, in_tokens: Callable[[Any], np.ndarray]) -> None:
    for (loss, name), colour in zip(TITLES.items(), ("blue", "green", "orange", "purple"), strict=True):
        key = f"{loss}_loss"
        steps, values = run.series(key)
        if steps:
            shown, smoothed = thin(steps, smooth(values))
            axes.plot(in_tokens(shown), smoothed, color=COLOURS[colour], label=f"{name}, train")
        steps, values = run.series(f"validation.{key}")
        if steps:
            options: dict[str, Any] = {
                "linestyle": "none",
                "markersize": 4.5,
                "marker": MARKERS[colour],
                "clip_on": False,
            }
            axes.plot(in_tokens(steps), values, color=COLOURS[colour], label=f"{name}, validation", **options)
    axes.set_title("Loss", loc="left")
    axes.set_ylabel("nats")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _probes(axes: Axes, run: RunData, task: str, in_tokens: Callable[[Any], np.ndarray]) -> None:
    probes = run.of_task(task)
    draw_scores(axes, probes, lambda steps, _: in_tokens(steps))
    # Entries of their own: of the untrained encoder, and of the start, there is a line for each pooling, in its colour.
    plain = {mark: name for name, (mark, _) in PLAIN.items()}
    names = {UNTRAINED[0]: "the same, untrained", START[0]: "the start"}
    names |= {mark: kinds.BASELINES[name] for mark, name in plain.items()}
    styles: dict[str, Any] = dict((UNTRAINED, START, *PLAIN.values()))
    for mark in dict.fromkeys(key.mark for key in draw_baselines(axes, probes[-1].baselines)):
        axes.plot(
            [],
            [],
            color=COLOURS["ink" if mark in plain else "muted"],
            linestyle=styles[mark],
            linewidth=1.3,
            label=names[mark],
            **(DIAMOND if mark == START[0] else {}),
        )
    headline = probes[-1].kind.headline
    axes.set_title(f"Probe {task}: {headline.label}, 95 % intervals", loc="left")
    axes.yaxis.set_major_formatter(PERCENT if headline.share else POINTS)
    # Below the axes: no place inside is free of data for every run.
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), handlelength=3)
