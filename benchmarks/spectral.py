"""Seconds from finished shards to token vectors beside them; the same with scipy and scikit-learn in one process.

The peer is what one would write without raybert: sparse sums of all pairs, a distance after the other (scipy), and
scikit-learn's randomized SVD with one power iteration, which is faster and less exact than ours. It counts a tenth of
the units, since it would take minutes; the time of the counting is multiplied by ten, that of the factors taken as it
is. The limit is the two products of the decomposition in float32 alone, at the rate of one process's matrix products;
the eigenvectors are not in it.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from sklearn.utils.extmath import randomized_svd

from benchmarks.common import result
from benchmarks.prepare import corpus
from raybert import cluster
from raybert.data.shards import ShardSet, read_unit
from raybert.data.text.prepare import prepare
from raybert.spectral import count, table
from raybert.spectral.recipe import Recipe
from raybert.tokenizer import GPT2, NUM_TEXT_TOKENS

SEQ_LEN, TENTH = 128, 10


def peer(shards: ShardSet, recipe: Recipe) -> dict[str, float]:
    """Seconds of counting the whole set, and of factorising what a tenth of it gave."""
    units = recipe.sample(shards)
    stream = count.lay_out(
        (read_unit(shards.uri, unit, GPT2) for unit in units[: len(units) // TENTH]), recipe.reach, GPT2
    )
    begun = time.perf_counter()
    chosen = count.pick_columns(count.frequencies(stream, NUM_TEXT_TOKENS), recipe.columns)
    column_of = np.full(count.GAP + 1, -1)
    column_of[chosen] = np.arange(len(chosen))
    total = sp.csr_matrix((NUM_TEXT_TOKENS, len(chosen)), dtype=np.int64)
    for distance in range(1, recipe.reach + 1):
        for rows, others in ((stream[:-distance], stream[distance:]), (stream[distance:], stream[:-distance])):
            columns = column_of[others]
            kept = (columns >= 0) & (rows != count.GAP)
            ones = np.ones(int(kept.sum()), np.int64)
            total += sp.coo_matrix((ones, (rows[kept], columns[kept])), shape=total.shape).tocsr()
    counting = (time.perf_counter() - begun) * len(units) / (len(units) // TENTH)
    begun = time.perf_counter()
    entries = total.tocoo()
    by_row, smooth = total.sum(axis=1).A1, total.sum(axis=0).A1 ** 0.75
    information = np.log(entries.data / by_row[entries.row] / smooth[entries.col] * smooth.sum())
    matrix = sp.csr_matrix((np.maximum(information, 0), (entries.row, entries.col)), total.shape, np.float32)
    matrix.eliminate_zeros()
    randomized_svd(matrix, recipe.components, n_iter=1, random_state=0)
    return {"counting": counting, "factors": time.perf_counter() - begun}


def ours(folder: str, recipe: Recipe) -> tuple[float, str, ShardSet]:
    """Seconds from finished shards of the corpus to their token vectors, the file of these, and the shards."""
    shards = prepare(corpus(), f"{folder}/shards", seq_len=SEQ_LEN)
    begun = time.perf_counter()
    made = table.ensure(shards, recipe, f"{folder}/run")
    return time.perf_counter() - begun, made, shards


def main() -> None:
    cluster.connect()
    recipe = Recipe(0)
    with tempfile.TemporaryDirectory() as folder:
        mine, made, shards = ours(folder, recipe)
        size = Path(made).stat().st_size
        theirs = peer(shards, recipe)
    rows = np.random.default_rng(0).standard_normal((2048, recipe.columns), np.float32)
    wide = np.ones((recipe.columns, recipe.components), np.float32)
    rows @ wide
    begun = time.perf_counter()
    rows @ wide
    # A @ V, and half of A^T A, which is symmetric.
    products = 1 + recipe.columns / recipe.components / 2
    limit = products * NUM_TEXT_TOKENS / len(rows) * (time.perf_counter() - begun)
    more = {"tokens": shards.tokens("train"), "peer_phases": theirs, "bytes": size}
    result("spectral", mine, sum(theirs.values()), limit, "s (less is better)", **more)


if __name__ == "__main__":
    main()
