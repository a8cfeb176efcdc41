"""A small probe task made for a test: csv files, string labels, two kinds of words."""

from pathlib import Path

import numpy as np

from raybert.model.bert import Bert
from raybert.model.files import save
from raybert.probe.service import queue
from raybert.probe.tasks import ProbeTask

WORDS = {"sport": "match goal player team win cup league", "money": "bank share profit market price trade fund"}


def make_task(folder: Path, *, n_train: int = 120, n_test: int = 60) -> str:
    """Write the task and its texts, and return the path of its YAML file."""
    rng = np.random.default_rng(0)
    for split, rows in (("train", n_train), ("test", n_test)):
        lines = ["headline,topic"]
        for i in range(rows):
            topic = ("sport", "money")[i % 2]
            lines.append(f"{' '.join(rng.choice(WORDS[topic].split(), rng.integers(3, 9)))},{topic}")
        (folder / f"{split}.csv").write_text("\n".join(lines))
    text = f"name: mine\ntrain: {folder}/train.csv\ntest: {folder}/test.csv\ntext: headline\nlabel: topic\n"
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


def queue_checkpoint(
    run: str, step: int, task: ProbeTask, model: Bert, *, cpus: float = 0.5, workers: int = 1, max_waiting: int
) -> bool:
    """Queue a model for its probe as a run does, without telling a service."""
    request = queue.Request(run, step, (task,), positions=32, cpus=cpus, workers=workers, max_waiting=max_waiting)
    if queue.new_tasks(request):
        save(model, request.weights)
    return queue.add(request)
