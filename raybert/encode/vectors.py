"""Texts to vectors: sorted by length so that padding costs nothing, in the type that the machine multiplies fastest.

Shapes: B sequences of a batch, T tokens of its longest one, D hidden size, N sequences in all.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from raybert.encode import POOLINGS
from raybert.encode.encoders import Encoder, RaybertEncoder, Sequences
from raybert.errors import InputError
from raybert.model.bert import Bert
from raybert.model.precision import pick_dtype

DTYPES = ("auto", "bfloat16", "float32")
# Tokens of a batch: enough for efficient matrix products; on a CPU more would only leave its caches.
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 65_536


def embed_texts(
    model: Bert,
    texts: Sequence[str],
    *,
    pooling: str,
    device: torch.device | str | None,
    dtype: str,
    batch_tokens: int | None,
) -> np.ndarray:
    """What `Bert.embed` does, with its arguments; the model keeps its mode."""
    if isinstance(texts, str):
        raise TypeError("give a list of texts: [text] instead of text")
    check_choices(pooling, dtype)
    encoder = RaybertEncoder(model)
    if not len(texts):
        return np.empty((0, encoder.hidden_size), dtype=np.float32)
    where = next(model.parameters()).device if device is None else torch.device(device)
    training = model.training
    try:
        sequences = encoder.tokenize(texts, encoder.positions)
        return embed(encoder, sequences, device=where, dtype=dtype, batch_tokens=batch_tokens)[pooling]
    finally:
        model.train(training)


def check_choices(pooling: str, dtype: str) -> None:
    """Raises InputError, naming the choices, when there is no such pooling or dtype."""
    for name, value, choices in (("pooling", pooling, POOLINGS), ("dtype", dtype, DTYPES)):
        if value not in choices:
            raise InputError(f"There is no {name} {value!r}; use one of {', '.join(choices)}.")


def embed(
    encoder: Encoder,
    sequences: Sequences,
    *,
    device: torch.device | None = None,
    dtype: str = "auto",
    batch_tokens: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, np.ndarray]:
    """Each pooling's vectors, float32 (N, D), in the order of the sequences.

    Args:
        device: where the encoder runs; by default the CPU.
        dtype: "bfloat16", "float32", or "auto" for the one in which this machine multiplies faster.
        batch_tokens: tokens of a batch, padding included.
        progress: called with the finished fraction of the tokens.

    Returns:
        pooler: the pooler's output. cls: the last hidden state of [CLS]. mean: the mean of the last hidden state over
        the tokens of the text, [CLS] and [SEP] included, padding not.
    """
    device = device or torch.device("cpu")
    autocast = pick_dtype(dtype, device)
    budget = batch_tokens or (GPU_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS)
    encoder.module.to(device).eval()
    out = {name: np.empty((len(sequences.cuts), encoder.hidden_size), dtype=np.float32) for name in POOLINGS}
    done, total = 0, int(sequences.offsets[-1])
    with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
        for rows in batches(sequences.lengths, budget):
            input_ids, types, mask = pad(sequences, rows, encoder.pad_id)
            hidden, pooled = encoder.encode(
                input_ids.to(device), types.to(device), None if mask is None else mask.to(device)
            )
            hidden = hidden.float()  # (B, T, D)
            out["pooler"][rows] = pooled.float().cpu().numpy()
            out["cls"][rows] = hidden[:, 0].cpu().numpy()
            out["mean"][rows] = mean_of_tokens(hidden, mask).cpu().numpy()
            done += int(sequences.lengths[rows].sum())
            if progress is not None:
                progress(done / total)
    return out


def batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Row numbers of each batch: the longest first, as many as fit the budget when padded, at least one."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = order[start : start + max(1, budget // int(lengths[order[start]]))]
        yield rows
        start += len(rows)


def part(sequences: Sequences, first: int, last: int) -> Sequences:
    """Sequences `first` up to `last`; how many were cut is not known of a part."""
    if (first, last) == (0, len(sequences.cuts)):
        return sequences
    offsets = sequences.offsets[first : last + 1]
    return Sequences(
        ids=sequences.ids[offsets[0] : offsets[-1]],
        offsets=offsets - offsets[0],
        cuts=sequences.cuts[first:last],
        truncated=0,
    )


def pad(sequences: Sequences, rows: np.ndarray, pad_id: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input ids, token types (B, T) and the mask, which is None where nothing is padding."""
    starts, lengths = sequences.offsets[rows], sequences.lengths[rows]
    positions = np.arange(lengths.max())
    real = positions < lengths[:, None]  # (B, T)
    places = np.where(real, starts[:, None] + positions, starts[:, None])
    ids = np.where(real, sequences.ids[places], pad_id)
    types = real & (positions >= sequences.cuts[rows][:, None])
    mask = None if real.all() else torch.from_numpy(real)
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(types.astype(np.int64)), mask


def mean_of_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, D) -> (B, D) over the real tokens."""
    if mask is None:
        return hidden.mean(dim=1)
    weights = mask.to(hidden.device, hidden.dtype)  # (B, T)
    return torch.einsum("btd,bt->bd", hidden, weights) / weights.sum(dim=1, keepdim=True)
