"""What a sweep found: every trial's end, the best learning rate of each size, and how sure that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raybert import storage
from raybert.model.bert import flops_per_token
from raybert.probe import POOLINGS
from raybert.report.read import RunData, read_run
from raybert.sweep.space import SweepConfig, Trial, trials

LR = "optimizer.lr"


@dataclass(frozen=True)
class Outcome:
    """One trial as far as it came. `loss` is its last validation loss."""

    name: str
    point: Mapping[str, Any]
    status: str  # finished, stopped early, diverged, not started
    steps: int
    loss: float | None
    tokens: Sequence[float]  # at each validation
    losses: Sequence[float]
    flops_per_token: float
    probes: Mapping[str, Mapping[str, float]]  # task -> pooling -> last test accuracy

    @property
    def lr(self) -> float | None:
        return float(self.point[LR]) if LR in self.point else None

    @property
    def group(self) -> str:
        """What it is beside its learning rate: the size, mostly."""
        return ", ".join(f"{value}" for key, value in self.point.items() if key != LR) or "all"


@dataclass(frozen=True)
class BestRate:
    """The best learning rate of one group."""

    group: str
    measured: float  # of the trial with the lowest loss
    loss: float
    fitted: float | None  # where a parabola through loss over log(lr) is lowest
    interval: tuple[float, float] | None  # of `fitted`, 95 %
    remark: str


def read_sweep(sweep: SweepConfig) -> list[Outcome]:
    """The trials in their order, those that have not begun as well."""
    return [_outcome(trial) for trial in trials(sweep)]


def _outcome(trial: Trial) -> Outcome:
    if not storage.exists(storage.join(trial.config.run_uri, "config.yaml")):
        return Outcome(trial.name, trial.point, "not started", 0, None, [], [], 0.0, {})
    run = read_run(trial.config.run_uri)
    steps, losses = run.series("validation.loss")
    seq_len = int(run.about["seq_len"])
    ended = "finished" if run.steps_done >= run.steps_planned else "stopped early"
    status = "diverged" if run.failure else ended
    return Outcome(
        name=trial.name,
        point=trial.point,
        status=status,
        steps=run.steps_done,
        loss=losses[-1] if losses and status != "diverged" else None,
        tokens=[step * trial.config.train.global_batch * seq_len for step in steps],
        losses=losses,
        flops_per_token=flops_per_token(trial.config.model.bert(), seq_len),
        probes={task: _last_accuracies(run, task) for task in run.tasks if run.of_task(task)},
    )


def _last_accuracies(run: RunData, task: str) -> dict[str, float]:
    scores = run.of_task(task)[-1].scores
    return {pooling: scores[pooling].accuracy for pooling in POOLINGS if pooling in scores}


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The finished trial of the lowest validation loss."""
    finished = [o for o in outcomes if o.status == "finished" and o.loss is not None]
    return min(finished, key=lambda o: o.loss or 0.0, default=None)


def best_rates(outcomes: Sequence[Outcome]) -> list[BestRate]:
    """For each group: the best measured rate, and the minimum of a parabola through its losses at equal tokens.

    Trials that stopped early are compared where all of the group that did not diverge have a loss.
    """
    found = []
    for group in dict.fromkeys(o.group for o in outcomes):
        members = [o for o in outcomes if o.group == group and o.lr is not None and o.loss is not None]
        if not members:
            continue
        common = min(o.tokens[-1] for o in members)
        points = sorted((o.lr or 0.0, float(np.interp(common, o.tokens, o.losses))) for o in members)
        full = [o for o in members if o.status == "finished"] or members
        winner = min(full, key=lambda o: o.loss or 0.0)
        fitted, interval, remark = fit_parabola([p[0] for p in points], [p[1] for p in points])
        found.append(BestRate(group, winner.lr or 0.0, winner.loss or 0.0, fitted, interval, remark))
    return found


def fit_parabola(
    rates: Sequence[float], losses: Sequence[float]
) -> tuple[float | None, tuple[float, float] | None, str]:
    """Least squares of loss = a (log lr)^2 + b log lr + c; the minimum is at -b / 2a.

    Its 95 % interval follows from the coefficients' covariance by the delta method, which needs 4 points.

    Returns:
        The rate, its interval (None with 3 points) and a remark; the rate is None where there is no minimum to give.
    """
    if len(set(rates)) < 3:
        return None, None, "a parabola needs three rates"
    x, y = np.log(rates), np.asarray(losses)
    middle = x.mean()
    degrees = len(x) - 3
    if degrees > 0:
        (a, b, _), covariance = np.polyfit(x - middle, y, 2, cov=True)
    else:
        a, b, _ = np.polyfit(x - middle, y, 2)
    if a <= 0:
        return None, None, "the losses have no minimum: the curve does not bend upwards"
    vertex = -b / (2 * a)
    if not x.min() - middle <= vertex <= x.max() - middle:
        side = "below" if vertex < 0 else "above"
        return None, None, f"the minimum lies {side} the rates that were tried: widen the range"
    rate = math.exp(vertex + middle)
    if degrees <= 0:
        return rate, None, "three rates fix the parabola: no interval"
    gradient = np.array([b / (2 * a * a), -1 / (2 * a), 0.0])
    spread = math.sqrt(max(0.0, float(gradient @ covariance @ gradient)))
    half = _student(degrees) * spread
    return rate, (math.exp(vertex + middle - half), math.exp(vertex + middle + half)), ""


def _student(degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


def to_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The outcomes without their curves."""
    return [
        {
            "trial": o.name,
            **o.point,
            "status": o.status,
            "steps": o.steps,
            "validation_loss": o.loss,
            "probes": {task: dict(scores) for task, scores in o.probes.items()},
        }
        for o in outcomes
    ]
