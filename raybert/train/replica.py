"""What one rank trains: the encoder in its losses, built, restored and wrapped, and the optimizer."""

import math
from dataclasses import dataclass
from pathlib import Path

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import prepare_model
from torch import nn

from raybert.config import Config
from raybert.data.shards import ShardSet
from raybert.errors import DamagedCheckpoint, InputError
from raybert.model import compiler
from raybert.model import optimizer as optimizers
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.files import read_weights
from raybert.model.initialise import freeze_last_norm
from raybert.model.losses import Pretraining
from raybert.model.precision import pick_dtype
from raybert.train import checkpoint as checkpoints
from raybert.train.exchange import compress_gradients
from raybert.train.start import begin, scaled_down


@dataclass(frozen=True)
class Progress:
    """How far a run has come at a checkpoint."""

    step: int = 0
    elapsed: float = 0.0  # seconds
    best: float = math.inf  # validation loss


@dataclass(frozen=True)
class Replica:
    """One rank's copy of what is trained. `model` is compiled and exchanges gradients as the run asks for."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    bert: BertConfig
    dtype: torch.dtype
    restored: Progress
    compiles: bool
    uncompiled: str  # why it is not although the run asks for it, as a sentence


def build_replica(
    config: Config, device: torch.device, world_size: int, token_vectors: str, shards: ShardSet
) -> Replica:
    """Build it at the newest checkpoint; every rank has to call it.

    Args:
        token_vectors: URI of the vectors that a new run begins with (`raybert.train.start`).
        shards: of the run; checkpoints hold their tokenizer where it is another than raybert's own.

    Raises:
        DamagedCheckpoint: the checkpoint cannot be read.
        InputError: the weights or vectors that a new run begins with cannot be read.
    """
    dtype = _agree_on_dtype(config, device, world_size)
    torch.manual_seed(config.train.seed)
    bert = Bert(config.model.bert()).to(device)
    bert.tokenizer, bert.gradient_checkpointing = shards.kept_tokenizer(), config.train.gradient_checkpointing
    optimizer = optimizers.build(bert, **config.optimizer.model_dump())
    restored = _restore(config, bert, optimizer, shards, token_vectors)
    if scaled_down(config):
        freeze_last_norm(bert)
    uncompiled = _why_uncompiled(config, device, world_size)
    compiles = compiler.wanted(config.train.compile, device) and not uncompiled
    return Replica(_wrap(config, bert, compiles), optimizer, bert.config, dtype, restored, compiles, uncompiled)


def _agree_on_dtype(config: Config, device: torch.device, world_size: int) -> torch.dtype:
    """bfloat16 where it is the choice of every rank."""
    mine = pick_dtype(config.train.dtype, device)
    return torch.bfloat16 if all_agree(mine == torch.bfloat16, device, world_size) else torch.float32


def _why_uncompiled(config: Config, device: torch.device, world_size: int) -> str:
    """Why this rank or another cannot compile, where the run asks for it; all ranks do the same."""
    if not compiler.wanted(config.train.compile, device):
        return ""
    mine = compiler.why_not(device)
    if all_agree(not mine, device, world_size):
        return ""
    return mine or f"{compiler.UNCOMPILED}: torch.compile failed on another worker."


def all_agree(mine: bool, device: torch.device, world_size: int) -> bool:
    """Whether it is so on every rank; each one has to ask."""
    agreed = torch.tensor(int(mine), device=device)
    if world_size > 1:
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed.item())


def _restore(
    config: Config, bert: Bert, optimizer: torch.optim.Optimizer, shards: ShardSet, token_vectors: str
) -> Progress:
    """Begin where the newest checkpoint ended; without one, with the weights that the settings ask for."""
    committed = ray.train.get_checkpoint()
    if committed is None:
        begin(bert, config, shards, token_vectors)
        return Progress()
    with committed.as_directory() as directory:
        try:
            bert.load_state_dict(read_weights(Path(directory)))
        except InputError as error:
            raise DamagedCheckpoint(str(error)) from error
        state = checkpoints.load_state(Path(directory))
    optimizers.restore(optimizer, state["optimizer"])
    return Progress(state["step"], state["elapsed_seconds"], float(state["best_validation_loss"]))


def _wrap(config: Config, bert: Bert, compiles: bool) -> nn.Module:
    pretraining = Pretraining(bert, config.objective.objective())
    model: nn.Module = prepare_model(
        compiler.compiled(pretraining) if compiles else pretraining,
        parallel_strategy_kwargs={"gradient_as_bucket_view": True},
    )
    if config.train.gradient_exchange == "bfloat16":
        compress_gradients(model)
    return model
