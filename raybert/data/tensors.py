"""Compact columns as the model's tensors. Apart from raybert.data.block, so that data tasks start without torch."""

import numpy as np
import torch
from torch import Tensor

from raybert.data.block import Columns


def to_torch(columns: Columns, device: torch.device) -> dict[str, Tensor]:
    """`widen` on the device: the compact columns travel, and become int64 there."""
    sent = {name: _send(values, device) for name, values in columns.items()}
    place = torch.arange(columns["input_ids"].shape[1], device=device)
    positions = sent["masked_positions"].long()
    real = place < sent["length"][:, None]
    return {
        # uint16 travels as int16: few operations know unsigned types, and the lowest 16 bits are all there is.
        "input_ids": sent["input_ids"].int().bitwise_and(0xFFFF).long(),
        "token_type_ids": ((place >= sent["cut"][:, None]) & real).long(),
        "attention_mask": real,
        "masked_positions": positions,
        "masked_labels": sent["masked_labels"].int().bitwise_and(0xFFFF).long().where(positions >= 0, -100),
        "next_sentence_label": sent["next_sentence_label"].long(),
    }


def _send(values: np.ndarray, device: torch.device) -> Tensor:
    # Arrow's memory is read-only, which torch warns of; the compact columns are small enough to copy.
    signed = values.view(np.int16) if values.dtype == np.uint16 else values
    tensor = torch.from_numpy(np.array(signed))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
