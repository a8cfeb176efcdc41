"""The probe's second figure: the same classifier with C chosen on training texts that were held out.

With C = 1 the scale of the vectors is part of the score: small differences need large weights, which it forbids.
Choosing C by validation takes the scale out, as in SentEval (Conneau and Kiela 2018, https://arxiv.org/abs/1803.05449).

The solver is Newton's method with conjugate gradients: the problem is the same and convex, and at weak penalties L-BFGS
takes hundreds of iterations or, begun from the weights of a stronger penalty, none, since its tolerance is met at once.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from raybert.probe import classify
from raybert.probe.classify import RANDOM_STATE, Score
from raybert.probe.statistics import wilson

VALUES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
USUAL = 1.0
SOLVER = "newton-cg"
HELD_OUT = 0.2
LEAST = round(1 / HELD_OUT)  # texts of a class of which a fifth is one


@dataclass(frozen=True)
class Tuned:
    """What the classifier reached with the chosen C. `predictions` (n_test,) are class indices."""

    accuracy: float  # of the test texts
    c: float
    interval: tuple[float, float]  # Wilson, 95 %
    predictions: np.ndarray = field(repr=False)

    def record(self) -> dict[str, Any]:
        """Keys that stand beside those of `Score.record`, ready for JSON."""
        return {"tuned_accuracy": self.accuracy, "tuned_c": self.c, "tuned_interval": list(self.interval)}


def split(train_y: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Row numbers to fit on and row numbers to choose C on: a stratified fifth of the training texts, always the same.

    None where a class has too few texts for one of them to be held out.
    """
    if np.unique(train_y, return_counts=True)[1].min() < LEAST:
        return None
    rows = np.arange(len(train_y))
    kept, held = train_test_split(rows, test_size=HELD_OUT, stratify=train_y, random_state=RANDOM_STATE)
    return kept, held


def describe(train_y: np.ndarray, names: list[str]) -> str:
    """How C is chosen for these training texts, or why it is not."""
    parts = split(train_y)
    if parts is not None:
        return f"C chosen from {VALUES[0]:g} to {VALUES[-1]:g} on {len(parts[1]):,} held-out training texts"
    found, counts = np.unique(train_y, return_counts=True)
    rarest = counts.argmin()
    return (
        f"C = {USUAL:g}, not tuned: class {names[found[rarest]]} has {counts[rarest]} training texts, but tuning "
        f"needs at least {LEAST} of each class"
    )


def tune(train_x: Any, train_y: np.ndarray, test_x: Any, test_y: np.ndarray, usual: Score) -> Tuned:
    """Choose C, refit on all training texts, and score the test texts, which have no part in the choice.

    Args:
        train_x, train_y, test_x, test_y: as for `classify.fit`.
        usual: what `classify.fit` found for them; it is the result where C = 1 is chosen.
    """
    parts = split(train_y)
    c = USUAL if parts is None else choose(train_x, train_y, *parts)
    predictions = usual.predictions
    if c != USUAL:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one that stops at MAX_ITER is judged by its accuracy like any other
            predictions = classify.classifier(C=c, solver=SOLVER).fit(train_x, train_y).predict(test_x)
    right = int((predictions == test_y).sum())
    return Tuned(right / len(test_y), c, wilson(right, len(test_y)), predictions)


def choose(x: Any, y: np.ndarray, kept: np.ndarray, held: np.ndarray) -> float:
    """The C of VALUES with the highest accuracy on the rows `held`; of equal ones the smallest.

    The fits go from the strongest penalty to the weakest, each from the weights of the one before it.
    """
    model = classify.classifier(solver=SOLVER, warm_start=True)
    accuracies = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for c in VALUES:
            model.set_params(C=c).fit(x[kept], y[kept])
            accuracies.append(float((model.predict(x[held]) == y[held]).mean()))
    return VALUES[int(np.argmax(accuracies))]
