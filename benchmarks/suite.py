"""Seconds to encode and judge a suite of four tasks; beside it sentence-transformers' evaluators of the same tasks.

Similarity of the first 500 pairs of STS-B's train and of its dev file, and retrieval of those pairs of each that have a
score of 4 or more. Both sides have the weights of all-MiniLM-L6-v2 and the same texts, and tokenise them anew each
round. Ours encodes each text once for all tasks, and judges three poolings with their intervals; the evaluators encode
for each task and judge one. Both run in the type in which this machine multiplies faster, and in turns. The headlines
of both are printed to be compared. `benchmarks.probe` prints the figures as well.
"""

import tempfile
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.common import DATA, medians, minilm, result, seconds
from raybert.bench import default_device
from raybert.encode.encoders import open_encoder
from raybert.model.precision import pick_dtype
from raybert.probe import kinds
from raybert.probe.kind import ProbeTask
from raybert.probe.measure import measure, prepare
from raybert.probe.tasks import parse_task
from raybert.train.memory import tune_memory

PAIRS, ROUNDS, LONGEST = 500, 3, 128
HEADLINES = ("spearman_cosine", "cosine_ndcg@10")  # as the evaluators' keys end


def tasks(folder: str) -> list[ProbeTask]:
    """Their files are written into the folder."""
    found = []
    for split in ("train", "dev"):
        file = f"{folder}/{split}.parquet"
        pq.write_table(pq.read_table(DATA / "probes" / f"stsb_{split}.parquet").slice(0, PAIRS), file)
        alike = {"kind": "similarity", "test": file}
        right = {"kind": "retrieval", "pairs": file, "text": ["text1", "text2"], "label": "label", "least": 4.0}
        for name, task in ((f"alike-{split}", alike), (f"found-{split}", right)):
            found.append(parse_task({"name": name, "max_tokens": LONGEST, **task}, "the benchmark"))
    return found


def evaluator(data: Any) -> Any:
    """What sentence-transformers judges a task's data by."""
    from sentence_transformers.sentence_transformer import evaluation

    if hasattr(data, "scores"):
        half = len(data.scores)
        return evaluation.EmbeddingSimilarityEvaluator(
            data.texts[:half], data.texts[half:], data.scores.tolist(), write_csv=False
        )
    right: dict[str, set[str]] = {}
    for query, document in zip(data.relevance.query, data.relevance.document, strict=True):
        right.setdefault(str(query), set()).add(str(document))
    queries, documents = ({str(i): text for i, text in enumerate(side)} for side in (data.queries, data.documents))
    return evaluation.InformationRetrievalEvaluator(queries, documents, right, write_csv=False)


def compare() -> dict[str, Any]:
    """Seconds of both sides, the headlines that both found, and how many texts there were."""
    with tempfile.TemporaryDirectory() as folder:
        return _compare(tasks(folder))


def _compare(suite: list[ProbeTask]) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    weights, device = minilm(), default_device()
    encoder, dtype = open_encoder(weights), pick_dtype("auto", device)
    model = SentenceTransformer(weights, device=str(device))
    model.max_seq_length = LONGEST
    data = [kinds.of_task(task).read(task) for task in suite]
    evaluators = list(map(evaluator, data))
    headlines: dict[str, list[float]] = {}

    def ours() -> float:
        def work() -> None:
            found = measure(encoder, [prepare(task, encoder.tokenize, encoder.positions) for task in suite], device)
            keys = (kinds.of_task(task).headline.key for task in suite)
            headlines["ours"] = [record["mean"][key] for record, key in zip(found, keys, strict=True)]

        return seconds(work)

    def peer() -> float:
        def work() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                found = [one(model) for one in evaluators]
            headlines["peer"] = [next(v for key, v in one.items() if key.endswith(HEADLINES)) for one in found]

        return seconds(work)

    ours(), peer()
    first, second = medians(ours, peer, rounds=ROUNDS)
    return {
        "suite_seconds": first,
        "suite_peer_seconds": second,
        "suite_faster_than_peer": second / first,
        "suite_headlines": headlines,
        "suite_texts": sum(len(one.texts) for one in data),
        "suite_different_texts": len({text for one in data for text in one.texts}),
    }


def main() -> None:
    tune_memory()
    found = compare()
    dtype = str(pick_dtype("auto", default_device()))
    # The limit is the goal: half the peer's time.
    ours, peer = found.pop("suite_seconds"), found.pop("suite_peer_seconds")
    result("suite", ours, peer, peer / 2, "s (less is better)", dtype=dtype, **found)


if __name__ == "__main__":
    main()
