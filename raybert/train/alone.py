"""A process that trains alone, as a dry run and a benchmark do: compiled and packed where a run's worker would be.

A worker of a run decides by the same functions, together with the other ranks (`raybert.train.replica`, `Worker`).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from raybert.data.spec import SampleSpec
from raybert.model import compiler
from raybert.model.bert import Bert
from raybert.model.losses import Pretraining
from raybert.model.objective import Objective
from raybert.train.feed import Feed, choose_packing


@dataclass(frozen=True)
class Alone:
    """What `raybert.train.step.train_step` is given: the model, and what its micro-batches go through."""

    model: nn.Module
    feed: Feed
    notes: tuple[str, ...]  # what cannot be done on this machine, in sentences


def alone(
    bert: Bert,
    objective: Objective,
    spec: SampleSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch: int,
    seq_len: int,
    compile: Literal["auto"] | bool = "auto",
    packing: Literal["auto"] | bool = "auto",
    one_shape: bool = False,
) -> Alone:
    """
    Args:
        bert: on the device.
        dtype: of the matrix products.
        micro_batch: samples of one.
        compile: `train.compile`.
        packing: `train.packing`.
        one_shape: pack into groups of the largest size alone: compiling another takes longer than the room it saves,
            where a process lives for a minute.
    """
    pretraining = Pretraining(bert, objective)
    wanted = compiler.wanted(compile, device)
    uncompiled = compiler.why_not(device) if wanted else ""
    model = compiler.compiled(pretraining) if wanted and not uncompiled else pretraining
    config = bert.config
    chosen, padded = choose_packing(
        packing,
        micro_batch=micro_batch,
        seq_len=seq_len,
        spec=spec,
        device=device,
        dtype=dtype,
        head_size=config.hidden_size // config.num_attention_heads,
    )
    if chosen is not None and one_shape:
        chosen = replace(chosen, rungs=chosen.rungs[-1:])
    notes = tuple(sentence for sentence in (padded, uncompiled) if sentence)
    return Alone(model, Feed(device, spec, chosen), notes)
