"""What the benchmarks of learning make of the curves and figures that they measured."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import curves, levers, record
from raybert.config import load
from raybert.encode import POOLINGS
from raybert.tokenizer import VOCAB_SIZE
from tests.data import make_shards

ROOT = Path(__file__).parents[2]


def point(side, seed, minutes, pooler):
    spent = {"minutes": minutes, "tokens": 1000 * minutes, "flops": 7e9 * minutes}
    return {"side": side, "seed": seed, **spent, "probes": [{"task": "ag_news", "pooler": {"test_accuracy": pooler}}]}


def test_a_side_has_passed_when_its_pooler_has_and_one_that_never_does_has_all_its_minutes():
    points = [point("ours", seed, minutes, score) for seed in (0, 1, 2) for minutes, score in ((0.5, 0.5), (9.0, 0.9))]
    points += [point("ours", seed, 3.0 - seed, 0.82) for seed in (0, 1)]  # the earliest counts, in whatever order
    points += [point("peer", seed, 9.0, 0.9 if seed else record.THRESHOLD) for seed in (0, 1, 2)]
    ours, peer = (record.until_passed(points, side, 30.0) for side in ("ours", "peer"))
    assert ours == {"minutes": 3.0, "tokens": 3000, "flops": 21e9, "every_seed": True}
    assert peer == {"minutes": 9.0, "tokens": None, "flops": None, "every_seed": False}
    none = record.until_passed([point("peer", seed, 1.0, 0.25) for seed in (0, 1)], "peer", 30.0)
    assert none["minutes"] == 30.0


def test_the_picture_is_drawn_from_the_lines_that_are_kept(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.curves", str(tmp_path / "record.png")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "record.png").read_bytes().startswith(b"\x89PNG")


def test_the_sides_of_the_record_take_the_same_steps(tmp_path):
    """Without dropout and in float32, transformers' loop moves the same weights as ours; rates follow the budget."""
    shards = make_shards(str(tmp_path / "shards"))
    changes = [
        "model.size=tiny",
        "model.dropout=0",
        "train.micro_batch=8",
        "train.global_batch=8",
        "train.dtype=float32",
    ]
    config = record.settings(record.ORIGINAL, 0, shards, changes)
    budget = record.Budget("tokens", 700)  # five steps
    sides = [record.make_side("original", config, shards, budget, peer=peer) for peer in (False, True)]
    before, after = [weights(side) for side in sides], []
    assert torch.equal(*before)
    for side in sides:
        side.until(budget.amount)
        after.append(weights(side))
    assert (sides[0].step, sides[0].tokens) == (sides[1].step, sides[1].tokens)
    assert sides[0].step >= 3
    assert sides[0].flops > 0
    assert (after[0] - after[1]).norm() < 1e-4 * (after[0] - before[0]).norm()


def weights(side: record.Side) -> torch.Tensor:
    """All in one vector, without the rows of the token table that no token has."""
    named = side.encoder().module.state_dict()
    named["word_embeddings.weight"] = named["word_embeddings.weight"][:VOCAB_SIZE]
    return torch.cat([value.flatten() for value in named.values()])


def test_the_picture_is_of_one_machine_and_its_longest_runs():
    def line(machine, *marks):
        return {"machine": machine, "result": {"curves": [{"mark": mark, "of": machine} for mark in marks]}}

    lines = [line("a", 0, 30), line("b", 0, 60), line("a", 0, 5, 30), line("a", 15)]
    assert [point["mark"] for point in curves.points_of(lines, "a")] == [0, 30, 0, 5, 30]
    assert [point["mark"] for point in curves.points_of(lines, "a", 15)] == [15]
    assert {point["of"] for point in curves.points_of(lines, "b")} == {"b"}


def test_a_row_differs_from_the_recipe_with_the_same_seed():
    def figures(value):
        return {column: dict.fromkeys(POOLINGS, value) for column in levers.COLUMNS}

    found = {
        levers.RECIPE: {0: figures(0.5), 1: figures(0.7)},
        "bag_weight=0": {0: figures(0.51), 1: figures(0.68)},
    }
    lines = levers.table(found).splitlines()
    assert len(lines) == 4
    assert lines[2].count("0.6000 (0.5000 to 0.7000)") == len(levers.COLUMNS)
    assert lines[3].count("-0.0050 (-0.0200 to +0.0100)") == len(levers.COLUMNS)


@pytest.mark.parametrize("row", levers.ROWS)
def test_every_lever_is_a_setting_that_the_recipe_accepts_and_changes(row):
    recipe = load(str(levers.RECORD), ["data.shards=shards"])
    assert (load(str(levers.RECORD), ["data.shards=shards", *levers.ROWS[row]]) != recipe) == (row != levers.RECIPE)
