"""The sweep's answer on paper: figures as PNG, one HTML page that holds them all, and a table for the terminal."""

import base64
import io
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import jinja2
import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from raybert import storage
from raybert.probe import POOLINGS
from raybert.report.read import percent
from raybert.sweep.space import SweepConfig, trials
from raybert.sweep.summary import BestRate, Outcome, best, best_rates, read_sweep, to_json

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def write_summary(sweep: SweepConfig) -> str:
    """Write SWEEP/{summary.json, winner.yaml, *.png, sweep.html} from the trials' directories; return the page's URI.

    `winner.yaml` is what `raybert pretrain` takes unchanged; it is missing while no trial is finished.
    """
    outcomes = read_sweep(sweep)
    rates = best_rates(outcomes)
    storage.write_json(storage.join(sweep.uri, "summary.json"), to_json(outcomes))
    winner = best(outcomes)
    if winner is not None:
        config = next(trial.config for trial in trials(sweep) if trial.name == winner.name)
        tree = config.model_dump(mode="json") | {"run": {"name": f"{sweep.name}-winner", "storage": sweep.storage}}
        storage.write_bytes(storage.join(sweep.uri, "winner.yaml"), yaml.safe_dump(tree, sort_keys=False).encode())
    figures = {}
    for name, figure in _figures(outcomes, rates).items():
        figures[name] = _png(figure)
        storage.write_bytes(storage.join(sweep.uri, f"{name}.png"), figures[name])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "sentence": sentence}
    template = environment.from_string(files("raybert.sweep").joinpath("sweep.html").read_text(encoding="utf-8"))
    page = template.render(
        sweep=sweep,
        outcomes=outcomes,
        rates=rates,
        winner=winner,
        keys=list(sweep.space),
        tasks=list(dict.fromkeys(task for o in outcomes for task in o.probes)),
        poolings=POOLINGS,
        figures={name: base64.b64encode(png).decode() for name, png in figures.items()},
        settings=yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False),
    )
    uri = storage.join(sweep.uri, "sweep.html")
    storage.write_bytes(uri, page.encode())
    return uri


def summary_table(sweep: SweepConfig) -> Table:
    """A row a trial, the best first; below it the best rate of each size."""
    outcomes = read_sweep(sweep)
    tasks = list(dict.fromkeys(task for o in outcomes for task in o.probes))
    keys = list(sweep.space)
    probes = [f"{task} {pooling} %" for task in tasks for pooling in POOLINGS]
    table = Table("trial", *keys, "steps", "valid. loss", *probes, "", box=box.SIMPLE_HEAD, title=escape(sweep.name))
    for o in sorted(outcomes, key=lambda o: np.inf if o.loss is None else o.loss):
        scores = [o.probes.get(task, {}).get(pooling) for task in tasks for pooling in POOLINGS]
        table.add_row(
            o.name,
            *(escape(f"{o.point[key]:g}" if isinstance(o.point[key], float) else str(o.point[key])) for key in keys),
            f"{o.steps:,}",
            "" if o.loss is None else f"{o.loss:.4f}",
            *("" if score is None else f"{100 * score:.1f}" for score in scores),
            o.status,
        )
    table.caption = escape("\n".join(sentence(rate) for rate in best_rates(outcomes))) or None
    return table


def sentence(rate: BestRate) -> str:
    """Which learning rate is best for a size, and how sure that is."""
    text = f"{rate.group}: lowest loss {rate.loss:.4f} at lr {rate.measured:.3g}"
    if rate.fitted is not None:
        text += f"; a parabola in log lr puts the best at {rate.fitted:.3g}"
    if rate.interval is not None:
        text += f" (95 % interval {rate.interval[0]:.3g} to {rate.interval[1]:.3g})"
    return f"{text}; {rate.remark}." if rate.remark else f"{text}."


def _figures(outcomes: Sequence[Outcome], rates: Sequence[BestRate]) -> dict[str, Figure]:
    with matplotlib.rc_context(STYLE):
        figures = {
            "loss_tokens": _curves(outcomes, "tokens", lambda o: np.asarray(o.tokens)),
            "loss_flops": _curves(outcomes, "training FLOPs", lambda o: np.asarray(o.tokens) * o.flops_per_token),
        }
        if any(o.lr is not None for o in outcomes):
            figures["heatmap"] = _heatmap(outcomes)
            figures["best_lr"] = _parabolas(outcomes, rates)
        return figures


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
    axes.legend(fontsize=8, frameon=False, ncols=2)
    return figure


_MAPS = ("Blues", "Oranges", "Greens", "Purples", "Greys")


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
    middle = np.nanmean(values) if np.isfinite(values).any() else 0.0
    for (row, column), text in texts.items():
        dark = np.isfinite(values[row, column]) and values[row, column] < middle
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xticks(range(len(lrs)), [f"{lr:.3g}" for lr in lrs])
    axes.set_yticks(range(len(groups)), groups)
    axes.set(xlabel="learning rate", ylabel="size")
    axes.grid(visible=False)
    figure.colorbar(image, label="last validation loss (nats)")
    return figure


def _parabolas(outcomes: Sequence[Outcome], rates: Sequence[BestRate]) -> Figure:
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, rate in enumerate(rates):
        colour = f"C{index}"
        members = [o for o in outcomes if o.group == rate.group and o.lr is not None and o.loss is not None]
        common = min(o.tokens[-1] for o in members)
        points = sorted((o.lr or 0.0, float(np.interp(common, o.tokens, o.losses))) for o in members)
        x, y = np.array(points).T
        axes.plot(x, y, "o", color=colour, label=f"{rate.group}, at {common:,.0f} tokens")
        if len(x) >= 3:
            middle = np.log(x).mean()
            fine = np.geomspace(x.min(), x.max(), 100)
            axes.plot(fine, np.polyval(np.polyfit(np.log(x) - middle, y, 2), np.log(fine) - middle), color=colour, lw=1)
        if rate.fitted is not None:
            axes.axvline(rate.fitted, color=colour, lw=1, ls="--")
        if rate.interval is not None:
            low, high = max(rate.interval[0], x.min()), min(rate.interval[1], x.max())
            axes.axvspan(low, high, color=colour, alpha=0.12)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss at equal tokens (nats)")
    axes.legend(fontsize=8, frameon=False)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
