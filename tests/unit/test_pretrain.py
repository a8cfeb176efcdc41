"""From the first step to the report, around a training that is none: who is told, and what is there at the end."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from raybert import pretrain
from raybert.config import from_mapping
from raybert.errors import RunFailed
from raybert.report.watch import Subscriber
from raybert.storage import lease
from tests.runs import make_run


@pytest.mark.parametrize("fails", [False, True])
def test_the_terminal_is_told_and_the_page_is_written_whether_training_fails_or_not(tmp_path, monkeypatch, fails):
    uri = make_run(tmp_path, steps=100, done=60)
    tree = yaml.safe_load(Path(uri, "config.yaml").read_text())
    tree.pop("about")
    shown, driven = [], lease.Onlooker(uri, 60.0)

    def train(run):
        assert driven.driven()
        with Path(run.uri, "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 70, "lr": 1e-3}) + "\n")
        if fails:
            raise RunFailed("no node is left")

    monkeypatch.setattr(pretrain, "train", train)
    shares = SimpleNamespace(worker=1.0)
    run = SimpleNamespace(uri=uri, config=from_mapping(tree), tasks=(), shards=None, shares=shares)
    terminal = nullcontext(Subscriber("terminal", on_record=lambda record: shown.append(record["step"])))
    with pytest.raises(RunFailed) if fails else nullcontext():
        pretrain.drive(run, terminal, wait_for_probes=False)
    assert shown == [70]
    assert Path(uri, "report.html").exists()
    assert list(Path(uri, "tensorboard").iterdir())
    assert not driven.driven()
