"""The figures of a sweep. They stay readable, and small, for a thousand trials."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raybert.sweep.rates import BestRate
from raybert.sweep.summary import Outcome

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
# A heat map of more columns or rows than this cannot be read: a point a trial is drawn instead.
MOST_CELLS = 20
# Nor can a legend of more lines.
MOST_LINES = 12
_MAPS = ("Blues", "Oranges", "Greens", "Purples", "Greys")
_MARKERS = {"finished": "o", "pruned": "v"}


def figures(outcomes: Sequence[Outcome], rates: Sequence[BestRate]) -> dict[str, tuple[str, Figure]]:
    """Name -> title, figure."""
    found: dict[str, tuple[str, Figure]] = {}
    with matplotlib.rc_context(STYLE):
        if any(o.lr is not None for o in outcomes):
            lrs = {o.lr for o in outcomes if o.lr is not None}
            if max(len(lrs), len({o.group for o in outcomes})) > MOST_CELLS:
                found["loss_lr"] = ("Last validation loss against the learning rate", _scatter(outcomes))
            else:
                found["heatmap"] = ("Last validation loss: learning rate by size", _heatmap(outcomes))
            if any(rate.points for rate in rates):
                found["best_lr"] = ("Best learning rate of each size", _parabolas(rates))
        found["loss_tokens"] = ("Loss against tokens", _curves(outcomes, "tokens", lambda o: np.asarray(o.tokens)))
        by_flops = _curves(outcomes, "training FLOPs", lambda o: np.asarray(o.tokens) * o.flops_per_token)
        found["loss_flops"] = ("Loss against FLOPs", by_flops)
    return found


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _legend(axes: Axes) -> None:
    if 0 < len(axes.get_legend_handles_labels()[1]) <= MOST_LINES:
        axes.legend(fontsize=8, frameon=False, ncols=2)


def _scatter(outcomes: Sequence[Outcome]) -> Figure:
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for index, group in enumerate(dict.fromkeys(o.group for o in outcomes)):
        of_group = [o for o in outcomes if o.group == group and o.lr is not None and o.loss is not None]
        for status in dict.fromkeys(o.status for o in of_group):
            points = [(o.lr, o.loss) for o in of_group if o.status == status]
            x, y = zip(*points, strict=True)
            axes.plot(x, y, _MARKERS.get(status, "x"), ms=4, alpha=0.7, color=f"C{index}", label=f"{group}, {status}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="last validation loss (nats)")
    _legend(axes)
    return figure


def _curves(outcomes: Sequence[Outcome], label: str, x: Callable[[Outcome], np.ndarray]) -> Figure:
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(o.group for o in outcomes))
    lrs = sorted({o.lr for o in outcomes if o.lr is not None})
    for o in outcomes:
        if not o.losses:
            continue
        shade = 0.35 + 0.6 * (lrs.index(o.lr) / max(1, len(lrs) - 1) if o.lr in lrs else 0.5)
        colour = matplotlib.colormaps[_MAPS[groups.index(o.group) % len(_MAPS)]](shade)
        name = f"{o.group}, lr {o.lr:.3g}" if o.lr is not None else o.group
        axes.plot(x(o)[1:], o.losses[1:], marker="o", markersize=3, color=colour, label=name)
    axes.set(xlabel=label, ylabel="validation loss (nats)", xscale="log")
    _legend(axes)
    return figure


def _heatmap(outcomes: Sequence[Outcome]) -> Figure:
    groups = list(dict.fromkeys(o.group for o in outcomes))
    lrs = sorted({o.lr for o in outcomes if o.lr is not None})
    values = np.full((len(groups), len(lrs)), np.nan)
    texts = {}
    for o in outcomes:
        if o.lr is None:
            continue
        place = (groups.index(o.group), lrs.index(o.lr))
        values[place] = np.nan if o.loss is None else o.loss
        note = "" if o.status == "finished" else f"\n{o.status}"
        texts[place] = f"{o.loss:.3f}{note}" if o.loss is not None else o.status
    figure = Figure(figsize=(2.2 + 1.3 * len(lrs), 1.6 + 0.9 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis_r", aspect="auto")
    for (row, column), text in texts.items():
        dark = np.isfinite(values[row, column]) and float(np.asarray(image.norm(values[row, column]))) > 0.4
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xticks(range(len(lrs)), [f"{lr:.3g}" for lr in lrs])
    axes.set_yticks(range(len(groups)), groups)
    axes.set(xlabel="learning rate", ylabel="size")
    axes.grid(visible=False)
    figure.colorbar(image, label="last validation loss (nats)")
    return figure


def _parabolas(rates: Sequence[BestRate]) -> Figure:
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, rate in enumerate(rates):
        if not rate.points:
            continue
        colour = f"C{index}"
        x, y = np.array(rate.points).T
        axes.plot(x, y, "o", color=colour, label=f"{rate.group}, at {rate.tokens:,.0f} tokens")
        if len(set(x)) >= 3:
            middle = np.log(x).mean()
            fine = np.geomspace(x.min(), x.max(), 100)
            axes.plot(fine, np.polyval(np.polyfit(np.log(x) - middle, y, 2), np.log(fine) - middle), color=colour, lw=1)
        if rate.fitted is not None:
            axes.axvline(rate.fitted, color=colour, lw=1, ls="--")
        if rate.interval is not None:
            low, high = max(rate.interval[0], x.min()), min(rate.interval[1], x.max())
            axes.axvspan(low, high, color=colour, alpha=0.12)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss at equal tokens (nats)")
    _legend(axes)
    return figure
