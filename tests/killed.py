"""A run in this process of which a worker is killed."""

import json
import os
import signal
import threading
import time

from raybert import storage
from raybert.records import read_metrics
from raybert.train.check import Run
from raybert.train.run import train
from tests.processes import titled


def train_with_a_kill(run: Run, *, behind: int) -> list[int]:
    """Train while one worker is killed once, behind that step. Returns the steps as they were logged."""
    killed: list[int] = []

    def kill_one() -> None:
        while not killed:
            if any(record["step"] >= behind for record in read_metrics(run.uri)):
                killed.append(titled(os.getpid(), "RayTrainWorker")[0])
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    train(run)
    assert killed
    lines = storage.read_bytes(f"{run.uri}/metrics.jsonl").decode().splitlines()
    steps = [record["step"] for line in lines if "loss" in (record := json.loads(line))]
    done = run.config.train.steps
    assert len(steps) > done, "no step was done again, so nothing was killed in the middle"
    return steps
