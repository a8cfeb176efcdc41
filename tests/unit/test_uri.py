"""What is a local path, what is a URI, and what is refused as neither."""

import os
import pwd
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert import storage
from raybert.cli import run_app
from raybert.errors import InputError
from raybert.storage import uri
from raybert.submit import _metadata


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("file:/data/x", "/data/x"),
        ("file:///data/x", "/data/x"),
        ("file:////data/x", "/data/x"),
        ("file://localhost/data/x", "/data/x"),
        ("FILE://LocalHost/data/x", "/data/x"),
        ("local:///data/x/", "/data/x"),
        ("file:///a%20b/c%25", "/a b/c%"),
        ("/a%20b", "/a%20b"),
        ("/data/gs:/x", "/data/gs:/x"),
        ("/data/a::b", "/data/a::b"),
    ],
)
def test_a_file_uri_is_a_local_path(given, path):
    assert storage.absolute(given) == path
    assert not storage.is_remote(given)


@pytest.mark.parametrize(
    "name", ["a:b.txt", "runs/12:30", "12:30/x", "x/gs://y", "c:/x", "./gs:/x", "my data:/x", "a::b"]
)
def test_a_local_path_may_hold_colons(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = os.path.join(tmp_path, os.path.normpath(name))
    assert storage.absolute(name) == path
    storage.write_bytes(name, b"x")
    assert Path(path).read_bytes() == b"x"
    assert storage.read_bytes(name) == b"x"
    assert storage.list_files(name) == [path]
    assert storage.list_dir(os.path.dirname(path)) == [path]


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ("gs:/bucket/x", "write gs://bucket/x, or ./gs:/bucket/x for a local path"),
        ("gs:bucket/x", "write gs://bucket/x"),
        ("gs:///bucket/x", "write gs://bucket/x"),
        ("s3:/bucket", "write s3://bucket"),
        ("https:/host/a.jsonl", "write https://host/a.jsonl"),
        ("gs://", "write gs://BUCKET/PATH"),
        ("memory:/x", "write memory://x"),
        ("foo://x", "Install the fsspec package that serves foo://"),
        ("gcs3://x/y", "did you mean gcs://x/y"),
        ("runs:/x", r"write \./runs:/x for a local path"),
        ("file://host/x", "write file:///host/x"),
        ("file:x", "write file:///x, or the path without file:"),
        ("file://", "is not a local file URI"),
    ],
)
def test_what_looks_like_a_uri_and_is_none_is_refused_before_anything_is_written(wrong, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for act in (storage.absolute, storage.is_remote, storage.list_files, lambda uri: storage.write_bytes(uri, b"x")):
        with pytest.raises(InputError, match=remedy) as refused:
            act(wrong)
        assert str(refused.value).startswith(wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_a_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    user = pwd.getpwuid(os.getuid())
    assert storage.absolute("~/x") == f"{tmp_path}/x"
    assert storage.absolute("~") == str(tmp_path)
    assert storage.absolute(f"~{user.pw_name}/x") == os.path.join(user.pw_dir, "x")
    with pytest.raises(
        InputError, match=r"names the user nobody-of-that-name, who .* write \./~nobody-of-that-name/x for a local"
    ):
        storage.absolute("~nobody-of-that-name/x")
    (tmp_path / "~draft.txt").write_text("x")
    assert storage.absolute("~draft.txt") == f"{tmp_path}/~draft.txt"


def test_a_relative_path_is_taken_from_the_base_that_is_given():
    assert storage.absolute("x/y", "/base") == "/base/x/y"
    assert storage.absolute("x/y", "gs://b/base") == "gs://b/base/x/y"
    for kept in ("/x", "gs://b/x", "embedded://bbc_news"):
        assert storage.absolute(kept, "/base") == kept
    assert storage.absolute("file:/x", "gs://b") == "/x"
    assert [storage.is_relative(path) for path in ("x", "~/x", "/x", "file:/x", "gs://b/x")] == [
        True,
        True,
        *[False] * 3,
    ]


BEGINNINGS = st.sampled_from(
    ["", "gs:", "gs://", "file:/", "file:///", "file://localhost", "memory://", "az:/", "ab:", "~"]
)
PATHS = st.builds(str.__add__, BEGINNINGS, st.text(st.sampled_from("ab1:/.~%2F_- é*["), max_size=12))


@given(PATHS)
def test_an_absolute_path_is_itself_and_a_dot_makes_every_path_local(path):
    assert uri.split(f"/{path}") == ("file", f"/{path}")
    assert uri.split(f"./{path}") == ("file", f"./{path}")


@given(PATHS)
def test_the_absolute_name_keeps_its_meaning(path):
    """Whoever gets it in another process makes it absolute again."""
    try:
        found = storage.absolute(path)
    except InputError:
        return
    assert storage.absolute(found) == found
    assert storage.is_remote(found) == storage.is_remote(path)


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "gs:/b/x"],
        ["pretrain", "--resume", "gs:/b/x"],
        ["sweep", "gs:/b/x"],
        ["report", "gs:/b/x"],
        ["report", "run", "--figure", "gs:/b/x"],
        ["verify", "gs:/b/x"],
        ["watch", "--once", "gs:/b/x"],
        ["doctor", "gs:/b/x"],
        ["embed", "checkpoint", "--input", "a.txt", "--output", "gs:/b/x.npy"],
        ["embed", "checkpoint", "--output", "a.npy", "--input", "gs:/b/x"],
        ["export", "checkpoint", "gs:/b/x"],
        ["import", "gs:/b/x"],
        ["submit", "--directory", "gs:/b/x", "doctor"],
        ["demo", "--directory", "gs:/b/x"],
        ["probe", "run", "gs:/b/x", "--task", "bbc_news"],
        ["probe", "run", "checkpoint", "--task", "ag_news@gs:/b/x"],
        ["probe", "results", "gs:/b/x"],
    ],
)
def test_every_command_refuses_a_mistyped_uri_before_anything_is_written(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_app(words) == 2
    assert capsys.readouterr().err.startswith("error: gs:/b/x")
    assert list(tmp_path.iterdir()) == []


def test_a_submitted_command_s_file_is_found_wherever_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.yaml").write_text("{run: {storage: 'gs://b/runs'}, data: {shards: 'gs://b/shards'}}")
    for file in ("~/a b.yaml", f"file:{tmp_path}/a%20b.yaml", "a b.yaml"):
        assert _metadata(["pretrain", file], str(tmp_path))["raybert.run"] == "gs://b/runs/bert"


def test_what_must_be_local_says_so():
    assert storage.local_path("file:/a%20b", "copy it") == Path("/a b")
    with pytest.raises(InputError, match="gs://b/x is not on this machine; copy it"):
        storage.local_path("gs://b/x", "copy it")
