"""The page of a run that goes on: it loads itself again, and new results come into it by themselves."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from raybert import storage
from raybert.errors import Interrupted
from raybert.report import follow, live
from raybert.report.figure import learning_figure
from raybert.report.follow import kept_current
from raybert.report.overview import overview
from raybert.report.page import render, write_report
from raybert.report.read import read_run
from raybert.report.terminal import closing_table
from raybert.report.watch import watching
from raybert.storage import lease
from tests.runs import make_run, probe, started, tuned, write_probe
from tests.waiting import wait_for

AGAIN = 'http-equiv="refresh"'


def test_only_a_run_that_goes_on_has_a_page_that_loads_itself_again(tmp_path):
    going = Path(write_report(make_run(tmp_path, name="going", steps=400, done=200))).read_text()
    over = Path(write_report(make_run(tmp_path, name="over", steps=400))).read_text()
    assert AGAIN in going
    assert AGAIN not in over
    assert "http://" not in going.replace("http://www.w3.org", "")  # the names of SVG


def test_tuned_figures_and_a_collapse_are_on_the_page_and_in_the_table(tmp_path):
    run = make_run(tmp_path, steps=400)
    before = Path(write_report(run)).read_text()
    for said in (">tuned<", "Deviation over texts", "have collapsed"):
        assert said not in before, "the page of a run that has no such figures"
    last = tuned(probe("bbc_news", 400, 400))
    last["cls"]["collapsed"] = "The vectors have collapsed: all texts lie along one line."
    write_probe(run, last)
    page = Path(write_report(run)).read_text()
    for said in (
        '<th scope="col">tuned</th>',
        "59.0 % <small>C 0.1</small>",  # of the pooler
        "24.2 % <small>C 0.1</small>",  # of the untrained one
        "98.2 % <small>C 0.1</small>",  # of TF-IDF
        "C chosen from 0.001 to 100 on 340 held-out training texts",
        "Deviation over texts and effective rank of the vectors: pooler 0.08 and 42",
        "Step 400, cls: The vectors have collapsed: all texts lie along one line.",
    ):
        assert said in page, said
    console = Console(record=True, width=80)
    console.print(closing_table(run))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for said in ("C tuned", "59.0 C 0.1", "24.2 C 0.1", "98.2 C 0.1", "cls: The vectors have collapsed"):
        assert said in text, said


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (
            0.05,
            "step 400 improves on the start in pooler (pooler +5.0 points [+4.0, +6.0], cls +0.0 points [-1.0, +1.0]",
        ),
        (0.0, "step 400 does not differ significantly from the start (pooler +0.0 points [-1.0, +1.0]"),
        (-0.03, "step 400 falls below the start in pooler (pooler -3.0 points [-4.0, -2.0]"),
    ],
)
def test_the_first_line_says_what_training_added_beyond_the_start(tmp_path, gain, verdict):
    run = make_run(tmp_path, steps=400, probe_every=400)
    first = tuned(probe("bbc_news", 0, 400))
    first["pooler"]["test_accuracy"] = 0.99  # the best of all results, and yet no result of training
    write_probe(run, first)
    last = started(probe("bbc_news", 400, 400), gain=gain)
    last["cls"]["tuned_c"] = last["baselines"]["start"]["cls"]["tuned_c"]
    write_probe(run, last)
    page = Path(write_report(run)).read_text()
    said = page.partition('<p class="outcome">')[2].partition("</p>")[0]
    assert said.startswith(f"On bbc_news, {verdict}")
    assert "with C tuned, it does not differ significantly from the start (pooler +0.0 points" in said
    assert "pooler +0.0 points [-1.0, +1.0] with C = 0.1, the start&#39;s 10, cls +0.0 points [-1.0, +1.0]" in said
    assert "best of 3 probe results on bbc_news: mean 74.0 % [" in said
    assert "start 74.0 % [" in said
    assert '<th scope="row">start</th>' in page
    assert "77.7 % <small>C 10</small>" in page
    assert f"Step 400 compared with the run&#39;s start, text by text: pooler {100 * gain:+.1f} points" in page
    assert 'class="dashdot"' in page
    assert "start pooler" in page
    assert "[CLS], 95 % interval" in page
    console = Console(record=True, width=80)
    console.print(closing_table(run))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "77.7 C 10" in text
    assert verdict[:40] in " ".join(text.split())
    assert len([line for line in text.splitlines() if line.split()[:1] == ["start"]]) == 2
    assert learning_figure(read_run(run)).startswith(b"\x89PNG")


def test_a_run_that_began_like_the_untrained_encoder_and_one_without_a_start(tmp_path):
    run = make_run(tmp_path, steps=400)
    plain = Path(write_report(run)).read_text()
    assert "start" not in plain.partition('<p class="outcome">')[2].partition("</p>")[0]
    assert '<th scope="row">start</th>' not in plain
    same = started(probe("bbc_news", 400, 400))
    same["baselines"]["start"] = same["baselines"]["untrained"]
    write_probe(run, same)
    page = Path(write_report(run)).read_text()
    assert '<th scope="row">start</th>' in page
    assert 'class="dashdot"' not in page, "a line over a line"
    lost = tuned(probe("bbc_news", 400, 400))
    lost["baselines"]["start"] = {"absent": "more waited"}
    write_probe(run, lost)
    assert (
        '<p class="outcome">Gain over the start on bbc_news unknown: the start has no result (more waited); 400 of'
        in Path(write_report(run)).read_text()
    )


def test_before_its_first_result_a_run_tells_of_its_start(tmp_path):
    run = make_run(tmp_path, steps=400, done=100)
    write_probe(run, tuned(probe("bbc_news", 0, 400)))
    page = Path(write_report(run)).read_text()
    assert "no probe result yet except the start&#39;s." in page
    console = Console(record=True, width=80)
    console.print(closing_table(run, last=6))
    assert "C tuned" in console.export_text()


def test_the_board_stays_as_long_with_tuned_figures(tmp_path):
    def lines(last):
        console = Console(record=True, width=80)
        console.print(closing_table(run, last=last))
        return len(console.export_text().splitlines())

    run = make_run(tmp_path, steps=2000)
    before = lines(6)
    write_probe(run, started(probe("bbc_news", 2000, 2000)))
    assert lines(6) <= before + 2  # the start, and what parts the tuned figures from the others


def test_a_contrast_stands_beside_chance(tmp_path):
    run = make_run(tmp_path, steps=400, probe_every=0)  # of 16 pairs in a micro-batch
    log = Path(run, "metrics.jsonl")
    for step, loss, right in ((10, 2.7, 0.1), (20, 2.5, 0.2)):
        with log.open("a") as file:
            file.write(json.dumps({"step": step, "contrast_loss": loss, "contrast_accuracy": right}) + "\n")
    page = Path(write_report(run)).read_text()
    assert "chance: ln 16" in page
    assert "chance: 6.25 %" in page
    assert "chance: ln 2" in page, "of the next-sentence loss"


def test_a_new_probe_comes_into_the_page(tmp_path, monkeypatch):
    run = make_run(tmp_path, steps=800, done=400)
    page = Path(run, "report.html")
    with kept_current(run) as page_news, watching(run, [page_news]):
        write_probe(run, probe("bbc_news", 600, 800))
        wait_for("the page", page.exists)
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
        assert "no progress for 1440 minutes" in state.silence
        assert not state.left
    state.refresh()
    assert "is not running" in state.left  # which says more
    assert not state.silence


def test_a_run_with_tasks_of_other_kinds_is_shown_by_every_reader(tmp_path):
    run = make_run(tmp_path, steps=400, tasks=("bbc_news", "alike", "neighbours"))
    for task, kind, headline in (("alike", "similarity", "spearman"), ("neighbours", "neighbours", "mrr_at_10")):
        for step in (200, 400):
            entry = {headline: 0.4 + step / 4000, "interval": [0.3, 0.6]}
            result = {"step": step, "task": task, "kind": kind, "n_test": 500, "n_documents": 480}
            result |= {
                "pooler": entry,
                "mean": entry,
                "baselines": {"untrained": {"mean": entry}, "tfidf": {headline: 0.3}},
            }
            write_probe(run, result)
    config = Path(run) / "config.yaml"
    config.write_text(config.read_text() + "  suite: {name: ours, tasks: [alike, neighbours]}\n")
    assert [(row.name, row.first, row.best, row.last) for row in overview(read_run(run))][1:] == [
        ("alike, Spearman x 100", "45.0", "50.0", "50.0"),
        ("neighbours, MRR@10 x 100", "45.0", "50.0", "50.0"),
        ("ours: mean of alike, neighbours", "45.0", "50.0", "50.0"),
    ]
    write_probe(run, {"step": 200, "task": "new", "kind": "of tomorrow", "mean": {"x": 1}})
    page = render(read_run(run))
    for part in (
        "Spearman x 100 by step",
        "MRR@10 x 100",
        "50.0 [30.0, 60.0]",
        "this version does not know the kind of tomorrow",
    ):
        assert part in page
    table = Console(width=80, record=True, file=io.StringIO())
    table.print(closing_table(run))
    text = table.export_text()
    for part in ("alike", "neighbours", "bbc_news", "50.0 30.0–60.0", "first halves of 500 validation spans"):
        assert part in text
    assert learning_figure(read_run(run))


def test_a_run_whose_probe_never_said_which_weights_are_the_best_says_so(tmp_path):
    def told(name, **options):
        run = make_run(tmp_path, name=name, steps=400, **options)
        config = Path(run) / "config.yaml"
        config.write_text(config.read_text().replace("best: validation_loss", "best: bbc_news.cls.test_accuracy"))
        return run

    def sentence(run):
        console = Console(record=True, width=400, file=io.StringIO())
        console.print(closing_table(run))
        found = read_run(run).no_best
        assert not found or found in render(read_run(run))
        assert not found or found in " ".join(console.export_text().split())
        return found

    assert sentence(told("found")) == ""
    lost = told("lost", probe_every=400)
    reason = "RunFailed: The budget was over; raise it."
    write_probe(lost, {"step": 0, "task": "bbc_news", "status": "failed", "reason": "the start is no checkpoint"})
    write_probe(lost, {"step": 400, "task": "bbc_news", "status": "failed", "reason": reason})
    assert sentence(lost) == (
        "No checkpoint has a value for bbc_news.cls.test_accuracy, so none is marked best: bbc_news failed at step 400 "
        "(RunFailed: The budget was over; raise it)."
    )
    ended = told("ended", done=100)
    assert sentence(ended) == "", "it goes on"
    storage.write_json(f"{ended}/failure.json", {"step": 100, "reason": "The loss diverged.", "kind": "diverged"})
    assert sentence(ended).endswith("so none is marked best: the run ended at step 100 of 400.")
