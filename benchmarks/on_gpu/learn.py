"""Training by a recipe for as long as the part may take, probed at every 100 steps.

The record's recipe begins with token vectors from co-occurrence in a sample of the carried windows. They are counted
here on the CPU, as `raybert.spectral` does, and factorised by torch.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import round_figures
from benchmarks.on_gpu.carried import Carried, Windows
from benchmarks.on_gpu.figure import draw
from benchmarks.on_gpu.parts import Order, timed
from benchmarks.on_gpu.probe import Prober
from benchmarks.on_gpu.recipes import ORIGINAL, RECORD, Recipe, Trainer, require_finite, stream
from raybert import storage
from raybert.errors import RunFailed
from raybert.model import initialise
from raybert.model.bert import Bert
from raybert.spectral import count, factorise
from raybert.spectral.whiten import whiten
from raybert.tokenizer import TextTokenizer
from raybert.train.step import means, no_sums

EVERY = 100  # steps between probes
CURVE, PICTURE = "curve.json", "curve.png"
SAMPLE_TOKENS, REACH, COLUMNS = 2_000_000, 32, 5000  # of the co-occurrences
HEADLINE = 0.8121  # the original's test accuracy by the pooler at step 1,000


def original(order: Order) -> None:
    """jobs/compact.yaml at half a million places a step."""
    carried, recipe = order.load(), ORIGINAL
    windows = carried.windows
    if not order.on_gpu:
        windows = windows.cut(64, 2000)
        recipe = replace(recipe, size="tiny", seq_len=64, global_batch=32, micro_batch=8)
    train(order, "compact", recipe, windows, carried)


def record(order: Order) -> None:
    """jobs/record.yaml as it is, with a vocabulary of words; not compiled, to leave its time to its steps."""
    carried = order.load()
    recipe = RECORD if order.on_gpu else replace(RECORD, size="tiny", global_batch=16, micro_batch=16)
    train(
        order, "record", recipe, carried.words, carried, tokenizer=carried.word_tokenizer, spectral=True, compiles=False
    )


def train(
    order: Order,
    name: str,
    recipe: Recipe,
    windows: Windows,
    carried: Carried,
    *,
    tokenizer: TextTokenizer | None = None,
    spectral: bool = False,
    compiles: bool | None = None,
) -> None:
    """The curve, which is written after each probe: a part that is stopped leaves what it has.

    Args:
        tokenizer: of the windows, where it is another than raybert's own.
        compiles: None for what a run does by itself.

    Raises:
        RunFailed: time was up before the first step.
    """
    recipe = recipe.within(windows.vocabulary)
    begun, every = time.perf_counter(), EVERY if order.on_gpu else 10
    batches = stream(windows, recipe)  # before the GPU is used
    vectors = counts = None
    if spectral:
        vectors, counts, seconds = _token_vectors(windows, recipe, order)
        order.tell(recipe=name, token_vectors_s=seconds, counted_tokens=int(counts.sum()))
    trainer = Trainer(recipe, order.device, order.dtype, compiles=compiles)
    prober = Prober(carried, order, tokenizer)
    trainer.bert.tokenizer = tokenizer
    for note in trainer.notes:
        order.tell(recipe=name, note=note)
    parts = next(batches)
    if spectral:
        initialise.freeze_last_norm(trainer.bert)
    order.tell(recipe=name, compile_s=timed(lambda: trainer.warm_up(parts), order))
    if vectors is not None and counts is not None:
        start(trainer.bert, vectors, counts)
    points: list[dict[str, Any]] = []
    tokens, spent, lap = 0, 0.0, 0.0
    sums = no_sums(recipe.objective, order.device)
    while True:
        at = time.perf_counter()
        scores = prober.probe(trainer.bert)
        probing = time.perf_counter() - at
        point = {"step": trainer.step, "tokens": tokens, "training_s": spent, "probe_s": probing, "probe": scores}
        if trainer.step:
            point |= {"losses": means(sums, recipe.objective), "tokens_per_second": tokens / spent}
        points.append(point)
        order.tell(recipe=name, **point)
        _write(order.out, name, points, recipe, trainer)
        if trainer.step >= recipe.steps or order.left < 1.2 * lap + 2 * probing:
            break
        sums, at = torch.zeros_like(sums), time.perf_counter()
        for _ in range(min(every, recipe.steps - trainer.step)):
            sums += trainer.train(parts)
            tokens += sum(int(part["length"].sum()) for part in parts)
            parts = next(batches)
            if order.left < 2 * probing + 1:
                break
        order.wait()
        lap = time.perf_counter() - at
        spent += lap
        require_finite(sums)
    batches.close()
    if not trainer.step:
        raise RunFailed(f"The part's time was up before the first step of {name}; give it more --minutes.")
    passed = next((p for p in points if p["probe"]["pooler"]["test_accuracy"] >= HEADLINE), None)
    order.tell(
        recipe=name,
        steps=trainer.step,
        seconds=time.perf_counter() - begun,
        pooler=points[-1]["probe"]["pooler"]["test_accuracy"],
        headline=HEADLINE,
        headline_at_step=passed["step"] if passed else None,
        **trainer.feed.lap(),
    )


def start(bert: Bert, vectors: np.ndarray, counts: np.ndarray) -> None:
    """The weights that jobs/record.yaml begins with."""
    initialise.use_vectors(bert, vectors)
    initialise.enlarge_token_types(bert)
    initialise.average_attention(bert, 0)
    initialise.zero_feed_forward(bert)
    initialise.centre(bert, counts, initialise.WHITENED_GAIN)
    initialise.use_frequencies(bert, counts)


def _token_vectors(windows: Windows, recipe: Recipe, order: Order) -> tuple[np.ndarray, np.ndarray, float]:
    """(V, D) whitened vectors and (V,) counts from a sample, and the seconds they took."""
    begun = time.perf_counter()
    units = windows.units()
    least = SAMPLE_TOKENS if order.on_gpu else 200_000
    share = min(1.0, least / len(windows.rows.tokens))
    sample = [windows.read(unit) for unit in units[: max(1, round(share * len(units)))]]
    vocabulary = windows.vocabulary
    text = count.lay_out(sample, REACH, vocabulary)
    frequency = count.frequencies(text, vocabulary.text_stop)
    chosen = count.pick_columns(frequency, COLUMNS if order.on_gpu else 1000)
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        ranges = count.share_rows(frequency, 4 * threads)
        parts = list(pool.map(lambda rows: count.count(text, chosen, rows[0], rows[1], REACH), ranges))
    matrix = torch.from_numpy(factorise.Information(parts, len(chosen))[:]).to(order.device)
    size = recipe.bert().hidden_size
    _, directions = torch.linalg.eigh((matrix.T @ matrix).double())
    found = matrix @ directions[:, -size:].flip(1).float()
    vectors = np.zeros((vocabulary.size, size), np.float32)
    vectors[: len(found), : found.shape[1]] = found.cpu().numpy()
    vectors = whiten(vectors, sample)
    counts = np.zeros(vocabulary.size, np.int64)
    counts[: len(frequency)] = frequency
    return vectors, counts, time.perf_counter() - begun


def _write(out: Path, name: str, points: list[dict[str, Any]], recipe: Recipe, trainer: Trainer) -> None:
    """Both recipes' curves in one file, and their picture."""
    file = out / CURVE
    curves = json.loads(file.read_text()) if file.exists() else {}
    about = {"size": recipe.size, "T": recipe.seq_len, "global_batch": recipe.global_batch, "lr": recipe.lr}
    curves[name] = {**about, "dtype": str(trainer.dtype), "points": round_figures(points)}
    storage.write_json(str(file), curves)  # whole or not at all: the part may be stopped just here
    lines = {
        f"{recipe_name} {pooling}": [
            (point["tokens"] / 1e6, 100 * point["probe"][pooling]["test_accuracy"]) for point in curve["points"]
        ]
        for recipe_name, curve in curves.items()
        for pooling in ("pooler", "cls", "mean")
    }
    (out / PICTURE).write_bytes(draw(lines, x="million tokens", y="test accuracy, %", level=100 * HEADLINE))
