"""Seconds to embed AG News' 12,500 probe texts with the compact encoder; beside it transformers with the same weights.

Two ways of the peer, both under the same autocast: batches of 64 in the order of the file, padded to their longest
(`peer`), and one text at a time padded to 512, as the original probe does. All sides embed a fair sample of the texts
and their seconds are scaled to 12,500. The limit is matrix products at this machine's rate.

`fit_seconds` is what the classifiers of the three poolings take with C = 1 on 10,000 training texts of 384 numbers,
`tuning_seconds` what the choice of C adds, and `spread_seconds` the vectors' deviation and effective rank.

The figures that begin with `suite` are those of `benchmarks.suite`: four tasks beside the evaluators of
sentence-transformers.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import suite
from benchmarks.common import DATA, elsewhere, medians, result, seconds
from raybert.bench import default_device
from raybert.encode.encoders import RaybertEncoder
from raybert.encode.vectors import embed
from raybert.model.bert import Bert, flops_per_token
from raybert.model.config import BertConfig
from raybert.model.interop import fast_tokenizer, to_transformers
from raybert.model.peak import peak_flops
from raybert.model.precision import pick_dtype
from raybert.probe import classify, tune
from raybert.probe.spread import spread
from raybert.probe.tasks import load_task
from raybert.probe.texts import Texts, load_texts
from raybert.train.memory import tune_memory

MAX_TOKENS, BATCH = 256, 64
FIT_TOKENS = 32  # the classifiers' time does not depend on how much of a text the vectors are of
SAMPLE, ONE_BY_ONE = 400, 20


def peer_side(texts: list[str], scale: float, batch: int, padding: str | bool) -> Callable[[], float]:
    """Seconds that transformers would take for all texts."""
    tune_memory()
    torch.manual_seed(0)
    device = default_device()
    model = to_transformers(Bert(BertConfig())).bert.to(device).eval()
    longest = MAX_TOKENS if padding is True else 512
    tokenizer, dtype = fast_tokenizer(longest), pick_dtype("auto", device)

    def work() -> None:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for start in range(0, len(texts), batch):
                part = texts[start : start + batch]
                encoded = tokenizer(part, padding=padding, truncation=True, max_length=longest, return_tensors="pt")
                model(**encoded.to(device)).pooler_output.float().cpu()

    work()
    return lambda: scale * seconds(work)


def classifier_seconds(encoder: RaybertEncoder, texts: Texts, device: torch.device) -> dict[str, float]:
    """Seconds of what follows the embedding, over the three poolings."""
    vectors = embed(encoder, encoder.tokenize(texts.texts, FIT_TOKENS), device=device)
    train_y, test_y = texts.split(texts.labels)
    spent = dict.fromkeys(("fit_seconds", "tuning_seconds", "spread_seconds"), 0.0)
    for values in vectors.values():
        train_x, test_x = texts.split(values)
        start = time.perf_counter()
        score = classify.fit(train_x, train_y, test_x, test_y)
        fitted = time.perf_counter()
        tune.tune(train_x, train_y, test_x, test_y, score)
        tuned = time.perf_counter()
        spread(values)
        spent["fit_seconds"] += fitted - start
        spent["tuning_seconds"] += tuned - fitted
        spent["spread_seconds"] += time.perf_counter() - tuned
    return spent


def main() -> None:
    tune_memory()
    torch.manual_seed(0)
    device, task_texts = default_device(), load_texts(load_task(f"ag_news@{DATA / 'ag_news'}"))
    texts = [text for text in task_texts.texts if isinstance(text, str)]
    encoder = RaybertEncoder(Bert(BertConfig()).eval())
    sample, few = texts[:: len(texts) // SAMPLE], texts[:: len(texts) // ONE_BY_ONE]
    tokens = int(encoder.tokenize(sample, MAX_TOKENS).offsets[-1])

    def ours() -> float:
        spent = seconds(lambda: embed(encoder, encoder.tokenize(sample, MAX_TOKENS), device=device))
        return len(texts) / len(sample) * spent

    ours()
    with elsewhere(
        partial(peer_side, sample, len(texts) / len(sample), BATCH, True),
        partial(peer_side, few, len(texts) / len(few), 1, "max_length"),
    ) as (dynamic, original):
        first, second, third = medians(ours, dynamic, original, rounds=5)
    dtype = pick_dtype("auto", device)
    # A third of a training step's work without the head.
    flops = flops_per_token(BertConfig(), tokens // len(sample), masked_fraction=0.0) / 3 * tokens
    limit = flops * len(texts) / len(sample) / peak_flops(device, dtype, seconds=1.0)
    extra = classifier_seconds(encoder, task_texts, device)
    extra |= {"one_by_one_to_512": third, "faster_than_peer": second / first, "faster_than_one_by_one": third / first}
    extra |= suite.compare()
    result("probe", first, second, limit, "s (less is better)", texts=len(texts), dtype=str(dtype), **extra)


if __name__ == "__main__":
    main()
