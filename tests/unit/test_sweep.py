"""The space of a sweep, what became of its trials, and the parabola through their losses."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from raybert.errors import InputError, RunFailed
from raybert.sweep import run as sweeps
from raybert.sweep import space
from raybert.sweep.page import write_summary
from raybert.sweep.rates import best_rates, fit_parabola, sentence
from raybert.sweep.summary import best, note_end, read_sweep, require_none_failed, sentence_of_best, to_json
from raybert.sweep.table import summary_table
from raybert.train.dry_run import Estimate, show_sweep
from tests.data import make_shards
from tests.runs import make_run, probe, score, started, write_probe

BASE = {"train": {"steps": 1000, "global_batch": 32, "micro_batch": 16}, "model": {"size": "tiny"}}


def sweep(tmp_path, **tree):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"storage": str(tmp_path), "space": {"optimizer.lr": {"grid": [1e-3]}}} | tree))
    return space.load(str(path))


def test_trials_are_every_combination_with_directories_of_their_own(tmp_path):
    dimensions = {"model.size": {"grid": ["tiny", "mini"]}, "optimizer.lr": {"log_uniform": [1e-4, 1e-2], "draws": 5}}
    loaded = sweep(tmp_path, space=dimensions, base={"train": {"steps": 200}})
    found = space.trials(loaded)
    assert len(found) == 10
    assert len({trial.config.run_uri for trial in found}) == 10
    rates = [trial.config.optimizer.lr for trial in found[:5]]
    assert rates == sorted(rates)
    assert 1e-4 <= rates[0] <= rates[-1] <= 1e-2
    assert found == space.trials(loaded), "a resumed sweep would have other trials"
    assert {trial.config.model.size for trial in found} == {"tiny", "mini"}
    assert {trial.config.train.steps for trial in found} == {200}


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"spaces": {}}, "Did you mean space"),
        ({"space": {"optimizer.lrr": {"grid": [1]}}}, "Did you mean optimizer.lr"),
        ({"space": {"optimizer.lr": {"log_uniform": [1, 0.1]}}}, "0 < low < high"),
        ({"space": {"optimizer.lr": {}}}, "either grid or log_uniform"),
        ({"base": {"every": {"validation": 0}}}, "base.every.validation"),
        ({"base": {"optimizer": 0.001}}, "optimizer is a plain value"),
        ({"asha": {"grace": 1}}, "asha.grace_fraction"),
        ({"space": None}, "key space is missing"),
    ],
)
def test_a_wrong_sweep_is_a_sentence(tmp_path, tree, sentence):
    with pytest.raises(InputError, match=sentence):
        space.trials(sweep(tmp_path, **tree))


def test_overrides_reach_into_the_space(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("base:\n  train:\nspace:\n  optimizer.lr:\n    log_uniform: [1e-4, 1e-2]\n")

    def loaded(*overrides):
        return [dict(trial.point) for trial in space.trials(space.load(str(path), overrides))]

    assert len(loaded("space.optimizer.lr.draws=3")) == 3
    assert loaded("space.optimizer.lr={grid: [1e-3, 2e-3]}") == [{"optimizer.lr": 0.001}, {"optimizer.lr": 0.002}]
    varied = ["space.optimizer.lr.draws=1", "space.model.size.grid=[tiny, mini]", "base.schedule.warmup_steps=0.1"]
    assert [point["model.size"] for point in loaded(*varied)] == ["tiny", "mini"]
    steps = loaded("space.optimizer.lr.draws=1", "space.train.steps.grid=[1e3, 2000]")
    assert [point["train.steps"] for point in steps] == [1000, 2000]
    for override, said in (
        ("space.optimizer.lr.drwas=3", "Did you mean space.optimizer.lr.draws"),
        ("space.optimizer.lrr.grid=[1]", "Did you mean optimizer.lr"),
        ("space.optimizer.lr.draws=0", "space.optimizer.lr.draws=0"),
    ):
        with pytest.raises(InputError, match=said):
            loaded(override)


@pytest.mark.parametrize(
    ("key", "grid"),
    [
        ("optimizer.lr", "[0.001, 1e-3]"),
        ("optimizer.lr", "[1, 2, 1.0]"),
        ("train.steps", "[1_000, 2000, 1e3]"),
        ("model.size", "[tiny, mini, 'tiny']"),
        ("data.shards", "[s, ./s]"),
        ("data.shards", "[2024, '2024']"),
    ],
)
def test_a_value_that_occurs_twice_in_whatever_spelling_is_refused(tmp_path, key, grid):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"space:\n  train.seed: {{grid: [0, 1]}}\n  {key}: {{grid: {grid}}}\n")
    with pytest.raises(InputError, match=rf"of space\.{key} give the same trial; remove one of them"):
        space.trials(space.load(str(path)))


def test_draws_that_are_the_same_number_are_refused(tmp_path):
    narrow = {"optimizer.lr": {"log_uniform": [1e-3, 1.0001e-3], "draws": 30}}
    with pytest.raises(InputError, match=r"0\.001 and 0\.001 of space\.optimizer\.lr .* lower draws"):
        space.trials(sweep(tmp_path, space=narrow))


def test_texts_of_a_sweep_are_what_their_settings_ask_for(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"name: 2024\nstorage: {tmp_path}\nbase: {{data: {{shards: /2024-01-01}}, train: {{steps: 1e3}}}}\n"
        "space:\n  optimizer.lr: {grid: [1e-3]}\n  probe.tasks: {grid: [[1e3]]}\n"
    )
    (trial,) = space.trials(space.load(str(path)))
    assert trial.config.run_uri == str(tmp_path / "2024" / "trials" / "trial-0000")
    assert (trial.config.data.shards, trial.config.train.steps) == ("/2024-01-01", 1000)
    assert trial.point == {"optimizer.lr": 0.001, "probe.tasks": ["1e3"]}


def test_a_setting_that_is_younger_than_a_sweep_does_not_keep_it_from_going_on(tmp_path):
    begun = sweep(tmp_path)
    now = sweeps._describe(begun, space.trials(begun))
    before = {key: value for key, value in now.items() if key not in ("base.model.attention_init", "metric")}
    assert before != now
    sweeps._require_same(begun, before, now)
    sweeps._require_same(
        begun, before | {"base.probe.tasks": ["neighbours"]}, now
    )  # the default, as it was once written
    with pytest.raises(InputError, match=r"started with base.model.attention_init=normal .* resumed with average"):
        sweeps._require_same(begun, before, now | {"base.model.attention_init": "average"})
    with pytest.raises(InputError, match=r"started with metric=validation_loss .* resumed with sts.spearman"):
        sweeps._require_same(begun, before, now | {"metric": "sts.spearman"})


@given(best=st.floats(-7, -5), bend=st.floats(0.05, 2), count=st.integers(4, 8))
def test_the_minimum_of_an_exact_parabola_is_found(best, bend, count):
    rates = np.exp(np.linspace(-8, -4, count))
    losses = 7 + bend * (np.log(rates) - best) ** 2
    fitted, interval, remark = fit_parabola(rates.tolist(), losses.tolist())
    assert math.log(fitted) == pytest.approx(best, abs=1e-4)
    assert interval[0] <= fitted * 1.001
    assert interval[1] >= fitted * 0.999
    assert remark == ""


def test_the_interval_holds_the_true_minimum_as_often_as_it_says():
    rng = np.random.default_rng(0)
    rates, inside = np.exp(np.linspace(-8, -4, 6)), 0
    for _ in range(300):
        losses = 7 + 0.3 * (np.log(rates) + 6) ** 2 + rng.normal(0, 0.02, 6)
        _, interval, _ = fit_parabola(rates.tolist(), losses.tolist())
        inside += interval[0] <= math.exp(-6) <= interval[1]
    assert 0.90 < inside / 300 < 0.99


@pytest.mark.parametrize(
    ("losses", "remark"), [([3, 2, 1, 0.5], "widen the range"), ([1, 2, 2, 1], "no minimum"), ([1, 2], "three rates")]
)
def test_where_there_is_no_minimum_none_is_given(losses, remark):
    rates = [1e-4, 1e-3, 1e-2, 1e-1][: len(losses)]
    fitted, interval, said = fit_parabola(rates, losses)
    assert fitted is None
    assert interval is None
    assert remark in said


def shown(renderable):
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - nothing is written to it
    console.print(renderable)
    return console.export_text()


def ended(sweep):
    """Six trials, each of which ended in its own way; the seventh has not begun."""
    ends = [trial.config.run_uri for trial in space.trials(sweep)]
    for number, done in enumerate((1000, 400, 300, 600, 0, 500)):
        directory = Path(ends[number]).parent
        make_run(directory, name=f"trial-{number:04d}", steps=1000, done=done, seed=number)
    note_end(ends[1], "pruned")
    failure = {"step": 300, "reason": "The loss is 99.", "kind": "diverged"}
    Path(ends[2], "failure.json").write_text(json.dumps(failure))
    Path(ends[3], "failure.json").write_text(json.dumps(failure | {"reason": "The data are gone.", "kind": "data"}))
    note_end(ends[4], "failed", "The worker died.")
    return read_sweep(sweep)


RATES = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1]


def test_every_end_of_a_trial_has_its_name(tmp_path):
    outcomes = ended(sweep(tmp_path, base=BASE, space={"optimizer.lr": {"grid": RATES}}))
    found = [outcome.status for outcome in outcomes]
    assert found == ["finished", "pruned", "diverged", "failed", "failed", "interrupted", "not started"]
    with pytest.raises(RunFailed, match=r"2 of 7 trials failed: trial-0003: The data are gone; trial-0004: The worker"):
        require_none_failed(outcomes)
    require_none_failed(outcomes[:3])
    assert best("validation_loss", outcomes).name == "trial-0000"


def test_a_trial_s_gain_over_its_start_tuned_figures_and_collapsed_vectors_are_shown(tmp_path):
    loaded = sweep(tmp_path, base=BASE, space={"optimizer.lr": {"grid": RATES}})
    ended(loaded)
    first, second = (trial.config.run_uri for trial in space.trials(loaded)[:2])
    result = started(probe("bbc_news", 1000, 1000), gain=0.031)
    write_probe(first, result)
    plain = probe("bbc_news", 1000, 1000)
    collapsed = "The vectors have collapsed: all texts lie along one line"
    write_probe(second, plain | {"mean": plain["mean"] | {"collapsed": collapsed}})
    outcomes = read_sweep(loaded)
    told = f"trial-0001, mean: {collapsed}"
    for text in (shown(summary_table(loaded, outcomes)), Path(write_summary(loaded, outcomes)).read_text()):
        assert "+3.1 [2.1, 4.1]" in text
        assert told in " ".join(text.split())
        assert text.count(collapsed) == 1
    written, other = (of["probes"]["bbc_news"] for of in to_json(outcomes)[:2])
    assert written["beyond_start"]["pooler"] == {"difference": 0.031, "interval": pytest.approx([0.021, 0.041])}
    assert written["mean"]["tuned_c"] == result["mean"]["tuned_c"]
    assert written["mean"]["tuned_accuracy"] == result["mean"]["tuned_accuracy"]
    assert written["start"]["mean"]["tuned_accuracy"] == 0.777
    assert other["mean"]["collapsed"] == collapsed
    assert "collapsed" not in written["mean"]
    assert "beyond_start" not in other


def test_the_best_trial_is_best_by_the_metric_that_the_sweep_names(tmp_path):
    loaded = sweep(tmp_path, base=BASE, space={"optimizer.lr": {"grid": RATES}}, metric="bbc_news.cls.test_accuracy")
    outcomes = ended(loaded)
    second = space.trials(loaded)[1].config.run_uri
    Path(second, "outcome.json").unlink()  # as if it had come to its end, with a higher loss and better vectors
    lines = Path(second, "metrics.jsonl").read_text() + json.dumps({"step": 1000, "validation": {"loss": 9.0}}) + "\n"
    Path(second, "metrics.jsonl").write_text(lines)
    write_probe(second, probe("bbc_news", 1000, 1000) | {"cls": score(0.9)})
    outcomes = read_sweep(loaded)
    assert [outcome.status for outcome in outcomes[:2]] == ["finished", "finished"]
    assert best("validation_loss", outcomes).name == "trial-0000"
    assert best(loaded.metric, outcomes).name == "trial-0001"
    assert best("bbc_news.pooler.spearman", outcomes) is None
    without = [replace(outcome, steps=outcome.steps + 1) for outcome in outcomes]  # their last probe is of before
    assert best(loaded.metric, without) is None
    assert "No finished trial has bbc_news.cls.test_accuracy" in sentence_of_best(loaded.metric, without)
    told = "Best finished trial: trial-0001 with bbc_news.cls.test_accuracy 0.9000"
    text = shown(summary_table(loaded, outcomes))
    assert told in " ".join(text.split())
    assert text.index("trial-0001") < text.index("trial-0000")
    assert told in Path(write_summary(loaded, outcomes)).read_text()
    assert yaml.safe_load((tmp_path / "sweep" / "winner.yaml").read_text())["optimizer"]["lr"] == RATES[1]
    # The word that stops a trial may come after its last step.
    note_end(second, "pruned")
    assert read_sweep(loaded)[1].status == "finished"


def test_a_metric_that_no_probe_of_the_trials_measures_is_a_sentence_before_ray_starts(tmp_path):
    shards = make_shards(str(tmp_path / "shards")).uri
    base = {**BASE, "data": {"shards": shards}, "probe": {"tasks": ["bbc_news"]}}
    loaded = sweep(tmp_path, base=base, metric="bbc_news.test_accuracy")
    sweeps.check_data(loaded, space.trials(loaded))
    for metric, tasks in (("bbc_news.spearman", ["bbc_news"]), ("bbc_news.test_accuracy", [])):
        wrong = sweep(tmp_path, base={**base, "probe": {"tasks": tasks}}, metric=metric)
        with pytest.raises(InputError, match=rf"metric={metric} is not a metric of this run"):
            sweeps.check_data(wrong, space.trials(wrong))


def test_only_trials_that_ended_well_after_a_first_step_say_which_rate_is_best(tmp_path):
    loaded = sweep(tmp_path, base=BASE, space={"optimizer.lr": {"grid": RATES}})
    outcomes = ended(loaded)
    (rate,) = best_rates(outcomes)
    assert [lr for lr, _ in rate.points] == [0.0001, 0.0003], "a failed, interrupted or untrained trial was compared"
    assert rate.tokens == 400 * 32 * 128
    assert rate.measured == 0.0001
    assert "5 of 7 trials are not compared" in sentence(rate)
    (nothing,) = best_rates(outcomes[2:])
    assert nothing.measured is None
    assert "no trial has a validation loss" in sentence(nothing)
    write_summary(loaded, outcomes[2:])
    assert not (tmp_path / "sweep" / "winner.yaml").exists()


def test_a_probe_is_shown_with_its_step_its_interval_and_all_baselines(tmp_path):
    loaded = sweep(tmp_path, base=BASE, space={"optimizer.lr": {"grid": RATES}})
    outcomes = ended(loaded)
    text = shown(summary_table(loaded, outcomes))
    page = Path(write_summary(loaded, outcomes)).read_text()
    probe = outcomes[0].probes["bbc_news"]
    assert probe.step == 1000
    saved = json.loads((tmp_path / "sweep" / "summary.json").read_text())[0]["probes"]["bbc_news"]
    assert saved["tfidf"]["test_accuracy"] > 0.5
    assert saved["bm25"] is None  # what a record does not have has its key
    for place, parts in (
        (text, ("1,000", "untrained", "majority", "TF-IDF", "96.2", "68.4")),
        (page, ("1,000", "untrained", "majority class", "TF-IDF", "96.2 % [", "68.4 % [", str(probe.scores["mean"]))),
    ):
        for part in parts:
            assert part in place, part
    for part in ("trial-0003 failed: The data are gone.", "trial-0002 diverged: The loss is 99."):
        assert part in text
        assert part.partition(": ")[2] in page


def test_a_sweep_of_hundreds_of_trials_has_a_page_that_can_be_read(tmp_path):
    """In a process of its own, for its peak of memory."""
    tree = {"storage": str(tmp_path), "base": BASE}
    tree["space"] = {
        "model.size": {"grid": ["tiny", "mini"]},
        "optimizer.lr": {"log_uniform": [1e-4, 1e-2], "draws": 100},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    for trial in space.trials(space.load(str(path))):
        make_run(Path(trial.config.run_uri).parent, name=trial.name, steps=1000, log_every=100, probe_every=1000)
    code = (
        "import re, sys; from raybert.sweep import page, space, summary\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "sweep = space.load(sys.argv[1]); before = peak()\n"
        "page.write_summary(sweep, summary.read_sweep(sweep)); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300 * 1024  # KiB
    pages = list((tmp_path / "sweep").glob("*.png"))
    assert {page.stem for page in pages} == {"loss_lr", "best_lr", "loss_tokens", "loss_flops"}
    for page in pages:
        width, height = np.frombuffer(page.read_bytes()[16:24], ">u4")
        assert max(width, height) < 2000


def test_a_dry_run_s_table_fits_a_terminal():
    estimate = Estimate(
        parameters=16_250_000,
        tokens=409_600,
        flops=1.3e13,
        accumulation=1,
        peak_bytes=1_020_000_000,
        state_bytes=195_000_000,
        checkpoint_bytes=195_000_000,
        seconds=80.0,
        device="CPU, 2 threads",
        dtype="float32",
    )
    rows = [(f"trial-{i:04d}", {"model.size": "mini", "optimizer.lr": 0.0003}, estimate) for i in range(3)]
    console = Console(record=True, width=80)
    console.print(show_sweep({"name": "x"}, rows, 2))
    lines = console.export_text().splitlines()
    assert sum("mini" in line for line in lines) == 3
    (line,) = (line for line in lines if "0002" in line)
    assert " ".join(line.split()) == "0002 mini 0.0003 16.2 M 410 k 1.3e+13 1.02 GB 195 MB 1:20"
    assert "2:00 if none" in " ".join(lines)
