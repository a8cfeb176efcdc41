"""Floating-point operations of a run's steps, as its objective has them."""

from raybert.config import Config
from raybert.data.spec import sample_spec
from raybert.model.bert import flops_per_token
from raybert.tokenizer import GPT2


def run_flops_per_token(config: Config, seq_len: int, sample: int | None = None) -> float:
    """Of one training step per token (`flops_per_token`).

    The two halves of a window attend to themselves alone, as in windows of half the length. A vector that predicts
    words passes the MLM head as a masked token does.

    Args:
        seq_len: tokens of the shards' windows.
        sample: index of the step's first sample, by which the masked fraction goes; None for the mean over the run.
    """
    spec = sample_spec(config, GPT2)  # nothing here depends on the ids
    rows = 2 if spec.halves else 1
    masked = spec.masked.mean if sample is None else float(spec.masked.at(sample))
    if spec.bag_tokens:
        masked += rows * len(config.objective.objective().pooled) / seq_len
    return flops_per_token(config.model.bert(), seq_len // rows, masked)
