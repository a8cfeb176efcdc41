"""Accuracy of frozen vectors against minutes of training, on one machine: our recipe, the original's, transformers.

Same texts (the corpus, without any text or label of a probe), same encoder, same minutes; the recipe's vocabulary is
learned from the corpus, as jobs/record.yaml says, and the others have GPT-2's. The sides take turns in one
process: each trains up to the next mark of its own clock and is then probed, which is on nobody's clock. A clock starts
at finished shards, so the token vectors that a side begins with are on it. The learning rate follows the clock too:
each side's schedule ends with its minutes, however many steps fit into them.

`ours` and `peer` are minutes until the pooler passes 0.8121 on AG News, the original's figure after half a billion
tokens; a side that never does has all its minutes. `passed` has the tokens and FLOPs of each side too, and says whether
it passed with every seed.

The recipe's start knows topics, so AG News hardly moves from there. What training adds shows in the similarity of
sentences and in halves of validation windows that find each other, which are measured at each mark as well; each side
has the windows of its own shards there.

    python -m benchmarks.record --minutes 60 --seeds 0 1 2
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.common import DATA, STS_B, result, round_figures
from benchmarks.on_gpu.carried import learn_words, learned_from
from benchmarks.prepare import corpus
from raybert import cluster, storage
from raybert.bench import default_device
from raybert.config import Config, load
from raybert.data.block import take
from raybert.data.reader import SampleReader
from raybert.data.shards import ShardSet, open_shards
from raybert.data.spec import sample_spec
from raybert.data.tensors import to_torch
from raybert.data.text.prepare import prepare
from raybert.encode import POOLINGS
from raybert.encode.encoders import RaybertEncoder, tokenize
from raybert.model import optimizer as optimizers
from raybert.model.bert import Bert
from raybert.model.initialise import freeze_last_norm
from raybert.model.interop import from_transformers, to_transformers
from raybert.model.losses import Pretraining
from raybert.model.precision import pick_dtype
from raybert.model.schedule import lr_at
from raybert.probe import baselines, evaluate
from raybert.probe.tasks import load_task, parse_task
from raybert.spectral import table
from raybert.spectral.recipe import Recipe
from raybert.tokenizer import TextTokenizer
from raybert.train.complete import complete
from raybert.train.flops import run_flops_per_token
from raybert.train.memory import tune_memory
from raybert.train.start import begin, scaled_down
from raybert.train.step import train_step

THRESHOLD = 0.8121
MARKS = (0.0, 1.0, 2.0, 5.0, 15.0, 30.0, 60.0)  # minutes
SCHEDULE = 10_000  # places of the budget in the schedule
# Of transformers and of the original: the rates and batches of jobs/compact.yaml.
ORIGINAL = Path(__file__).parents[1] / "jobs" / "compact.yaml"
RECORD = Path(__file__).parents[1] / "jobs" / "record.yaml"


@dataclass(frozen=True)
class Budget:
    """What a side may spend, its start included: seconds by its own clock, or tokens."""

    unit: Literal["seconds", "tokens"]
    amount: float


class Side:
    """A model that trains until its budget is spent, its learning rate scheduled by what it has spent.

    Args:
        begun: seconds that its start took.
        peer: train transformers' model, from the same weights.
    """

    def __init__(
        self, name: str, config: Config, shards: ShardSet, bert: Bert, begun: float, budget: Budget, *, peer: bool
    ) -> None:
        self.name, self.config, self.seconds, self.tokens, self.step = name, config, begun, 0, 0
        self._device, self._objective = default_device(), config.objective.objective()
        self._reader = SampleReader(shards, seed=config.data.seed, spec=sample_spec(config, shards.vocabulary))
        self._samples = self._reader.spec
        self._dtype = pick_dtype(config.train.dtype, self._device)
        if scaled_down(config):
            freeze_last_norm(bert)
        self._bert, self._theirs = bert.to(self._device), to_transformers(bert).to(self._device) if peer else None
        trained: Any = self._theirs or self._bert
        self._adam = optimizers.build(trained, **config.optimizer.model_dump())
        self._model = Pretraining(self._bert, self._objective)
        self._budget, self._before = budget, self.spent(budget.unit)

    def spent(self, unit: str) -> float:
        return self.seconds if unit == "seconds" else float(self.tokens)

    def until(self, amount: float) -> None:
        """Train until so much of the budget is spent."""
        while (spent := self.spent(self._budget.unit)) < amount:
            begun, schedule = time.perf_counter(), self.config.schedule
            self._train(
                lr_at(
                    int(SCHEDULE * (spent - self._before) / (self._budget.amount - self._before)),
                    peak_lr=self.config.optimizer.lr,
                    total_steps=SCHEDULE,
                    warmup_steps=round(0.05 * SCHEDULE),
                    decay=schedule.decay,
                    decay_fraction=schedule.decay_fraction,
                    min_lr_ratio=schedule.min_lr_ratio,
                )
            )
            self.seconds += time.perf_counter() - begun

    def _train(self, lr: float) -> None:
        train, first = self.config.train, self.step * self.config.train.global_batch
        columns = self._reader.build(np.arange(first, first + train.global_batch))
        parts = [
            take(columns, slice(at, at + train.micro_batch)) for at in range(0, train.global_batch, train.micro_batch)
        ]
        if self._theirs is None:
            train_step(
                self._model,
                self._adam,
                [to_torch(part, self._device, self._samples) for part in parts],
                lr=lr,
                grad_clip=train.grad_clip,
                dtype=self._dtype,
                seed=train.seed,
                step=self.step,
                first_micro_batch=0,
                global_batch=train.global_batch,
                objective=self._objective,
            )
        else:
            self._train_theirs([to_torch(part, self._device) for part in parts], lr)
        self.step += 1
        self.tokens += int(columns["length"].sum())

    def _train_theirs(self, batches: Sequence[dict[str, torch.Tensor]], lr: float) -> None:
        """The usual loop: sum of both losses, accumulated over the micro-batches, clipped, AdamW."""
        assert self._theirs is not None
        self._theirs.train()
        for batch in batches:
            places, labels = batch["masked_positions"], batch["masked_labels"]
            wide = torch.full_like(batch["input_ids"], -100)
            rows, columns = (places >= 0).nonzero(as_tuple=True)
            wide[rows, places[rows, columns]] = labels[rows, columns]
            inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "next_sentence_label")}
            with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
                loss = self._theirs(attention_mask=batch["attention_mask"].long(), labels=wide, **inputs).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self._theirs.parameters(), self.config.train.grad_clip)
        optimizers.set_lr(self._adam, lr)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def encoder(self) -> RaybertEncoder:
        bert = self._bert if self._theirs is None else from_transformers(self._theirs)
        bert.tokenizer = self._bert.tokenizer
        return RaybertEncoder(bert.eval())

    @property
    def flops(self) -> float:
        """Of training so far, by `run_flops_per_token`."""
        return self.tokens * run_flops_per_token(self.config, self._reader.shards.seq_len)


def settings(path: Path, seed: int, shards: ShardSet, changes: Sequence[str] = ()) -> Config:
    """A recipe at the common size and the shards' sequence length, with settings of it changed."""
    common = [f"model.max_position_embeddings={shards.seq_len}", "model.size=compact", f"data.shards={shards.uri}"]
    return complete(load(str(path), [*common, f"train.seed={seed}", f"data.seed={seed}", *changes]), shards)


def make_side(name: str, config: Config, shards: ShardSet, budget: Budget, *, peer: bool = False) -> Side:
    begun, vectors = time.perf_counter(), ""
    with tempfile.TemporaryDirectory() as folder:
        if config.model.needs_vectors:
            cluster.connect()
            vectors = table.ensure(shards, Recipe(config.data.seed), folder)
        torch.manual_seed(config.train.seed)
        bert = Bert(config.model.bert())
        bert.tokenizer = shards.kept_tokenizer()
        begin(bert, config, shards, vectors)
    return Side(name, config, shards, bert, time.perf_counter() - begun, budget, peer=peer)


Probe = Callable[[RaybertEncoder], dict[str, Any]]
FIGURES = ("test_accuracy", "tuned_accuracy", "tuned_c", "spearman", "mrr_at_10", "deviation")


def probes(few: bool, shards: ShardSet, folder: str) -> list[Probe]:
    """AG News on all 7,600 test texts, SST-2, STS-B, halves of 2,000 validation windows; the texts are read once."""
    sizes = {"n_train": 2000, "n_test": 1000} if few else {"n_train": 10_000, "n_test": 7_600}
    news = load_task(f"ag_news@{DATA / 'ag_news'}").model_copy(update=sizes)
    tasks = [news]
    if not few:
        halves = load_task(f"neighbours@{shards.uri}").model_copy(update={"n_test": 2000})
        tasks += [load_task(f"sst2@{DATA / 'probes'}"), parse_task(STS_B, "STS-B"), halves]
    own = partial(tokenize, tokenizer=shards.tokenizer())
    materials = [evaluate.prepare(task, own, shards.seq_len) for task in tasks]

    def probe(material: evaluate.Material) -> Probe:
        def measure(encoder: RaybertEncoder) -> dict[str, Any]:
            found = evaluate.evaluate(encoder, material, cache)
            return {"task": material.task.name} | {
                name: {key: entry[key] for key in FIGURES if key in entry}
                for name, entry in [
                    *((pooling, found[pooling]) for pooling in POOLINGS),
                    ("tfidf", found["baselines"]["tfidf"]),
                    *((f"untrained_{pooling}", found["baselines"]["untrained"][pooling]) for pooling in POOLINGS),
                ]
            }

        return measure

    cache = baselines.Cache(folder)
    return [probe(material) for material in materials]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--sides", nargs="+", default=["recipe", "original", "transformers"])
    parser.add_argument("--shards", help="finished shards of that length, with GPT-2's vocabulary; else prepared")
    parser.add_argument("--recipe-shards", help="the same, with the recipe's vocabulary")
    parser.add_argument("--few", action="store_true", help="2,000 and 1,000 texts of AG News alone, to try a recipe")
    chosen = parser.parse_args()
    tune_memory()
    with tempfile.TemporaryDirectory() as folder:
        cluster.connect()
        sets = {}
        if "recipe" in chosen.sides:
            sets["recipe"] = recipe_shards(chosen.recipe_shards, f"{folder}/recipe", chosen.seq_len)
        if {*chosen.sides} - {"recipe"}:
            sets["original"] = sets["transformers"] = shard_set(chosen.shards, f"{folder}/shards", chosen.seq_len)
        curves = run(sets, folder, chosen)
    show(curves, chosen.minutes)


def shard_set(finished: str | None, output: str, seq_len: int, tokenizer: TextTokenizer | None = None) -> ShardSet:
    return open_shards(finished) if finished else prepare(corpus(), output, seq_len=seq_len, tokenizer=tokenizer)


def recipe_shards(finished: str | None, output: str, seq_len: int) -> ShardSet:
    """The corpus in the vocabulary of jobs/record.yaml, or finished shards that are."""
    return shard_set(finished, output, seq_len, None if finished else learn_words(learned_from(corpus())))


def run(sets: dict[str, ShardSet], folder: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Every side's probes at every mark, for each seed. Each is told on standard error as it comes."""
    measures = {name: probes(chosen.few, shards, folder) for name, shards in sets.items()}
    found = []
    # The micro-batches of jobs/compact.yaml are four texts of 512 tokens; at 128 tokens sixteen are as much.
    original = (ORIGINAL, ["train.micro_batch=16"])
    recipes: dict[str, tuple[Path, list[str]]] = {
        "recipe": (RECORD, []),
        "original": original,
        "transformers": original,
    }
    for seed in chosen.seeds:
        for shards in sets.values():
            if made := table.find(shards, Recipe(seed), folder):  # by another seed, whose clock it was on
                storage.remove(made)
        sides = [
            make_side(
                name,
                settings(path, seed, sets[name], changes),
                sets[name],
                Budget("seconds", 60 * chosen.minutes),
                peer=name == "transformers",
            )
            for name in chosen.sides
            for path, changes in [recipes[name]]
        ]
        for mark in [mark for mark in MARKS if mark < chosen.minutes] + [chosen.minutes]:
            for side in sides:
                side.until(60 * mark)
                point = {"side": side.name, "seed": seed, "mark": mark, "minutes": side.seconds / 60}
                point |= {"steps": side.step, "tokens": side.tokens, "flops": side.flops}
                found.append(point | {"probes": [measure(side.encoder()) for measure in measures[side.name]]})
                print(json.dumps(round_figures(found[-1])), file=sys.stderr, flush=True)
    return found


def until_passed(curves: Sequence[dict[str, Any]], side: str, minutes: float) -> dict[str, Any]:
    """Minutes, tokens and FLOPs until the pooler passes the threshold, medians over the seeds.

    The minutes of a seed that never does are all of them; there are no tokens and FLOPs then.
    """
    latest_first = sorted(curves, key=lambda point: float(point["minutes"]), reverse=True)
    passed = {  # of each seed the earliest point, which comes last
        point["seed"]: point
        for point in latest_first
        if point["side"] == side and point["probes"][0]["pooler"]["test_accuracy"] > THRESHOLD
    }
    seeds = {point["seed"] for point in curves}
    every = passed.keys() == seeds
    return {
        "minutes": statistics.median(passed[seed]["minutes"] if seed in passed else minutes for seed in seeds),
        **{
            key: statistics.median(point[key] for point in passed.values()) if every else None
            for key in ("tokens", "flops")
        },
        "every_seed": every,
    }


def show(curves: Sequence[dict[str, Any]], minutes: float) -> None:
    names = list(dict.fromkeys(point["side"] for point in curves))
    passed = {name: until_passed(curves, name, minutes) for name in names}
    ours, peer = passed[names[0]]["minutes"], passed[names[-1]]["minutes"]
    # The limit: two minutes, start included.
    result("record", ours, peer, 2.0, "minutes until 0.8121 by the pooler", passed=passed, curves=list(curves))


if __name__ == "__main__":
    main()
