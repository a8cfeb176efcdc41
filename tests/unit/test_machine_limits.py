"""What a run does where a machine cannot do what it asks for: compile, or hold a micro-batch. Without Ray."""

import io
from unittest import mock

import pytest
import torch
from rich.console import Console

from raybert import storage
from raybert.config import Config, from_mapping
from raybert.errors import RunFailed
from raybert.model import compiler
from raybert.records import FAILURE
from raybert.train import dry_run, loop, replica
from tests.data import make_shards


@pytest.fixture
def config(tmp_path) -> Config:
    tree = {
        "run": {"name": "x", "storage": str(tmp_path)},
        "data": {"shards": make_shards(str(tmp_path / "shards")).uri},
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32},
        "train": {
            "steps": 4,
            "global_batch": 6,
            "micro_batch": 3,
            "dtype": "float32",
            "compile": True,
            "packing": True,
        },
        "schedule": {"warmup_steps": 1},
        "probe": {"tasks": []},
    }
    return from_mapping(tree)


def test_a_dry_run_measures_uncompiled_and_says_so(config):
    with mock.patch.object(compiler, "why_not", return_value="torch.compile is not used: no compiler."):
        found = dry_run.measure(config, 0)
    assert found["notes"] == ("torch.compile is not used: no compiler.",)
    assert found["seconds"] > 0


def test_out_of_memory_in_a_dry_run_names_what_to_halve(config):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    with mock.patch.object(dry_run, "measure", side_effect=error), pytest.raises(RunFailed) as raised:
        dry_run._measure._function(config.model_dump(mode="json"), 0)
    assert all(word in str(raised.value) for word in ("train.micro_batch=3", "T=32", "step 1", "2 GiB"))


def failed_run(config, error, *, at_once):
    """FAILURE of a run whose worker fails while it is made, or in step 5."""
    settings = {"tasks": [], "config": config.model_dump(mode="json"), "probe_cpus": 1.0, "manifest": ""}
    worker = mock.Mock(step=4)
    worker.run.side_effect = error
    made = {"side_effect": error} if at_once else {"return_value": worker}
    with mock.patch.object(loop, "Worker", **made), pytest.raises(type(error)):
        loop.train_loop(settings | {"token_vectors": ""})
    path = storage.join(config.run_uri, FAILURE)
    return storage.read_json(path) if storage.exists(path) else None


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "driver"])
@pytest.mark.parametrize("at_once", [True, False], ids=["made", "running"])
def test_out_of_memory_ends_the_run_with_the_sentence(config, error, at_once):
    noted = failed_run(config, error, at_once=at_once)
    assert noted["kind"] == "memory"
    for words in ("train.micro_batch=3", "T=32", "step 1" if at_once else "step 5"):
        assert words in noted["reason"]


@pytest.mark.parametrize("at_once", [True, False], ids=["made", "running"])
def test_another_error_may_pass_with_a_restart(config, at_once):
    assert failed_run(config, RuntimeError("Connection closed by peer"), at_once=at_once) is None


def test_all_ranks_compile_or_none(config):
    cpu = torch.device("cpu")
    with mock.patch.object(compiler, "why_not", return_value="no compiler"):
        assert replica._why_uncompiled(config, cpu, 1) == "no compiler"
    with mock.patch.object(compiler, "why_not", return_value=""):
        assert replica._why_uncompiled(config, cpu, 1) == ""
        with mock.patch.object(replica, "all_agree", return_value=False):
            assert "another worker" in replica._why_uncompiled(config, cpu, 2)


def test_a_dry_run_shows_its_notes(config):
    run = mock.Mock(config=config)
    run.shards.rows.return_value, run.shards.seq_len, run.shards.uri, run.shares.worker = 600, 32, "u", 1.0
    run.shards.tokens.return_value, run.uri = 1000, config.run_uri
    figures = dict.fromkeys(
        ("parameters", "tokens", "state_bytes", "peak_bytes", "checkpoint_bytes", "accumulation"), 1
    )
    found = dry_run.Estimate(
        **figures, flops=1.0, seconds=1.0, device="d", dtype="float32", notes=("Nothing compiles.",)
    )
    console = Console(file=io.StringIO(), width=120)
    with mock.patch.object(dry_run, "_start", return_value=""):
        console.print(dry_run.show(run, found))
    assert "Nothing compiles." in console.file.getvalue()  # type: ignore[attr-defined]
