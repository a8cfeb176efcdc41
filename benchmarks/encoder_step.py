"""Tokens per second of one optimizer step of the compact model, T=512; beside it transformers with the same batch.

The limit is the rate at which this machine multiplies matrices, divided by the step's FLOPs: its share is the MFU.
"""

import torch

from benchmarks.common import alternate, result, seconds
from raybert.model.bert import Bert, flops_per_token
from raybert.model.config import BertConfig
from raybert.model.interop import to_transformers
from raybert.model.losses import Pretraining
from raybert.train import optimizer
from raybert.train.peak import peak_flops
from raybert.train.step import pick_dtype, train_step

B, T = 4, 512


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = pick_dtype("auto", device)
    config = BertConfig()
    model = Bert(config).to(device)
    theirs = to_transformers(model).to(device).train()
    options = {"lr": 1e-4, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6}
    pretraining, ours_adam, their_adam = (
        Pretraining(model),
        optimizer.build(model, **options),
        optimizer.build(theirs, **options),
    )
    ids = torch.randint(0, 50_257, (B, T), device=device)
    positions = torch.stack([torch.randperm(T, device=device)[:76].sort().values for _ in range(B)])
    labels = ids.gather(1, positions)
    full = torch.full_like(ids, -100).scatter(1, positions, labels)
    types, mask = (torch.arange(T, device=device) > T // 2).long().expand(B, -1), torch.ones_like(ids)
    batch = {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": mask.bool(),
        "masked_positions": positions,
        "masked_labels": labels,
        "next_sentence_label": torch.zeros(B, dtype=torch.long, device=device),
    }

    def ours_step() -> None:
        where = {"seed": 0, "step": 0, "first_micro_batch": 0, "global_batch": B}
        sums, _ = train_step(pretraining, ours_adam, [batch], lr=1e-4, grad_clip=1.0, dtype=dtype, **where)
        sums.sum().item()

    def their_step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = theirs(
                input_ids=ids,
                token_type_ids=types,
                attention_mask=mask,
                labels=full,
                next_sentence_label=batch["next_sentence_label"],
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_adam.step()
        their_adam.zero_grad(set_to_none=True)
        loss.item()

    ours_step()
    their_step()
    first, second = alternate(lambda: B * T / seconds(ours_step), lambda: B * T / seconds(their_step), rounds=7)
    limit = peak_flops(device, dtype, seconds=1.0) / flops_per_token(config, T)
    result("encoder_step", first, second, limit, "tokens/s", dtype=str(dtype), threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
