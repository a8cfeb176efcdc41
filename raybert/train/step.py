"""One optimizer step and one validation pass: the loop a torch user would write. Nothing here knows Ray.

Every loss is a mean over the *global* batch: masked positions for the masked-language model, samples for pairs, labels
for a bag. A rank knows only its own part, so the step sums, and divides by counts that all ranks have added
up. The result does not depend on how the batch was cut into micro-batches or spread over ranks (beyond rounding).
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raybert.model.dropout import Noise
from raybert.model.objective import ORIGINAL, Objective
from raybert.model.optimizer import set_lr

MicroBatch = Mapping[str, Tensor]
INPUTS = (
    "input_ids",
    "token_type_ids",
    "attention_mask",
    "masked_positions",
    "masked_labels",
    "next_sentence_label",
)

OPTIONAL = ("document", "bag_labels")  # where the objective asks for them
PACKED = "starts"  # only packed micro-batches have it
PADDED = ("input_ids", "token_type_ids", "attention_mask")

# The sums that a step returns: so many for each loss of the objective, in this order.
SUMS = SUM, COUNT, RIGHT = range(3)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    lr: float,
    grad_clip: float,
    dtype: torch.dtype,
    seed: int,
    step: int,
    first_micro_batch: int,
    global_batch: int,
    objective: Objective = ORIGINAL,
) -> tuple[Tensor, Tensor]:
    """Forward and backward over this rank's micro-batches, then one clipped AdamW update.

    Args:
        model: `raybert.model.losses.Pretraining`, wrapped in DistributedDataParallel or bare.
        micro_batches: dicts of tensors on the model's device (`raybert.data.tensors`), or packed groups of them.
        lr: learning rate of this update.
        dtype: autocast type of the forward pass; float32 switches autocast off.
        seed: with `step` and `first_micro_batch` the key of the dropout masks, so a resumed run, or one on another
            number of ranks, drops the same units for the same samples. A packed group has one mask, so there the number
            of ranks counts.
        step: number of the update.
        first_micro_batch: place of this rank's first micro-batch in the global batch.
        global_batch: samples of the step over all ranks.
        objective: the model's; by default the original's.

    Returns:
        (3 L,) float tensor of this rank's sums (see `Pretraining`), and the gradient norm before clipping. Both stay on
        the device, so the caller chooses when to wait for them. If the norm is not finite, every rank skips the update,
        since all have the norm of the exchanged gradients, and the sums are 0.
    """
    device = micro_batches[0]["input_ids"].device
    # By the model, never by whether a process group is there now: Ray Train takes the group away while it ends the
    # workers, and a rank that is still at a step would then train alone, on its own part of the batch.
    world_size = dist.get_world_size() if isinstance(model, DistributedDataParallel) else 1
    model.train()
    set_lr(optimizer, lr)
    # DistributedDataParallel averages over ranks; these are sums, hence the number of ranks.
    counts = _counts(objective, micro_batches, global_batch, world_size)
    weights = {name: weight * (world_size / counts[name]) for name, weight in objective.weights.items()}
    mlm_gradient = torch.as_tensor(weights["mlm"])
    sums = no_sums(objective, device)
    groups = group_micro_batches(model, micro_batches)
    # One autocast context for the whole step: weights are cast once, not once a group.
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for places in groups:
            seeds = [dropout_seed(seed, step, first_micro_batch + place) for place in places]
            # Gradients are exchanged once a step, with the last group.
            with nullcontext() if places is groups[-1] or world_size == 1 else model.no_sync():  # type: ignore[operator]
                part = forward_sums(model, [micro_batches[place] for place in places], seeds, mlm_gradient)
                terms = zip(weights.values(), part[SUM :: len(SUMS)], strict=True)
                loss = sum(weight * each for weight, each in terms)
                with torch.autocast(device.type, enabled=False):
                    loss.backward()
            sums += part.detach()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    finite = torch.isfinite(grad_norm)
    # The fused AdamW leaves parameters and moments alone where this is 1, and nobody has to wait for the answer.
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.where(finite, sums, torch.zeros_like(sums)), grad_norm


def _counts(
    objective: Objective, micro_batches: Sequence[MicroBatch], global_batch: int, world_size: int
) -> dict[str, Tensor | int]:
    """What each loss is a mean over, in the global batch; 1 at least. Nothing waits for the device."""
    found = torch.stack([(batch["masked_positions"] >= 0).sum() for batch in micro_batches]).sum()[None]
    if "bag" in objective.losses:
        bags = torch.stack([(batch["bag_labels"] >= 0).sum() for batch in micro_batches]).sum()[None]
        found = torch.cat([found, bags])
    if world_size > 1:
        dist.all_reduce(found)
    return {
        "nsp": global_batch,
        "contrast": global_batch,
        "mlm": found[0].clamp(min=1),
        "bag": found[-1].clamp(min=1),
    }


def forward_sums(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    seeds: Sequence[int] | None,
    mlm_gradient: Tensor | None = None,
) -> Tensor:
    """The sums over micro-batches in one forward pass, with gradients through the losses' own.

    Args:
        seeds: of each micro-batch's dropout; None in evaluation.
        mlm_gradient: the gradient that the sum of the MLM loss will be given.
    """
    inputs = [*INPUTS, *(name for name in OPTIONAL if name in micro_batches[0])]
    if PACKED in micro_batches[0]:
        if seeds is not None:
            torch.manual_seed(seeds[0])
        return model(attention_mask=None, **micro_batches[0])
    if not runs_unpadded(model, micro_batches[0]):
        # One micro-batch, and the random numbers of its device.
        if seeds is not None:
            torch.manual_seed(seeds[0])
        return model(**{name: micro_batches[0][name] for name in inputs})
    longest = max(_longest(batch) for batch in micro_batches)
    joined = {
        name: torch.cat([_fit(batch[name], longest) if name in PADDED else batch[name] for batch in micro_batches])
        for name in inputs
    }
    noises = [Noise(seed) for seed in seeds] if seeds is not None else [None] * len(micro_batches)
    sizes = [len(batch["input_ids"]) for batch in micro_batches]
    return model(**joined, parts=list(zip(sizes, noises, strict=True)), mlm_gradient=mlm_gradient)


def runs_unpadded(model: nn.Module, batch: MicroBatch) -> bool:
    """Whether padding is left out and micro-batches are joined here: on CPUs, where every call may have other shapes.

    Packed micro-batches are joined already.
    """
    return PACKED not in batch and batch["input_ids"].device.type == "cpu" and not _is_compiled(model)


def group_micro_batches(model: nn.Module, micro_batches: Sequence[MicroBatch]) -> list[list[int]]:
    """Indices of consecutive micro-batches that share a forward pass.

    Where padding is left out, short samples would make small matrix products, so micro-batches are joined up to the
    tokens that a full one has. Each keeps its own dropout and rectangle of attention, so the result is the same.
    """
    if not runs_unpadded(model, micro_batches[0]):
        return [[index] for index in range(len(micro_batches))]
    # Of two rows that are the halves of one sample, both together have the tokens of one.
    rows = 2 if "document" in micro_batches[0] else 1
    budget = max(batch["input_ids"].numel() for batch in micro_batches) // rows
    groups: list[list[int]] = []
    used = budget
    for index, batch in enumerate(micro_batches):
        tokens = int(batch["attention_mask"].sum())
        if used + tokens > budget or not groups:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += tokens
    return groups


def _is_compiled(model: nn.Module) -> bool:
    return isinstance(getattr(model, "module", model), torch._dynamo.OptimizedModule)


def _longest(batch: MicroBatch) -> int:
    return max(1, int(batch["attention_mask"].sum(1).max()))


def _fit(values: Tensor, length: int) -> Tensor:
    """(B, T) cut or padded to (B, length)."""
    return F.pad(values, (0, length - values.shape[1]))


def warm_up(
    model: nn.Module,
    batch: MicroBatch,
    dtype: torch.dtype,
    objective: Objective = ORIGINAL,
    *,
    validation: bool = True,
) -> None:
    """Run a batch forward and back, and as `validate` does: what torch.compile makes of its shape is made then.

    Weights stay as they are, no gradients are left, and ranks exchange nothing.
    """
    device = batch["input_ids"].device
    model.train()
    with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            part = forward_sums(model, [batch], [0])
            with torch.autocast(device.type, enabled=False):
                part[SUM :: len(SUMS)].sum().backward()
        model.zero_grad(set_to_none=True)
        if validation:
            validate(model, [batch], dtype, device, objective)


@torch.no_grad()
def validate(
    model: nn.Module,
    batches: Iterable[MicroBatch],
    dtype: torch.dtype,
    device: torch.device,
    objective: Objective = ORIGINAL,
) -> Tensor:
    """This rank's sums over validation batches. The model is left in the mode it was found in."""
    was_training = model.training
    model.eval()
    sums = no_sums(objective, device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for batch in batches:
            sums += forward_sums(model, [batch], None)
    model.train(was_training)
    return sums


def no_sums(objective: Objective, device: torch.device) -> Tensor:
    """(3 L,) where the sums of steps are added up."""
    return torch.zeros(len(SUMS) * len(objective.losses), device=device)


def all_reduce_sums(sums: Tensor, world_size: int) -> Tensor:
    """Add the sums of all ranks, in a copy."""
    total = sums.clone()
    if world_size > 1:
        dist.all_reduce(total)
    return total


def means(sums: Tensor, objective: Objective = ORIGINAL) -> dict[str, float]:
    """The weighted loss, each loss in nats and accuracies in [0, 1], from the sums of all ranks."""
    found = dict(zip(objective.losses, sums.view(-1, len(SUMS)).tolist(), strict=True))
    losses = {name: total / max(count, 1.0) for name, (total, count, _) in found.items()}
    return {
        "loss": sum(weight * losses[name] for name, weight in objective.weights.items()),
        **{f"{name}_loss": loss for name, loss in losses.items()},
        # Of a bag's words no more than one can be the likeliest, so their share says nothing.
        **{f"{name}_accuracy": right / max(count, 1.0) for name, (_, count, right) in found.items() if name != "bag"},
    }


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """A 63-bit seed of one micro-batch of one step, the same on any rank."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro_batch * 0x94D049BB133111EB) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    return (value ^ (value >> 27)) >> 1
