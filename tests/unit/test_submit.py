"""What a submitted command is read for before it leaves this machine."""

import asyncio
import os
from types import SimpleNamespace

import pytest
import yaml
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import create_package

from raybert import submit
from raybert.cluster import jobs
from raybert.cluster.jobs import Job, follow
from raybert.cluster.upload import LARGEST_UPLOAD, _largest, _upload_sizes, require_small
from raybert.errors import InputError, RunFailed
from raybert.submit import _metadata, _option


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
        monkeypatch.setattr(jobs, "_client", lambda address: client)
        monkeypatch.setattr(jobs, "QUIET_SECONDS", 0.2)
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


def sparse(path, size):
    """A file of so many bytes that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)


@pytest.fixture
def checkout(tmp_path):
    """What a user's checkout looks like, ignore files and all."""
    folder = tmp_path / "my checkout"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs" / "doctor.py").write_text("print(1)\n")
    (folder / "empty").mkdir()
    (folder / "jobs" / "größe ä.txt").write_text("x" * 1000)
    (folder / ".gitignore").write_text("*.log\nbuild/\n!kept.log\n")
    (folder / ".rayignore").write_text("/runs/\n")
    (folder / "jobs" / ".gitignore").write_text("secret.*\n")
    for ignored in ("a.log", "jobs/b.log", "build/c.bin", "runs/r/model.bin", "jobs/secret.bin"):
        sparse(folder / ignored, 200 * 2**20)
    for kept in ("kept.log", "jobs/runs/d.txt"):
        sparse(folder / kept, 50)
    return folder


@pytest.mark.parametrize("ignore_gitignore", ["0", "1"])
def test_the_size_is_that_of_ray_s_package(checkout, tmp_path, monkeypatch, ignore_gitignore):
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", ignore_gitignore)
    if ignore_gitignore == "1":
        for large in ("a.log", "jobs/b.log", "build/c.bin", "jobs/secret.bin"):
            sparse(checkout / large, 1000)
    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=ignore_gitignore == "0")
    # An empty directory and the archive's end take some bytes more.
    assert package.stat().st_size - 300 < sum(_upload_sizes(str(checkout)).values()) <= package.stat().st_size
    require_small(str(checkout))
    assert LARGEST_UPLOAD == DASHBOARD_CLIENT_MAX_SIZE


def test_a_checkout_that_is_too_large_names_what_is(checkout, monkeypatch):
    sparse(checkout / "data" / "corpus" / "all.bin", 90 * 10**6)
    for part in range(3):
        sparse(checkout / "shards" / f"part-{part}.parquet", 7 * 10**6)
    sparse(checkout / "model.safetensors", 3 * 10**6)
    sparse(checkout / "notes.pdf", 10**6)
    monkeypatch.setattr(jobs, "_client", lambda address: pytest.fail("the cluster was asked"))
    with pytest.raises(InputError) as refused:
        submit.submit(["doctor"], directory=str(checkout))
    said = str(refused.value)
    assert "would upload 115.0 MB of" in said
    assert "at most 104.9 MB" in said
    assert "data/corpus/all.bin (90.0 MB), shards/ (21.0 MB), model.safetensors (3.0 MB)" in said
    assert ".rayignore" in said
    assert "notes.pdf" not in said
    (checkout / "data" / ".rayignore").write_text("*\n")
    require_small(str(checkout))


def test_many_small_files_are_named_by_their_directory(checkout):
    for number in range(40):
        sparse(checkout / "cache" / f"{number % 4}" / f"{number}", 3 * 10**6)
    assert _largest(_upload_sizes(str(checkout)), 1)[0][0] == "cache/"
    with pytest.raises(InputError, match=r"The largest are cache/ \(120\.0 MB\), jobs/"):
        require_small(str(checkout))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_directory_that_cannot_be_read_is_named(checkout):
    (checkout / "private").mkdir(mode=0)
    with pytest.raises(InputError, match=r"private cannot be packed .*\.rayignore"):
        require_small(str(checkout))


def test_a_link_that_leads_nowhere_is_no_file(checkout):
    (checkout / "link").symlink_to("nowhere")
    require_small(str(checkout))
