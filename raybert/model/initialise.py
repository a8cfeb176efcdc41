"""Other starts than the original's random weights: token vectors that mean something, attention that averages.

Both are written over the weights that `Bert` draws, which stay what they are everywhere else.
"""

import numpy as np
import torch
from torch import Tensor

from raybert.model.bert import Bert

# Of position embeddings beside an averaging attention: the original's 0.02 is as large as the tokens' own vectors.
POSITION_DEVIATION = 0.005


@torch.no_grad()
def use_vectors(bert: Bert, vectors: np.ndarray) -> None:
    """Replace the embeddings of the tokens that have a vector, scaled to the deviation of random ones.

    The others (tokens that were not seen, specials, spare rows) stay as they are.

    Args:
        vectors: float32 (V, D), zeros for a token without one; V is at most the model's vocabulary.
    """
    table = bert.word_embeddings.weight
    (seen,) = np.nonzero(vectors.any(axis=1))
    scale = bert.config.initializer_range / vectors[seen].std(dtype=np.float64)
    table[torch.from_numpy(seen).to(table.device)] = torch.from_numpy(vectors[seen] * np.float32(scale)).to(
        table.device
    )


@torch.no_grad()
def extend_rows(bert: Bert, state: dict[str, Tensor], pieces: list[list[int]], first: int) -> None:
    """Take the weights of a model with fewer tokens; each new one begins as the mean of the pieces that it was before.

    Args:
        state: of the smaller model.
        pieces: of each new token, the first of which has the id `first`, its tokens before.
    """
    others = {name: value for name, value in state.items() if name not in ("word_embeddings.weight", "mlm_bias")}
    bert.load_state_dict(others, strict=False)
    table, bias = bert.word_embeddings.weight, bert.mlm_bias
    table[:first], bias[:first] = state["word_embeddings.weight"][:first].to(table), state["mlm_bias"][:first].to(bias)
    for number, old in enumerate(pieces, first):
        table[number], bias[number] = table[old].mean(0), bias[old].mean()


@torch.no_grad()
def average_attention(bert: Bert, seed: int) -> None:
    """Make each attention layer add the mean over the tokens, and the pooler a rotation.

    Values are Q h and the output projection is Q^T, with Q orthogonal. Queries and keys stay small and random, so that
    the attention is nearly uniform, whichever head a part of Q h falls into. Positions are kept small beside tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    size = bert.config.hidden_size
    for layer in bert.layers:
        rotation = _orthogonal(size, generator)
        layer.qkv.weight[2 * size :] = rotation  # type: ignore[union-attr, operator]
        layer.attention_out.weight.copy_(rotation.t())  # type: ignore[union-attr, operator]
    bert.pooler.weight.copy_(_orthogonal(size, generator))
    bert.position_embeddings.weight.mul_(POSITION_DEVIATION / bert.config.initializer_range)


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """(D, D), uniform among rotations and reflections. Float64 until the end, so that the threads do not show."""
    drawn = torch.empty(size, size, dtype=torch.float64)
    return torch.nn.init.orthogonal_(drawn, generator=generator).float()
