"""What the settings of jobs/record.yaml are for: the recipe without one of them at a time, after the same tokens.

For every row and seed an encoder begins, trains for `--tokens` with a schedule of that length, and is probed. A
row says by how much it differs from the recipe with the same seed: the mean over the seeds, and the lowest and highest.
Without whitened or without centred vectors the last layer norm is trained and token types are not enlarged, as in runs.

    python -m benchmarks.levers --tokens 500000 --seeds 0 1 2
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence

from benchmarks.common import machine, round_figures
from benchmarks.record import RECORD, Budget, Probe, make_side, probes, recipe_shards, settings
from raybert import cluster
from raybert.data.shards import ShardSet
from raybert.encode import POOLINGS
from raybert.model import sizes
from raybert.train.memory import tune_memory

RECIPE = f"jobs/{RECORD.name}"
# What is taken away, or put in its place, in a row.
ROWS: dict[str, list[str]] = {
    RECIPE: [],
    "attention_init=normal": ["model.attention_init=normal"],
    "embedding_init=spectral": ["model.embedding_init=spectral"],
    "ffn_init=normal": ["model.ffn_init=normal"],
    "output_init=normal": ["model.output_init=normal"],
    "mlm_init=normal": ["model.mlm_init=normal"],
    "pair=next_sentence": ["objective.pair=next_sentence"],
    "bag_weight=0": ["objective.bag_weight=0"],
    "embedding_lr_ratio=1": ["optimizer.embedding_lr_ratio=1"],
    "lr=2e-4": ["optimizer.lr=2e-4"],
    "vectors=pooler": ["objective.vectors=pooler"],
    "vectors=mean": ["objective.vectors=mean"],
    "temperature=0.1": ["objective.temperature=0.1"],
    "bag_of=neighbour": ["objective.bag_of=neighbour"],
    "mlm_rate=0.3": ["objective.mlm_rate=0.3"],
    "whole_word=true": ["objective.whole_word=true"],
    "dropout=0.1": ["model.dropout=0.1"],
    "decay=wsd": ["schedule.decay=wsd"],
}
# The columns: a task and the figure of it.
COLUMNS = {
    "AG News, C = 1": ("ag_news", "test_accuracy"),
    "AG News, C tuned": ("ag_news", "tuned_accuracy"),
    "SST-2": ("sst2", "test_accuracy"),
    "STS-B": ("stsb", "spearman"),
    "halves": ("neighbours", "mrr_at_10"),
}

Figures = dict[str, dict[str, float]]  # of each column, by pooling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=5e5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--size", choices=sizes.SIZES, default="compact", help="of the encoder; smaller ones are sooner done"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--recipe-shards", help="finished shards of the corpus in the recipe's vocabulary")
    chosen = parser.parse_args()
    tune_memory()
    size = f"model.size={chosen.size}"
    found: dict[str, dict[int, Figures]] = {row: {} for row in dict.fromkeys([RECIPE, *chosen.rows])}
    with tempfile.TemporaryDirectory() as folder:
        cluster.connect()
        shards = recipe_shards(chosen.recipe_shards, f"{folder}/shards", seq_len=128)
        measures = probes(False, shards, folder)
        for seed in chosen.seeds:
            for row in found:
                found[row][seed] = trained(shards, seed, [size, *ROWS[row]], chosen.tokens, measures)
                print(
                    json.dumps({"row": row, "seed": seed} | round_figures(found[row][seed])),
                    file=sys.stderr,
                    flush=True,
                )
    print(table(found), file=sys.stderr)
    print(
        json.dumps(
            {
                "name": "levers",
                "size": chosen.size,
                "tokens": chosen.tokens,
                "machine": machine(),
                "figures": round_figures(found),
            }
        )
    )


def trained(shards: ShardSet, seed: int, changes: Sequence[str], tokens: float, measures: Sequence[Probe]) -> Figures:
    """The figures of an encoder that was trained by the recipe with these settings changed."""
    side = make_side("recipe", settings(RECORD, seed, shards, changes), shards, Budget("tokens", tokens))
    side.until(tokens)
    encoder = side.encoder()
    records = {record["task"]: record for record in (measure(encoder) for measure in measures)}
    return {
        column: {pooling: records[task][pooling][figure] for pooling in POOLINGS}
        for column, (task, figure) in COLUMNS.items()
    }


def table(found: Mapping[str, Mapping[int, Figures]]) -> str:
    """In Markdown: the recipe's own means, and of each other row the differences to it; pooler."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row, seeds in found.items():
        cells = []
        for column in COLUMNS:
            figures = [each[column]["pooler"] for each in seeds.values()]
            if row != RECIPE:
                figures = [
                    figure - found[RECIPE][seed][column]["pooler"] for figure, seed in zip(figures, seeds, strict=True)
                ]
            sign = "" if row == RECIPE else "+"
            low, mean, high = (f"{value:{sign}.4f}" for value in (min(figures), statistics.mean(figures), max(figures)))
            cells.append(f"{mean} ({low} to {high})")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
