"""Which learning rate is best for each size, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raybert.sweep.summary import Outcome


@dataclass(frozen=True)
class BestRate:
    """The best learning rate of one group. None stands for what the trials do not say; `remark` has the reason."""

    group: str
    measured: float | None  # of the trial with the lowest loss
    loss: float | None
    fitted: float | None  # where a parabola through loss over log(lr) is lowest
    interval: tuple[float, float] | None  # of `fitted`, 95 %
    points: Sequence[tuple[float, float]]  # (lr, loss) at equal tokens, by lr
    tokens: float  # at which the losses are compared
    remark: str


def best_rates(outcomes: Sequence[Outcome]) -> list[BestRate]:
    """For each group: the best measured rate, and the minimum of a parabola through its losses at equal tokens.

    Compared are trials that ended as they should, finished or pruned, where all of a group have a loss. A loss before
    the first step says nothing of a learning rate.
    """
    by_group: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.lr is not None:
            by_group.setdefault(outcome.group, []).append(outcome)
    return [_best_rate(group, of_group) for group, of_group in by_group.items()]


def _best_rate(group: str, outcomes: Sequence[Outcome]) -> BestRate:
    members = [o for o in outcomes if o.comparable]
    if not members:
        return BestRate(group, None, None, None, None, [], 0.0, "no trial has a validation loss yet")
    common = min(o.tokens[-1] for o in members)
    points = sorted((o.lr or 0.0, float(np.interp(common, o.tokens, o.losses))) for o in members)
    full = [o for o in members if o.status == "finished"] or members
    winner = min(full, key=lambda o: o.losses[-1])
    fitted, interval, remark = fit_parabola([p[0] for p in points], [p[1] for p in points])
    if left_out := len(outcomes) - len(members):
        remark = "; ".join(part for part in (remark, f"{left_out} of {len(outcomes)} trials are not compared") if part)
    return BestRate(group, winner.lr, winner.losses[-1], fitted, interval, points, common, remark)


def sentence(rate: BestRate) -> str:
    """The best rate of a group in words."""
    if rate.measured is None or rate.loss is None:
        return f"{rate.group}: {rate.remark}."
    text = f"{rate.group}: lowest loss {rate.loss:.4f} at lr {rate.measured:.3g}"
    if rate.fitted is not None:
        text += f"; a parabola fitted in log lr has its minimum at {rate.fitted:.3g}"
    if rate.interval is not None:
        text += f" (95 % interval {rate.interval[0]:.3g} to {rate.interval[1]:.3g})"
    return f"{text}; {rate.remark}." if rate.remark else f"{text}."


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
        return None, None, f"the minimum lies {side} the tried rates: widen the range"
    rate = math.exp(vertex + middle)
    if degrees <= 0:
        return rate, None, "three rates determine the parabola, so there is no interval"
    gradient = np.array([b / (2 * a * a), -1 / (2 * a), 0.0])
    spread = math.sqrt(max(0.0, float(gradient @ covariance @ gradient)))
    half = _student(degrees) * spread
    return rate, (math.exp(vertex + middle - half), math.exp(vertex + middle + half)), ""


def _student(degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))
