"""The learning rate as a pure function of the step."""

import math
from typing import Literal


def lr_at(
    step: int,
    *,
    peak_lr: float,
    total_steps: int,
    warmup_steps: int,
    decay: Literal["linear", "cosine", "wsd", "constant"],
    decay_fraction: float = 0.2,
    min_lr_ratio: float = 0.0,
) -> float:
    """Learning rate of update `step` (counted from 0) of `total_steps`.

    A linear warm-up reaches the peak with update `warmup_steps - 1`; no update has rate 0. After it: ``linear`` or
    ``cosine`` to `min_lr_ratio` x peak; ``wsd`` (warm-up, stable, decay: https://arxiv.org/abs/2405.18392) stays at the
    peak and falls linearly over the last `decay_fraction` of the run; ``constant`` stays.
    """
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    if decay == "constant":
        return peak_lr
    begin = warmup_steps if decay != "wsd" else max(warmup_steps, round(total_steps * (1 - decay_fraction)))
    # The first update of the decay is one part below the peak, and the update after the last would reach the end.
    progress = min(1.0, max(0.0, (step - begin) / max(1, total_steps - begin)))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress
    return peak_lr * (min_lr_ratio + (1 - min_lr_ratio) * left)
