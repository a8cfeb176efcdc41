"""A run whose gradients are no numbers: it stops with a sentence, not with a checkpoint that is ruined."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from raybert import storage
from raybert.cli import run_app
from raybert.errors import RunFailed
from raybert.model import directory
from raybert.train import ledger
from raybert.train.check import check
from raybert.train.recovery import faults
from raybert.train.recovery.committed import last_step
from raybert.train.run import Diverged, train
from tests.data import make_shards
from tests.integration.test_train import settings

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_ten_bad_steps_in_a_row_end_the_run_with_a_sentence(tmp_path):
    shards = make_shards(str(tmp_path / "shards"))
    run = check(settings(tmp_path, shards, "run", train={"steps": 10}))
    train(run)
    # A weight that is no number, in a checkpoint that is otherwise as it should be.
    folder = tmp_path / "run" / "checkpoints" / "step-00000010"
    weights = load_file(folder / "model.safetensors")
    weights["pooler.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    sums = "".join(f"{directory._sha256(folder / name)}  {name}\n" for name in directory.REQUIRED)
    (folder / directory.SUMS).write_text(sums)

    # The validation in between is not finite either, which is noted and ends nothing.
    every = {"validation": 3, "checkpoint": 7, "log": 4, "probe": 0}
    again = check(
        settings(tmp_path, shards, "run", train={"steps": 60, "max_bad_steps": 10, "workers": 2}, every=every)
    )
    with pytest.raises(Diverged) as caught:
        train(again)
    account = ledger.read_account(run.uri)
    digest = f"{int(account.digests[19]):016x}"
    for part in ("up to step 20", f"batch digest {digest}", "step-00000014", "samples 228 to 239"):
        assert part in str(caught.value)
    assert account.skipped == len(account.digests) - 10
    assert last_step(run.uri) == 14
    assert {fault["step"] for fault in faults.read_faults(run.uri)[0] if fault["kind"] == "validation"} >= {12, 15, 18}
    assert run_app(["verify", run.uri]) == 0, "other cadences than before are no fault"


@pytest.mark.skipif("RAYBERT_SLOW" not in os.environ, reason="`make test-faults` does this")
def test_other_shards_in_the_place_of_the_first_end_the_run_at_once(tmp_path):
    shards = make_shards(str(tmp_path / "shards"))
    run = check(settings(tmp_path, shards, "run", every={"validation": 0, "probe": 0, "checkpoint": 0}))
    shutil.rmtree(tmp_path / "shards")
    make_shards(str(tmp_path / "shards"), rows=280)
    with pytest.raises(RunFailed, match=r"Training cannot start: .* no longer contains the shards that this run"):
        train(run)
    assert storage.list_dir(f"{run.uri}/ledger") == []


def test_data_that_cannot_be_read_end_the_run_at_once(tmp_path):
    """The shards were whole when the run began, and a later read finds them damaged."""
    shards = make_shards(str(tmp_path / "shards"))
    run = check(settings(tmp_path, shards, "run", every={"validation": 0, "probe": 0, "checkpoint": 0}))
    for shard in shards.shards():
        path = tmp_path / "shards" / shard.name
        content = bytearray(path.read_bytes())
        content[100:200] = bytes(100)
        path.write_bytes(content)
    with pytest.raises(RunFailed, match=r"data cannot be read at step 1: Row group \d+ of .*train-0000"):
        train(run)
