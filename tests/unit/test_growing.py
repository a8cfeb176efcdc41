"""A file that grows: the same lines at any URI, whatever is flushed, closed, reopened or failed in between."""

import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert import storage
from raybert.storage.growing import GrowingFile

LINES = st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=8), max_size=3)


@given(actions=st.lists(LINES | st.sampled_from(["flush", "reopen"]), max_size=12), remote=st.booleans())
def test_all_lines_are_there_in_their_order(tmp_path_factory, actions, remote):
    uri = f"memory://growing/{uuid.uuid4().hex}" if remote else f"{tmp_path_factory.mktemp('growing')}/log.jsonl"
    file, expected = GrowingFile(uri), ""
    for action in actions:
        if action == "flush":
            file.flush()
            assert storage.read_from(uri, 0).decode() == expected
        elif action == "reopen":
            file.close()
            file = GrowingFile(uri)
        else:
            file.append(action)
            expected += "".join(f"{line}\n" for line in action)
            if not remote:
                assert Path(uri).read_bytes().decode() == expected
    file.close()
    file.flush()  # by another thread, too late
    assert storage.read_from(uri, 0).decode() == expected


def test_half_a_line_of_a_killed_process_goes(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"one\ntw")
    GrowingFile(str(path)).append(["two"])
    assert path.read_bytes() == b"one\ntwo\n"


def test_an_upload_that_fails_is_done_again(monkeypatch):
    uri = f"memory://growing/{uuid.uuid4().hex}"
    file = GrowingFile(uri)
    file.append(["one"])

    def away(*_):
        raise ConnectionError("down")

    for upload in (file.flush, file.close):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", away)
            with pytest.raises(ConnectionError):
                upload()
    file.append(["two"])
    file.close()
    assert storage.read_bytes(uri) == b"one\ntwo\n"
