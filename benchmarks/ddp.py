"""Tokens per second of two workers with a thread each; beside it torchrun, and one worker with two threads.

torchrun starts the same step on the same samples (in memory) in two processes with DistributedDataParallel over gloo;
its rate is the limit. The three take turns; while one steps, all processes of the others are stopped.
"""

import argparse
import tempfile
from functools import partial

from benchmarks.common import result
from benchmarks.runs import MICRO_BATCH, SEQ_LEN, bare_side, ray_side, shards
from benchmarks.turns import take_turns

GLOBAL_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uri = shards(folder)
        sides = (
            partial(ray_side, folder, uri, "two", workers=2, threads=1, global_batch=GLOBAL_BATCH, settle=5.0),
            partial(bare_side, folder, uri, "torchrun", processes=2, threads=1, global_batch=GLOBAL_BATCH),
            partial(ray_side, folder, uri, "one", workers=1, threads=2, global_batch=GLOBAL_BATCH, settle=5.0),
        )
        first, peer, one = take_turns(sides, rounds=arguments.rounds, seconds=2.0)
    more = {"one_worker_two_threads": one, "against_one_worker": first / one, "seq_len": SEQ_LEN}
    more |= {"global_batch": GLOBAL_BATCH, "micro_batch": MICRO_BATCH, "rounds": arguments.rounds, "clock": "wall time"}
    result("ddp", first, peer, peer, "real tokens/s", threads=1, **more)


if __name__ == "__main__":
    main()
