"""What a submitted command is read for before it leaves this machine."""

import pytest
import yaml

from raybert.submit import _metadata, _resumed


def test_the_run_that_is_resumed_is_named_whichever_way_it_is_written(tmp_path):
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"run": {"storage": "elsewhere", "name": "mine"}}))
    for words in (["--resume", str(run)], [f"--resume={run}"], ["--resume", str(run), "train.steps=2000"]):
        assert _metadata(["pretrain", *words], ".")["raybert.run"] == str(run)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.yaml", "x=1"], (None, ["a.yaml", "x=1"])),
        (["--resume", "r", "x=1"], ("r", ["x=1"])),
        (["x=1", "--resume=r"], ("r", ["x=1"])),
        (["--resume"], (None, ["--resume"])),
    ],
)
def test_resumed(words, expected):
    assert _resumed(words) == expected
