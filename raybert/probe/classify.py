"""The probe's ruler: logistic regression on fixed features, as the original measures."""

import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, f1_score

from raybert.probe.statistics import wilson

MAX_ITER = 1000
RANDOM_STATE = 42


@dataclass(frozen=True)
class Score:
    """What one classifier reached. `predictions` (n_test,) are class indices."""

    train_accuracy: float
    test_accuracy: float
    macro_f1: float
    interval: tuple[float, float]  # Wilson, 95 %, of the test accuracy
    confusion: list[list[int]]  # rows are the true classes, columns the predicted ones
    converged: bool
    warnings: list[str]
    predictions: np.ndarray = field(repr=False)

    def record(self) -> dict[str, Any]:
        """All but the predictions, ready for JSON."""
        values = {key: value for key, value in asdict(self).items() if key != "predictions"}
        return values | {"interval": list(self.interval)}


def classifier(**options: Any) -> LogisticRegression:
    """The original's classifier, C = 1 unless the options say otherwise."""
    return LogisticRegression(max_iter=MAX_ITER, random_state=RANDOM_STATE, **options)


def fit(train_x: Any, train_y: np.ndarray, test_x: Any, test_y: np.ndarray) -> Score:
    """Fit on the training features and score both parts.

    Args:
        train_x, test_x: (n_train, D) and (n_test, D), dense or sparse; finite.
        train_y, test_y: (n_train,) and (n_test,) class indices.
    """
    model = classifier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(train_x, train_y)
    notes = sorted({" ".join(str(item.message).split(".\n")[0].split()) for item in caught})
    converged = not any(issubclass(item.category, ConvergenceWarning) for item in caught)
    return score(model.predict(train_x), train_y, model.predict(test_x), test_y, converged=converged, notes=notes)


def score(
    train_predicted: np.ndarray,
    train_y: np.ndarray,
    test_predicted: np.ndarray,
    test_y: np.ndarray,
    *,
    converged: bool = True,
    notes: list[str] | None = None,
) -> Score:
    """The figures of predictions that are already made."""
    classes = np.unique(train_y)
    right = int((test_predicted == test_y).sum())
    return Score(
        train_accuracy=float((train_predicted == train_y).mean()),
        test_accuracy=right / len(test_y),
        macro_f1=float(f1_score(test_y, test_predicted, labels=classes, average="macro", zero_division=0.0)),
        interval=wilson(right, len(test_y)),
        confusion=confusion_matrix(test_y, test_predicted, labels=classes).tolist(),
        converged=converged,
        warnings=notes or [],
        predictions=np.asarray(test_predicted),
    )
