"""Peak resident memory (MB) of a process that trains the compact model, beside transformers with the same batch.

The limit is what the weights, their gradients and AdamW's two moments need in float32, with the interpreter and torch.
"""

import resource
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.common import elsewhere, result
from benchmarks.step import SHAPES, peer_side
from raybert.bench import stepper
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.train.memory import tune_memory


def peak() -> float:
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours_side(samples: int, length: int) -> Callable[[], float]:
    tune_memory()
    stepper("compact", samples, length)()
    return peak


def theirs_side(samples: int, length: int) -> Callable[[], float]:
    peer_side("compact", samples, length, compiled=False)()
    return peak


def state_side() -> Callable[[], float]:
    bert = Bert(BertConfig())
    kept = [torch.zeros_like(parameter) for parameter in bert.parameters() for _ in range(3)]
    return lambda: peak() + 0.0 * len(kept)


def main() -> None:
    rows = []
    for shape in SHAPES:
        with elsewhere(partial(ours_side, *shape), partial(theirs_side, *shape), state_side, warm=False) as sides:
            ours, peer, limit = (side() for side in sides)
        rows.append({"B": shape[0], "T": shape[1], "ours": ours, "peer": peer, "ratio": ours / peer})
    result("memory", rows[0]["ours"], rows[0]["peer"], limit, "MB (less is better)", rows=rows)


if __name__ == "__main__":
    main()
