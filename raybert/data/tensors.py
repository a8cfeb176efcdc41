"""Compact columns as the model's tensors. Apart from raybert.data.block, so that data tasks start without torch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raybert.data import bag, halves
from raybert.data.block import Columns
from raybert.data.packing import Packing, empty_groups, pack
from raybert.data.spec import ORIGINAL, SampleSpec

SENT = ("input_ids", "cut", "length", "masked_positions", "masked_labels", "next_sentence_label")


def to_torch(columns: Columns, device: torch.device, spec: SampleSpec = ORIGINAL) -> dict[str, Tensor]:
    """One micro-batch of B samples as the model takes it: `widen` on the device, where compact columns become int64.

    With `halves` there are 2B rows, and `document` (2B,); with `bag_tokens` K there are `bag_labels` (rows, K), -100 =
    none.
    """
    rows = rows_of(columns, spec)
    batch = _to_torch(rows, device)
    for name in ("document", "bag_labels"):
        if name in rows and (name != "document" or spec.halves):
            batch[name] = _send(rows[name], device)
    return batch


def packed_to_torch(parts: Sequence[Columns], device: torch.device, packing: Packing) -> list[dict[str, Tensor]]:
    """Micro-batches, joined and packed (`raybert.data.packing.pack`), as the model takes them."""
    return _groups_to_torch(pack([rows_of(part, packing.spec) for part in parts], packing), device)


def empty_to_torch(device: torch.device, packing: Packing) -> list[dict[str, Tensor]]:
    """A group without a sample for each rung."""
    return _groups_to_torch(empty_groups(packing), device)


def _groups_to_torch(groups: Sequence[Columns], device: torch.device) -> list[dict[str, Tensor]]:
    return [{name: _widened(name, _send(values, device)) for name, values in group.items()} for group in groups]


def _widened(name: str, sent: Tensor) -> Tensor:
    # The kernel takes starts as int32.
    return _ids(sent) if name == "input_ids" else sent if name == "starts" else sent.long()


def rows_of(columns: Columns, spec: SampleSpec) -> Columns:
    """The rows of a micro-batch in compact columns: its samples or their halves, with `bag_labels` where asked for."""
    if spec.halves:
        columns = halves.split(columns, spec.vocabulary)
    if spec.bag_tokens:
        bags = bag.draw_bags(columns, spec.bag_tokens, spec.seed, spec.vocabulary)
        if spec.bag_of_neighbour:
            bags = bags.reshape(-1, 2, spec.bag_tokens)[:, ::-1].reshape(bags.shape)
        columns = columns | {"bag_labels": np.where(bags >= 0, bags, -100)}
    return columns


def _to_torch(columns: Columns, device: torch.device) -> dict[str, Tensor]:
    sent = {name: _send(values, device) for name, values in columns.items() if name in SENT}
    place = torch.arange(columns["input_ids"].shape[1], device=device)
    positions = sent["masked_positions"].long()
    real = place < sent["length"][:, None]
    return {
        "input_ids": _ids(sent["input_ids"]),
        "token_type_ids": ((place >= sent["cut"][:, None]) & real).long(),
        "attention_mask": real,
        "masked_positions": positions,
        "masked_labels": _ids(sent["masked_labels"]).where(positions >= 0, -100),
        "next_sentence_label": sent["next_sentence_label"].long(),
    }


def _ids(sent: Tensor) -> Tensor:
    """int64 from int16, of which the lowest 16 bits are all there is, or from int32."""
    return sent.int().bitwise_and(0xFFFF).long() if sent.dtype == torch.int16 else sent.long()


def _send(values: np.ndarray, device: torch.device) -> Tensor:
    # Arrow's memory is read-only, which torch warns of; the compact columns are small enough to copy.
    # Few operations know unsigned types: these travel as the signed ones of their width.
    signed = values.view(f"i{values.itemsize}") if values.dtype.kind == "u" else values
    tensor = torch.from_numpy(np.array(signed))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
