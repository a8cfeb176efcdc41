"""A run without Ray: one replica in this process, which nothing disturbs."""

import numpy as np
import torch

from raybert.config import Config
from raybert.data.block import take
from raybert.data.reader import SampleReader
from raybert.data.shards import open_shards
from raybert.data.spec import sample_spec
from raybert.data.tensors import to_torch
from raybert.model import optimizer
from raybert.model.bert import Bert
from raybert.model.losses import Pretraining
from raybert.model.schedule import lr_at
from raybert.train.step import means, train_step


def train_plainly(config: Config, steps: int | None = None) -> list[dict[str, float]]:
    """The losses of each step, in float32.

    Args:
        steps: how many; all of the run's if None. The schedule is that of the whole run.
    """
    train, objective, shards = config.train, config.objective.objective(), open_shards(config.data.shards)
    torch.manual_seed(train.seed)
    model = Pretraining(Bert(config.model.bert()), objective)
    adam = optimizer.build(model.bert, **config.optimizer.model_dump())
    reader = SampleReader(shards, seed=config.data.seed, spec=sample_spec(config, shards.vocabulary))
    schedule = config.schedule.model_dump() | {"warmup_steps": config.warmup_steps}
    found = []
    for step in range(train.steps if steps is None else steps):
        columns = reader.build(np.arange(step * train.global_batch, (step + 1) * train.global_batch))
        parts = [
            take(columns, slice(at, at + train.micro_batch)) for at in range(0, train.global_batch, train.micro_batch)
        ]
        sums, _ = train_step(
            model,
            adam,
            [to_torch(part, torch.device("cpu"), reader.spec) for part in parts],
            lr=lr_at(step, peak_lr=config.optimizer.lr, total_steps=train.steps, **schedule),
            grad_clip=train.grad_clip,
            dtype=torch.float32,
            seed=train.seed,
            step=step,
            first_micro_batch=0,
            global_batch=train.global_batch,
            objective=objective,
        )
        found.append(means(sums, objective))
    return found
