"""The command line as a person meets it: help that fits a screen, examples, completion, a live view."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from raybert.cli import app, run_app
from raybert.report import live
from raybert.report.live import sparkline
from raybert.storage import lease
from raybert.sweep.summary import note_end
from tests.runs import make_run


def commands(group, prefix=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name)


ALL = list(commands(typer.main.get_command(app)))


@pytest.fixture
def small_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")


def test_the_help_fits_a_screen_and_names_every_command(small_screen, capsys):
    assert run_app(["--help"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 24
    assert max(map(len, said.splitlines())) <= 80
    assert "..." not in said.partition("Commands:")[2], "a command's line is cut off"
    for words in ALL:
        assert f"\n  {words[0]} " in said


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_each_command_s_help_has_an_example(words, capsys):
    assert run_app([*words, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Example:" in said
    assert f"raybert {' '.join(words)}" in said.partition("Example:")[2]


def test_the_shell_completes_settings():
    environment = {"_RAYBERT_COMPLETE": "complete_bash", "COMP_WORDS": "raybert pretrain a.yaml optimizer.we"}
    code = "import sys; sys.argv[0] = 'raybert'; from raybert.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"COMP_CWORD": "3"}, capture_output=True, text=True
    )
    assert "optimizer.weight_decay=" in found.stdout.split()


def test_watch_shows_a_run_that_goes_on_and_one_that_is_over(tmp_path, capsys, small_screen):
    going = make_run(tmp_path, name="going", steps=1000, done=600)
    assert run_app(["watch", going, "--once"]) == 0
    said = capsys.readouterr().out
    for part in ("step 600 of 1,000", "0:40 left", "tokens/s", "waiting for", "untrained", "TF-IDF", "▇"):
        assert part in said, part
    over = make_run(tmp_path, name="over", steps=400, done=400)
    assert run_app(["watch", over]) == 0  # no terminal: a line a record, then the table
    said = capsys.readouterr().out
    assert said.count("step ") >= 40
    assert "over: 400 of 400 steps" in said


def test_watch_tells_of_a_failed_run(tmp_path, capsys):
    run = make_run(tmp_path, steps=1000, done=100)
    Path(run, "failure.json").write_text(json.dumps({"step": 100, "reason": "The loss is nan.", "kind": "diverged"}))
    assert run_app(["watch", run]) == 1
    assert "The loss is nan." in capsys.readouterr().err
    assert run_app(["watch", str(tmp_path)]) == 2


def test_watch_ends_with_a_run_that_nobody_drives(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(live, "GRACE", 0.0)
    run = make_run(tmp_path, steps=1000, done=100)
    with lease.held(run):
        assert run_app(["watch", run, "--once"]) == 0
    assert "not running" not in capsys.readouterr().out
    assert run_app(["watch", run]) == 1  # killed, or stopped by a signal
    assert (
        "is not running: it stopped at step 100 of 1,000; rerun the same command to resume" in capsys.readouterr().err
    )
    assert run_app(["watch", run, "--once"]) == 0
    assert "is not running" in " ".join(capsys.readouterr().out.split())
    note_end(run, "pruned", "rung 1")
    assert run_app(["watch", run]) == 1
    assert "stopped at step 100 of 1,000, pruned by its sweep" in capsys.readouterr().err


def test_watch_waits_for_a_run_whose_job_is_tried_again(tmp_path):
    run = make_run(tmp_path, steps=1000, done=100)
    state = live.State(run)
    state.refresh()
    assert state.left
    assert not state.over
    with lease.held(run):
        state.refresh()
        assert not state.left


def test_a_curve_in_characters():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0], 8) == "▁▁"
    assert len(sparkline(range(1000), 20)) == 20
