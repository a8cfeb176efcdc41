"""What a new run's weights are before the first step."""

from collections.abc import Iterator

import numpy as np

from raybert import storage
from raybert.config import Config
from raybert.data.shards import ShardSet, read_unit
from raybert.data.units import UnitRows
from raybert.model import files as checkpoints
from raybert.model import initialise
from raybert.model.bert import Bert
from raybert.model.directory import describe
from raybert.model.initialise import CENTRED_GAIN, WHITENED_GAIN
from raybert.spectral import files
from raybert.spectral.recipe import Recipe
from raybert.spectral.whiten import whiten
from raybert.storage import hub
from raybert.tokenizer import files as tokenizers
from raybert.train.complete import FAMILY, FILES

# Tokens of the training split whose frequencies stand for those of all.
COUNTED_TOKENS = 1_000_000
# ... and whose windows stand for all when their halves are compared.
WHITENED_TOKENS = 4_000_000


def begin(bert: Bert, config: Config, shards: ShardSet, token_vectors: str) -> None:
    """Give a fresh model the weights that the settings ask for; those of the defaults it has already.

    Args:
        shards: of the run; read where the start depends on how frequent the tokens are.
        token_vectors: URI of what `raybert.spectral.table.for_run` made.

    Raises:
        InputError: the model that it starts from, the token vectors or the shards cannot be read.
    """
    model, seed = config.model, config.data.seed
    if model.start_from:
        start_from(bert, read_model(model.start_from))
    whitened = model.embedding_init == "whitened"
    if model.needs_vectors:
        vectors = files.read(token_vectors, bert.config.hidden_size)
        initialise.use_vectors(bert, whiten(vectors, _read(shards, seed, WHITENED_TOKENS)) if whitened else vectors)
    if scaled_down(config):
        initialise.enlarge_token_types(bert)
    if model.attention_init == "average":
        initialise.average_attention(bert, config.train.seed)
    if model.ffn_init == "zero":
        initialise.zero_feed_forward(bert)
    if model.output_init == "centred" or model.mlm_init == "unigram":
        counts = _token_counts(shards, seed)
        if model.output_init == "centred":
            initialise.centre(bert, counts, WHITENED_GAIN if scaled_down(config) else CENTRED_GAIN)
        if model.mlm_init == "unigram":
            initialise.use_frequencies(bert, counts)


def scaled_down(config: Config) -> bool:
    """The vectors of texts begin so narrow that training must not touch their scale."""
    return config.model.embedding_init == "whitened" and config.model.output_init == "centred"


def _token_counts(shards: ShardSet, seed: int) -> np.ndarray:
    """int64 (V,): how often each token occurs in some units of the training split, drawn by the seed."""
    size = shards.vocabulary.size
    return np.sum([np.bincount(rows.tokens, minlength=size) for rows in _read(shards, seed, COUNTED_TOKENS)], axis=0)


def _read(shards: ShardSet, seed: int, tokens: int) -> Iterator[UnitRows]:
    """Units of the training split with about so many tokens, drawn by the seed."""
    for unit in Recipe(seed, sample_tokens=tokens).sample(shards):
        yield read_unit(shards.uri, unit, shards.vocabulary)


def start_from(bert: Bert, start: Bert) -> None:
    """Take another model's weights; tokens that only `bert` has, of an extended tokenizer, the mean of their pieces."""
    old, new = tokenizers.own_or(start.tokenizer), tokenizers.own_or(bert.tokenizer)
    if new.hash == old.hash:
        bert.load_state_dict(start.state_dict())
        return
    pieces = [old.encode(new.decode([number])) for number in range(old.size, new.size)]
    initialise.extend_rows(bert, start.state_dict(), pieces, old.size)


def read_model(where: str) -> Bert:
    """A checkpoint of raybert, or a transformers BERT (directory or Hub name), with its tokenizer.

    What a transformers directory lacks (the heads of one saved without them) is drawn at random, with a fixed seed.

    Raises:
        InputError: it is neither, or is damaged.
    """
    uri = hub.local(where, FILES)
    if describe(uri, where).get("model_type") != FAMILY:
        return checkpoints.load(uri)
    from raybert.model import interop

    with storage.local_copy(uri, list(FILES)) as directory:
        theirs, _ = interop.read_transformers(str(directory))
        model = interop.from_transformers(theirs)
    model.tokenizer = tokenizers.load(uri)
    return model
