"""Tokens per second of a whole run in Ray Train, one worker on one thread, beside the same step in a bare Python loop.

The bare loop has its batches in memory and is the limit as well. They take turns; while one steps, all processes of
the other are stopped.
"""

import argparse
import tempfile
from functools import partial

from benchmarks.common import result
from benchmarks.runs import MICRO_BATCH, SEQ_LEN, bare_side, ray_side, shards
from benchmarks.turns import take_turns

GLOBAL_BATCH = 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uri = shards(folder)
        sides = (
            partial(ray_side, folder, uri, "ray", workers=1, threads=1, global_batch=GLOBAL_BATCH, settle=2.0),
            partial(bare_side, folder, uri, "bare", processes=1, threads=1, global_batch=GLOBAL_BATCH),
        )
        first, second = take_turns(sides, rounds=arguments.rounds, seconds=3.0)
    more = {
        "micro_batch": MICRO_BATCH,
        "seq_len": SEQ_LEN,
        "workers": 1,
        "rounds": arguments.rounds,
        "clock": "wall time",
    }
    result("overhead", first, second, second, "real tokens/s", threads=1, **more)


if __name__ == "__main__":
    main()
