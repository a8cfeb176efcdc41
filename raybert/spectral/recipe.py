"""What a table of token vectors is made of: which units are counted, how, and the name that says so. No Ray here."""

from dataclasses import dataclass

import numpy as np

from raybert.data.rng import bits, fold
from raybert.data.shards import ShardSet, read_unit
from raybert.data.units import Unit
from raybert.errors import InputError

# Part of every table's name: raise it when the same shards and recipe would give other vectors.
VERSION = 3
# Fewer tokens than this say nothing of most words: vectors of a million tokens are already worse than of ten.
LEAST_TOKENS = 100_000
_UNIT_ORDER = 30  # purpose of a draw, beside those of raybert.data
REMEDY = "set model.embedding_init=random"


@dataclass(frozen=True)
class Recipe:
    """All that a table depends on besides its shards.

    Args:
        seed: draws the sample, where the training split has more than `sample_tokens` tokens.
        sample_tokens: about so many tokens are counted, so that the time is bounded however large the corpus is.
        reach: tokens at most so many places apart are a pair.
        columns: a pair's second token is one of so many, the most frequent.
        components: numbers of a vector, the largest component first; a model takes its first hidden_size.
    """

    seed: int
    sample_tokens: int = 30_000_000
    reach: int = 32
    columns: int = 5000
    components: int = 768

    def file_name(self, shards: ShardSet) -> str:
        # Counts do not depend on an order, so where everything is counted all seeds share a table.
        drawn = "all" if shards.tokens("train") <= self.sample_tokens else f"{self.seed}-{self.sample_tokens}"
        made_of = f"{drawn}-{self.reach}-{self.columns}-{self.components}"
        return f"spectral-v{VERSION}-{shards.manifest_hash[:16]}-{made_of}.npy"

    def sample(self, shards: ShardSet) -> list[Unit]:
        """Whole units of the training split in a seeded order, until they have `sample_tokens` tokens or end."""
        units = shards.units("train")
        density = {shard.name: shard.tokens / shard.rows for shard in shards.shards("train") if shard.rows}
        order = np.argsort(bits(fold(self.seed, np.arange(len(units))), _UNIT_ORDER, 1)[:, 0], kind="stable")
        tokens = np.array([density[units[i].shard] * units[i].rows for i in order])
        needed = np.cumsum(tokens) - tokens < self.sample_tokens
        return [units[i] for i in order[needed]]


def check(shards: ShardSet, recipe: Recipe, hidden_size: int) -> None:
    """
    Raises:
        InputError: these shards cannot give a table for a model of this width.
    """
    tokens = shards.tokens("train")
    if tokens < LEAST_TOKENS:
        raise InputError(
            "Token vectors (model.embedding_init) are learned from the shards, and that needs at least "
            f"{LEAST_TOKENS:,} training tokens; {shards.uri} has {tokens:,}. Prepare more text, or {REMEDY}."
        )
    if hidden_size > recipe.components:
        raise too_few(shards.uri, recipe.components, hidden_size)
    seen = np.zeros(0, shards.vocabulary.dtype)
    for unit in recipe.sample(shards):  # the first one is enough for all but the strangest text
        seen = np.union1d(seen, read_unit(shards.uri, unit, shards.vocabulary).tokens)
        if len(seen) >= hidden_size:
            return
    raise too_few(shards.uri, len(seen), hidden_size)


def too_few(uri: str, columns: int, hidden_size: int) -> InputError:
    return InputError(
        f"Token vectors (model.embedding_init) have at most {columns} numbers from {uri}, but hidden_size is "
        f"{hidden_size}; lower model.hidden_size, or {REMEDY}."
    )
