"""What is written down works: README's snippets run, commands parse, settings exist, links lead somewhere."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer.main

import raybert
from raybert.cli import app, run_app
from raybert.config import Config, all_keys
from raybert.report import trackers
from raybert.sweep.space import SweepConfig
from tests.tasks import WORDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_readme_s_python_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    raybert.save(raybert.Bert(raybert.BertConfig()), "runs/compact/checkpoints/best")
    assert run_app(["export", "runs/compact/checkpoints/best", "my-bert"]) == 0
    names = {}
    snippets = blocks(ROOT / "README.md", "python")
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, names)
        assert names["vectors"].shape == (2, 384)
    assert names["out"]["mlm_logits"].shape == (2, 16, 50_261)


def test_an_export_has_the_same_figure_in_mteb(tmp_path, monkeypatch):
    """The snippet of docs/models.md as it stands there, on pairs in which shared words mean a higher score."""
    pytest.importorskip(
        "mteb", reason="mteb is not installed: it brings 300 MB along, so it is no part of raybert[dev]"
    )
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    words = np.array(" ".join(WORDS.values()).split())
    shared = rng.integers(0, 7, 60)
    pairs = [(rng.choice(words, 6), rng.choice(words, 6)) for _ in shared]
    text1 = [" ".join(first) for first, _ in pairs]
    text2 = [" ".join([*first[:n], *second[n:]]) for n, (first, second) in zip(shared, pairs, strict=True)]
    pq.write_table(pa.table({"text1": text1, "text2": text2, "label": shared.astype(float)}), "stsb_dev.parquet")
    torch.manual_seed(0)
    model = raybert.Bert(raybert.BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2))
    raybert.save(model, "run/checkpoints/best")
    assert run_app(["export", "run/checkpoints/best", "compact-bert"]) == 0
    (snippet,) = [block for block in blocks(ROOT / "docs" / "models.md", "python") if "mteb" in block]
    names = {}
    exec(snippet, names)
    task = {"name": "stsb", "kind": "similarity", "test": "stsb_dev.parquet"}
    ours = raybert.probe.run("compact-bert", task, device="cpu")["mean"]["spearman"]
    assert abs(names["found"].task_results[0].get_score() - ours) < 0.002
    assert abs(ours) > 0.3


def written_commands():
    """Every `raybert ...` line of a block without a language, its continuation on the next line included."""
    for path in PAGES:
        for block in blocks(path, ""):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.partition("| raybert")[2] if "| raybert" in line else line.removeprefix("raybert ")
                if line.startswith("raybert ") or "| raybert" in line:
                    yield pytest.param(shlex.split(command, comments=True), id=f"{path.name}: {line[:60]}")


@pytest.mark.parametrize("words", list(written_commands()))
def test_a_command_that_is_written_down_parses(words):
    group, name = typer.main.get_command(app), words[0]
    command, rest = group.commands[name], words[1:]
    if hasattr(command, "commands"):
        name, command, rest = rest[0], command.commands[rest[0]], rest[1:]
    if "..." in rest:
        return  # shows a part
    try:
        context = command.make_context(name, list(rest))
    except Exception as error:  # typer has an own copy of click, and of its errors
        pytest.fail(str(error))
    settings = dict.fromkeys(("pretrain", "doctor"), all_keys(Config))
    keys = settings | {"sweep": ["base." + key for key in all_keys(Config)] + all_keys(SweepConfig)}
    for override in context.params.get("overrides") or []:
        assert override.partition("=")[0] in keys[name]


def test_the_settings_that_the_pages_name_exist():
    known = set(all_keys(Config))
    sections = "|".join(key for key in known if "." not in key)
    found = {
        key
        for path in PAGES
        for key in re.findall(rf"`'?((?:{sections})\.[a-z_]+)(?:=[^`]*)?`", path.read_text(encoding="utf-8"))
        if not key.endswith((".py", ".yaml", ".parquet", ".csv"))
    }
    assert len(found) > 15
    assert found <= known


def test_the_extras_that_are_asked_for_exist():
    """In pages, the tutorial and sources; an error names a tracker's extra after the tracker."""
    sources = [path for folder in ("raybert", "benchmarks", "jobs") for path in (ROOT / folder).rglob("*.py")]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    known = settings["project"]["optional-dependencies"].keys() | {"{name}"}
    assert set(get_args(trackers.Name)) - {"tensorboard"} <= known
    named = set()
    for path in (*PAGES, *(ROOT / "docs").glob("*.ipynb"), *sources, ROOT / "Makefile", ROOT / "pyproject.toml"):
        for written in re.findall(r"\braybert\[([^\]]+)\]", path.read_text(encoding="utf-8")):
            extras = {extra.strip() for extra in written.split(",")}
            assert extras <= known, f"{path.relative_to(ROOT)} asks for raybert[{written}], which pyproject.toml lacks"
            named |= extras
    assert named >= {"hf", "hub", "mlflow", "wandb"}


def test_links_between_files_lead_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_readme_s_file_tree_names_what_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.partition("## Where things are")[2].partition("```\n")[2].partition("```")[0]
    paths, folder = [], ""
    for line in tree.splitlines():
        head = line.split()[0] if not line.startswith("   " * 4) else ""
        if head and not line.startswith(" "):
            folder = head
            paths.append(head)
        elif head:
            paths += [folder + name for name in line[2:23].replace(",", " ").split()]
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_site_builds_without_a_broken_link(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in (
        "raybert.Bert.embed",
        "raybert.load",
        "raybert.export.directories.export_dir",
        "raybert.config_sections.TrainConfig",
    ):
        assert f'id="{name}"' in reference, name
    assert "global_batch" in reference


def test_make_help_names_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = text.partition(".PHONY: ")[2].splitlines()[0].split()
    done = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True)
    assert sorted(line.split()[1] for line in done.stdout.splitlines()) == sorted(targets)
