"""The page of a run that goes on: it loads itself again, and new results come into it by themselves."""

import time
from pathlib import Path

import pytest

from raybert import storage
from raybert.errors import Interrupted
from raybert.report import follow, live, write_report
from raybert.report.follow import kept_current
from raybert.report.watch import watching
from raybert.storage import lease
from tests.runs import make_run, probe, write_probe

AGAIN = 'http-equiv="refresh"'


def test_only_a_run_that_goes_on_has_a_page_that_loads_itself_again(tmp_path):
    going = Path(write_report(make_run(tmp_path, name="going", steps=400, done=200))).read_text()
    over = Path(write_report(make_run(tmp_path, name="over", steps=400))).read_text()
    assert AGAIN in going
    assert AGAIN not in over
    assert "http://" not in going.replace("http://www.w3.org", "")  # the names of SVG


def test_a_new_probe_comes_into_the_page(tmp_path, monkeypatch):
    run = make_run(tmp_path, steps=800, done=400)
    page = Path(run, "report.html")
    with kept_current(run) as page_news, watching(run, [page_news]):
        write_probe(run, probe("bbc_news", 600, 800))
        end = time.monotonic() + 60
        while not page.exists():
            assert time.monotonic() < end, "no page was written"
            time.sleep(0.1)
        assert ">600</th>" in page.read_text()
        write_probe(run, probe("bbc_news", 800, 800))
    assert ">800</th>" in page.read_text()
    monkeypatch.setattr(follow, "write_report", lambda uri: 1 / 0)
    with kept_current(run) as page_news, watching(run, [page_news]):
        pass  # a page that cannot be drawn is no failure of the run


def test_the_page_is_not_written_again_at_once(monkeypatch):
    written = []
    monkeypatch.setattr(follow, "write_report", written.append)
    page = follow.Page("run")
    page.note({"step": 1, "loss": 1.0})
    page.write_if_due()
    assert not written
    for _ in range(2):
        page.note({"step": 1, "validation": {}})
        page.write_if_due()
    assert len(written) == 1


@pytest.mark.parametrize(("error", "drawn"), [(Interrupted("saved"), True), (KeyboardInterrupt(), False)])
def test_who_interrupts_twice_does_not_wait_for_a_page(tmp_path, error, drawn):
    run = make_run(tmp_path, steps=800, done=400)

    def interrupted():
        with kept_current(run) as page_news, watching(run, [page_news]):
            write_probe(run, probe("bbc_news", 600, 800))  # news that a page would be drawn for
            raise error

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert storage.exists(f"{run}/report.html") is drawn


def test_a_run_that_tells_nothing_is_said_to_do_so(tmp_path):
    run = make_run(tmp_path, steps=400, done=200)
    state = live.State(run)
    with lease.held(run):
        state.refresh()
        assert not state.silence
        state._news -= 86_400
        assert "nothing new for 1440 minutes" in state.silence
        assert not state.left
    state.refresh()
    assert "is not running" in state.left  # which says more
    assert not state.silence
