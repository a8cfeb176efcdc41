"""The sweep's answer on paper: figures as PNG, and one HTML page that holds them all."""

import base64
from collections.abc import Sequence
from importlib.resources import files

import jinja2
import yaml

from raybert import storage
from raybert.encode import POOLINGS
from raybert.probe import kinds
from raybert.report.beyond import gains
from raybert.report.read import percent
from raybert.sweep.figures import figures, png
from raybert.sweep.rates import best_rates, sentence
from raybert.sweep.space import SweepConfig, trials
from raybert.sweep.summary import Outcome, best, collapses, sentence_of_best, tasks_of, to_json


def write_summary(sweep: SweepConfig, outcomes: Sequence[Outcome]) -> str:
    """Write SWEEP/{summary.json, winner.yaml, *.png, sweep.html} and return the page's URI.

    `winner.yaml` is what `raybert pretrain` takes unchanged; it is missing while no trial is finished.

    Args:
        outcomes: what `read_sweep` found.
    """
    rates = best_rates(outcomes)
    storage.write_json(storage.join(sweep.uri, "summary.json"), to_json(outcomes))
    winner = best(sweep.metric, outcomes)
    if winner is not None:
        config = next(trial.config for trial in trials(sweep) if trial.name == winner.name)
        tree = config.model_dump(mode="json") | {"run": {"name": f"{sweep.name}-winner", "storage": sweep.storage}}
        storage.write_bytes(storage.join(sweep.uri, "winner.yaml"), yaml.safe_dump(tree, sort_keys=False).encode())
    elif storage.exists(storage.join(sweep.uri, "winner.yaml")):  # of before a trial ran on
        storage.remove(storage.join(sweep.uri, "winner.yaml"))
    drawn = []
    for name, (title, figure) in figures(outcomes, rates).items():
        image = png(figure)
        storage.write_bytes(storage.join(sweep.uri, f"{name}.png"), image)
        drawn.append((title, base64.b64encode(image).decode()))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "sentence": sentence, "gains": gains}
    template = environment.from_string(files("raybert.sweep").joinpath("sweep.html").read_text(encoding="utf-8"))
    tasks = tasks_of(outcomes)
    page = template.render(
        sweep=sweep,
        outcomes=outcomes,
        rates=rates,
        winner=winner,
        best=sentence_of_best(sweep.metric, outcomes),
        keys=list(sweep.space),
        tasks=tasks,
        poolings=POOLINGS,
        titles=kinds.BASELINES,
        headlines={task: _headline(outcomes, task) for task in tasks},
        started={task: any(o.probes[task].baselines.start for o in outcomes if task in o.probes) for task in tasks},
        collapsed={task: collapses(task, outcomes) for task in tasks},
        figures=drawn,
        settings=yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False),
    )
    uri = storage.join(sweep.uri, "sweep.html")
    storage.write_bytes(uri, page.encode())
    return uri


def _headline(outcomes: Sequence[Outcome], task: str) -> str:
    label = next(outcome.probes[task] for outcome in outcomes if task in outcome.probes).kind.headline.label
    return label[0].upper() + label[1:]
