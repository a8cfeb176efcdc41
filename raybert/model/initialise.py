"""Other starts than the original's random weights: token vectors that mean something, attention that averages, vectors
of texts at a scale that lasts, an output layer that knows how frequent the words are.

All are written over the weights that `Bert` draws, which stay what they are everywhere else.
"""

import numpy as np
import torch
from torch import Tensor

from raybert.model.bert import Bert

# Of position embeddings beside an averaging attention: the original's 0.02 is as large as the tokens' own vectors.
POSITION_DEVIATION = 0.005
# Of the last layer norm: vectors of texts without a common part, averaged by each layer, deviate by 0.6 to 0.75 an
# element, and logistic regression with C = 1 reads them best at about a tenth.
CENTRED_GAIN = 0.14
# ... and at a third of that where all directions are equally wide within texts, so that more of them are to be weighed.
WHITENED_GAIN = 0.04
# Of token types beside whitened vectors, in deviations of these: four times as large, so that a layer norm of both is
# nearly linear in the token's own vector.
TYPE_RATIO = 4.0


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
        if not old:
            continue  # a token of which the old vocabulary knows nothing stays random
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


@torch.no_grad()
def enlarge_token_types(bert: Bert) -> None:
    """Make what all token types share so large that the embeddings' layer norm keeps which token's vector is longer.

    A long vector is that of a token that says much about its text. Alone, a layer norm makes all equally long. What the
    types share is taken out by `centre`; by what they differ they stay as small beside tokens as positions are.
    """
    types = bert.token_type_embeddings.weight
    differences = (types - types[0]) * (POSITION_DEVIATION / bert.config.initializer_range)
    types.copy_(TYPE_RATIO * types[0] + differences)


@torch.no_grad()
def zero_feed_forward(bert: Bert) -> None:
    """Make each feed-forward layer add nothing: random ones are noise beside what attention gathers.

    Their output projections are zero and learn from the first step, their input projections from the second.
    """
    for layer in bert.layers:
        layer.ffn_out.weight.zero_()  # type: ignore[union-attr, operator]


@torch.no_grad()
def centre(bert: Bert, counts: np.ndarray, gain: float) -> None:
    """Make the embeddings' mean over the text zero, and the last layer norm's weight `gain`.

    What all texts share says nothing, and is the largest part of a text's vector before training. As training takes it
    away, the rest would grow several times over, and with it what C = 1 means to a classifier. Without it the length
    that layer norms give is the text's own from the start, and frequent tokens, which are near the mean, become short.
    The output layer of the masked words undoes the gain.

    Args:
        counts: (V,) how often each token occurs.
    """
    norm, last = bert.embedding_norm, bert.layers[-1].ffn_norm
    table = bert.word_embeddings.weight[: len(counts)].double() + bert.token_type_embeddings.weight[0].double()
    shared = torch.from_numpy(counts / counts.sum()).to(table) @ _normalised(table, bert.config.layer_norm_eps)
    norm.bias.copy_(-shared)
    last.weight.mul_(gain)  # type: ignore[union-attr, operator]
    bert.mlm_transform.weight.div_(gain)


def freeze_last_norm(bert: Bert) -> None:
    """Leave the last layer norm's weight as it is from here on.

    AdamW moves a weight by about the learning rate in a step, which is much beside a gain of 0.04: a demo with whitened
    vectors lost a third of their deviation over texts in 640 steps. The norm's bias is the same for all texts.
    """
    bert.layers[-1].ffn_norm.weight.requires_grad_(False)  # type: ignore[union-attr]


@torch.no_grad()
def use_frequencies(bert: Bert, counts: np.ndarray) -> None:
    """Make the output layer of the masked words ask which token's vector is nearest, with the log of its share as bias.

    At its rate the optimiser would need thousands of steps to learn that share, and until then the gradient of the
    masked words tells the encoder of little else.

    Args:
        counts: (V,) how often each token occurs; half an occurrence is added to each.
    """
    last = bert.layers[-1].ffn_norm.weight.mean()  # type: ignore[union-attr, operator]
    bert.mlm_transform.weight.copy_(torch.eye(bert.config.hidden_size, device=last.device) / last)
    bert.mlm_bias.copy_(torch.from_numpy(np.log((counts + 0.5) / (counts.sum() + 0.5 * len(counts)))))


def _normalised(values: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(values, values.shape[-1:], eps=eps)


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """(D, D), uniform among rotations and reflections. Float64 until the end, so that the threads do not show."""
    drawn = torch.empty(size, size, dtype=torch.float64)
    return torch.nn.init.orthogonal_(drawn, generator=generator).float()
