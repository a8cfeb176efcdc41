"""What a submitted command is read for before it leaves this machine."""

import asyncio
from types import SimpleNamespace

import pytest
import yaml

from raybert import submit
from raybert.errors import InputError, RunFailed
from raybert.submit import Job, _metadata, _option, follow


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
def test_an_option_and_the_other_words(words, expected):
    assert _option(words, "--resume") == expected


SWEEP = "{storage: %s, base: {data: {shards: %s}}, space: {optimizer.lr: {grid: [0.001]}}}"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["pretrain", "c.yaml", "run.storage=../runs", "data.shards=gs://b/s"], "run.storage=../runs"),
        (["pretrain", "c.yaml", "data.shards=gs://b/s"], "run.storage=runs"),  # the default
        (["pretrain", "c.yaml", "run.storage=gs://b/r", "data.shards=shards"], "data.shards=shards"),
        (["pretrain", "--resume", "../runs/r"], "--resume=../runs/r"),
        (["sweep", "s.yaml", "storage=gs://b/r"], "base.data.shards=shards"),
        (["sweep", "s.yaml", "base.data.shards=gs://b/s"], "storage=sweeps"),
        (["prepare", "--input", "gs://b/t", "--output", "shards", "--seq-len", "128"], "--output=shards"),
        (["embed", "gs://b/c", "--input=gs://b/t", "--output=vectors"], "--output=vectors"),
    ],
)
def test_a_path_that_only_this_machine_has_is_refused(words, key, tmp_path):
    (tmp_path / "c.yaml").write_text("{}")
    (tmp_path / "s.yaml").write_text(SWEEP % ("sweeps", "shards"))
    with pytest.raises(InputError, match="a URI, or the absolute path") as refused:
        _metadata(words, str(tmp_path))
    assert str(refused.value).startswith(f"{key} is a path")


def test_an_absolute_path_below_the_checkout_may_be_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(f"run: {{storage: {tmp_path}/runs}}\ndata: {{shards: 'file://{tmp_path}/shards'}}")
    assert _metadata(["pretrain", "c.yaml"], ".")["raybert.run"] == f"{tmp_path}/runs/bert"


class Client:
    """Answers as a cluster does whose connections are cut, one after the other, as the script says."""

    def __init__(self, *script):
        self.script = list(script)

    async def tail_job_logs(self, job_id):
        for part in self.script.pop(0) if self.script else ():
            if isinstance(part, str):
                yield part
            elif isinstance(part, float):
                await asyncio.sleep(part)
            else:
                raise part

    def get_job_info(self, job_id):
        return SimpleNamespace(
            status=SimpleNamespace(is_terminal=lambda: not self.script), driver_exit_code=7, message=""
        )

    def get_job_logs(self, job_id):
        return "a\nb\nc\nd\n"


@pytest.fixture
def following(monkeypatch):
    def run(client, show=None, **options):
        shown = []
        monkeypatch.setattr(submit, "_client", lambda address: client)
        monkeypatch.setattr(submit, "QUIET_SECONDS", 0.2)
        return follow(Job("x", "http://there"), show or shown.append, **options), "".join(shown)

    return run


def test_each_line_is_shown_once_however_often_the_connection_is_cut(following):
    lost, half_open = ConnectionResetError("cut"), 30.0
    client = Client(["a\n", lost], ["a\nb", half_open], [RuntimeError("closed")], ["a\nb\nc\n"])
    assert following(client) == (7, "a\nb\nc\nd\n")


def test_a_cluster_that_is_gone_is_waited_for_from_the_moment_it_went(following, monkeypatch):
    client = Client(["a\n", 0.1, ConnectionResetError("cut")], ["a\n"])
    answers = iter([OSError("refused"), None])
    whole = client.get_job_info

    def info(job_id):
        if error := next(answers, None):
            raise error
        return whole(job_id)

    client.get_job_info = info
    assert following(client, patience=0.01)[0] == 7, "one refusal is no outage, however long the job was silent before"
    gone = Client(["a\n"])
    gone.get_job_info = lambda job_id: (_ for _ in ()).throw(OSError("refused"))
    with pytest.raises(RunFailed, match="has not answered"):
        following(gone, patience=0.5)


def test_who_does_not_want_to_see_more_ends_it(following):
    def show(text):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        following(Client(["a\n"], ["a\n"]), show)
