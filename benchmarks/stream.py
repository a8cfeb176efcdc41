"""Tokens per second that the Ray stream hands to one consumer; beside it the same plan read in this process, no Ray.

The limit is the reader: what Ray adds is the distance to it.
"""

import tempfile
import time
from itertools import islice

import ray

from benchmarks.common import DATA, alternate, result
from raybert import cluster
from raybert.data.prepare import prepare
from raybert.data.reader import iter_batches
from raybert.data.stream import execution_options, train_stream, worker_batches

BATCH, STEPS, T = 64, 400, 512


@ray.remote(num_cpus=0.5)
def consume(shard: ray.data.DataIterator) -> float:
    """Tokens per second from the first batch to the last."""
    where = {"rank": 0, "world_size": 1, "global_batch": BATCH, "micro_batch": BATCH, "start_step": 0, "steps": STEPS}
    batches = worker_batches(shard, **where)
    next(batches)
    start = time.perf_counter()
    tokens = sum(int(part["length"].sum()) for _, parts in batches for part in parts)
    return tokens / (time.perf_counter() - start)


def main() -> None:
    cluster.connect()
    with tempfile.TemporaryDirectory() as folder:
        inputs = [str(DATA / "corpus" / "research-00000-of-00002.parquet")]
        shards = prepare(inputs, f"{folder}/shards", seq_len=T)

        def ours() -> float:
            stream = train_stream(
                shards.uri, seed=0, global_batch=BATCH, world_size=1, start_step=0, steps=STEPS, task_cpus=0.5
            )
            stream.context.execution_options = execution_options()
            return float(ray.get(consume.remote(stream.streaming_split(1, equal=True)[0])))

        def peer() -> float:
            batches = iter_batches(shards.uri, seed=0, global_batch_size=BATCH)
            next(batches)
            start = time.perf_counter()
            tokens = sum(int(batch["attention_mask"].sum()) for batch in islice(batches, STEPS - 1))
            return tokens / (time.perf_counter() - start)

        first, second = alternate(ours, peer, rounds=3)
    result("stream", first, second, second, "tokens/s", batch=BATCH, seq_len=T)


if __name__ == "__main__":
    main()
