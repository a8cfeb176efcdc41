"""What published weights are worth, and the mean rows of an extended vocabulary: losses of masked words, in nats.

all-MiniLM-L6-v2 (6 layers of 384, a WordPiece of 30,522, saved without its heads) is trained for some steps on the
corpus, masked words alone, and beside it the same model from random weights, on the same batches. Its trained weights
then go on with 1,000 words more, each new row the mean of its pieces' rows, and beside it with random new rows. Losses
are of the same validation windows of each vocabulary; the limit is the published weights' before the first step.
What their vectors (mean over the tokens) are worth before and after stands beside: accuracy on AG News, and Spearman's
correlation on STS-B's development pairs; and the same where halves of a window have to find each other as well.
"""

import argparse
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import raybert
from benchmarks.common import DATA, STS_B, minilm, result
from raybert import cluster
from raybert.bench import OPTIMIZER
from raybert.data.reader import SampleReader, validation_batches
from raybert.data.shards import ShardSet
from raybert.data.spec import SampleSpec
from raybert.data.tensors import to_torch
from raybert.data.text.prepare import prepare
from raybert.data.text.sample import draw
from raybert.model import optimizer
from raybert.model.bert import Bert
from raybert.model.losses import Pretraining
from raybert.model.objective import Objective
from raybert.model.precision import pick_dtype
from raybert.model.schedule import lr_at
from raybert.tokenizer import load
from raybert.tokenizer.train import count_words, extend
from raybert.train.start import read_model, start_from
from raybert.train.step import means, train_step, validate

SEQ_LEN, BATCH, LR, WORDS, VALIDATION = 64, 8, 3e-4, 1000, 256
WORDS_ALONE = (Objective(pair="none"), SampleSpec(next_sentence=False))
CONTRAST = (Objective(pair="contrastive"), SampleSpec(next_sentence=False, halves=True))


def validation_loss(model: Pretraining, shards: ShardSet, dtype: torch.dtype, samples: SampleSpec) -> float:
    device, spec = torch.device("cpu"), replace(samples, vocabulary=shards.vocabulary)
    batches = validation_batches(shards, seed=0, batch_size=BATCH, samples=VALIDATION, spec=samples)
    sums = validate(model, (to_torch(part, device, spec) for part in batches), dtype, device, model.objective)
    return means(sums, model.objective)["mlm_loss"]


def train(
    bert: Bert, shards: ShardSet, steps: int, asked: tuple[Objective, SampleSpec] = WORDS_ALONE
) -> dict[str, float]:
    """Train in place; the validation loss before and after, and the mean training loss of the last steps."""
    device = torch.device("cpu")
    objective, samples = asked
    dtype, model = pick_dtype("auto", device), Pretraining(bert.train(), objective)
    adam = optimizer.build(bert, **OPTIMIZER)
    reader, losses = SampleReader(shards, seed=0, spec=samples), []
    before = validation_loss(model, shards, dtype, samples)
    schedule: dict[str, Any] = {
        "warmup_steps": steps // 10,
        "decay": "linear",
        "decay_fraction": 0.2,
        "min_lr_ratio": 0.0,
    }
    for step in range(steps):
        batch = to_torch(reader.build(np.arange(step * BATCH, (step + 1) * BATCH)), device, reader.spec)
        keys: dict[str, Any] = {"seed": 0, "step": step, "first_micro_batch": 0, "global_batch": BATCH}
        lr = lr_at(step, peak_lr=LR, total_steps=steps, **schedule)
        sums, _ = train_step(model, adam, [batch], lr=lr, grad_clip=1.0, dtype=dtype, objective=objective, **keys)
        losses.append(means(sums, objective)["mlm_loss"])
    after = validation_loss(model, shards, dtype, samples)
    return {"before": before, "after": after, "last_steps": float(np.mean(losses[-max(1, steps // 10) :]))}


def probes(bert: Bert) -> dict[str, float]:
    """Accuracy and correlation of a model with its tokenizer."""
    news = raybert.probe.run(bert, f"ag_news@{DATA / 'ag_news'}", device="cpu")
    alike = raybert.probe.run(bert, STS_B, device="cpu")
    return {"ag_news": news["mean"]["test_accuracy"], "stsb": alike["mean"]["spearman"]}


def with_random_rows(bert: Bert, first: int) -> Bert:
    """Its new rows drawn as those of a new model."""
    torch.manual_seed(0)
    with torch.no_grad():
        bert.word_embeddings.weight[first:].normal_(std=bert.config.initializer_range)
        bert.mlm_bias[first:] = 0.0
    return bert


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    text = [str(DATA / "corpus" / "research-00000-of-00002.parquet")]
    base = load(minilm())
    more = extend(base, count_words(draw(text, "text", "", tokens=10**8, seed=0).texts()), WORDS)
    cluster.connect()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"seq_len": SEQ_LEN, "validation_fraction": 0.05}
        shards = prepare(text, f"{folder}/base", tokenizer=base, **options)
        extended = prepare(text, f"{folder}/more", tokenizer=more, **options)
        torch.manual_seed(0)
        published = read_model(minilm())
        random = Bert(published.config)
        scores: dict[str, dict[str, float]] = {"probes_before": probes(published)}
        for name, model in (("published", published), ("random", random)):
            scores[name] = train(model, shards, steps)
            print(name, scores[name], flush=True)
        scores["probes_after"] = probes(published)
        beside = read_model(minilm())
        scores["with_contrast"] = train(beside, shards, steps, CONTRAST)
        scores["probes_with_contrast"] = probes(beside)
        for name in ("mean_rows", "random_rows"):
            torch.manual_seed(0)
            bert = Bert(replace(published.config, vocab_size=more.size))
            bert.tokenizer = more
            start_from(bert, published)
            if name == "random_rows":
                with_random_rows(bert, base.size)
            scores[name] = train(bert, extended, steps // 3)
            print(name, scores[name], flush=True)
    first, second = scores["published"]["after"], scores["random"]["after"]
    limit = scores["published"]["before"]
    result("going_on", first, second, limit, "nats a masked word", steps=steps, words=more.size - base.size, **scores)


if __name__ == "__main__":
    main()
