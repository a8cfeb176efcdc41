"""What is refused before a run or a sweep begins, and before Ray is started."""

from dataclasses import replace

import pytest
import yaml

from raybert import cluster
from raybert.cli import run_app
from raybert.config import from_mapping
from raybert.data.text.prepare import describe
from raybert.errors import InputError
from raybert.train.check import check_inputs, task_specs
from tests.data import make_shards
from tests.tasks import make_task

COUNTS = {"read": 1, "bad_dropped": {}, "too_short_dropped": 0, "copies_dropped": 0}


def settings(folder, shards, **every):
    tree = {"run": {"storage": str(folder / "runs")}, "data": {"shards": shards.uri}, "model": {"size": "tiny"}}
    return tree | {"every": every}


@pytest.fixture
def no_ray(monkeypatch):
    """Whoever reaches for Ray fails."""
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was reached for"))


@pytest.fixture
def unvalidated(tmp_path):
    """A shard set whose few documents all went to training."""
    return make_shards(str(tmp_path / "shards"), validation=0)


def test_prepare_says_how_many_validation_windows_there_are(unvalidated):
    counted = replace(unvalidated, counts={"documents": COUNTS})
    first, *more = describe(counted)
    assert "600 train and 0 validation windows" in first
    (said,) = more
    for part in ("--validation-fraction 0.01", "add documents", "raise the fraction", "every.validation=0"):
        assert part in said
    (first,) = describe(replace(counted, settings={"validation_fraction": 0}))
    assert "0 validation windows" in first


def test_shards_without_validation_windows_are_refused_where_they_are_asked_for(tmp_path, unvalidated, capsys, no_ray):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, unvalidated, validation=2)))
    for options in ([], ["--dry-run"]):
        assert run_app(["pretrain", str(path), *options]) == 2
        said = " ".join(capsys.readouterr().err.split())
        for part in ("no validation windows", "set every.validation=0", "more documents", "--validation-fraction"):
            assert part in said
    check_inputs(from_mapping(settings(tmp_path, unvalidated, validation=0)))
    wanted = make_shards(str(tmp_path / "wanted"), validation=0, fraction=0)
    check_inputs(from_mapping(settings(tmp_path, wanted, validation=2)))
    check_inputs(from_mapping(settings(tmp_path, make_shards(str(tmp_path / "few"), validation=1), validation=2)))


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        ({"validation": 0}, "has no validation windows; prepare again"),
        ({"validation": 0, "fraction": 0}, "has no validation windows; prepare again"),
        ({"seq_len": 1024, "rows": 20}, "512 positions"),
        (None, "is not a shard set"),
    ],
)
def test_a_sweep_looks_at_its_shards_before_ray_is_started(tmp_path, capsys, no_ray, made, sentence):
    shards = f"{tmp_path}/shards"
    if made is not None:
        make_shards(shards, **made)
    path = tmp_path / "s.yaml"
    tree = {"storage": str(tmp_path), "base": {"data": {"shards": shards}}, "space": {"optimizer.lr": {"grid": [0.1]}}}
    path.write_text(yaml.safe_dump(tree))
    for options in ([], ["--dry-run"]):
        assert run_app(["sweep", str(path), *options]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("task", ["hf", "/nowhere/task.yaml", "no_such_task", "ag_news@/nowhere"])
def test_a_task_that_is_never_probed_is_not_loaded(tmp_path, task):
    shards = make_shards(str(tmp_path / "shards"))
    if task == "hf":  # columns of which would have to be fetched
        made = yaml.safe_load(open(make_task(tmp_path)))  # noqa: SIM115
        task = str(tmp_path / "far.yaml")
        (tmp_path / "far.yaml").write_text(yaml.safe_dump(made | {"train": "hf://datasets/none/at.all/train.parquet"}))
    tree = settings(tmp_path, shards, probe=0) | {"probe": {"tasks": [task]}}
    assert check_inputs(from_mapping(tree)).tasks == []
    with pytest.raises(InputError):
        check_inputs(from_mapping(tree | {"every": {"probe": 5}}))


def test_a_run_of_before_goes_on_with_the_settings_it_noted(tmp_path, unvalidated):
    """Its config.yaml is read by the same rule: a name that looks like a number, a warm-up in steps."""
    tree = settings(tmp_path, unvalidated, validation=0)
    tree["run"]["name"] = "1e3"
    config = from_mapping(tree)
    run = tmp_path / "runs" / "1e3"
    run.mkdir(parents=True)
    about = {"about": {"manifest": unvalidated.manifest_hash}}
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json") | about, sort_keys=False))
    assert "name: 1e3" in (run / "config.yaml").read_text()
    check_inputs(config)
    with pytest.raises(InputError, match=r"was started with data.seed=0 and cannot be resumed with 1"):
        check_inputs(from_mapping(tree | {"data": tree["data"] | {"seed": 1}}))


def test_a_run_that_names_no_task_is_probed_with_its_own_validation_text(tmp_path, capsys):
    shards = make_shards(str(tmp_path / "shards"), validation=200)
    (task,) = check_inputs(from_mapping(settings(tmp_path, shards, probe=5))).tasks
    assert (task.kind, task.name, task.shards) == ("neighbours", "neighbours", shards.uri)
    assert not check_inputs(from_mapping(settings(tmp_path, shards, probe=5) | {"probe": {"tasks": []}})).tasks


def test_a_run_that_names_no_task_trains_without_a_probe_where_there_is_no_text_for_one(tmp_path, capsys):
    shards = make_shards(str(tmp_path / "shards"), validation=10)
    tree = settings(tmp_path, shards, probe=5)
    assert not check_inputs(from_mapping(tree)).tasks
    assert "no probe: The probe task neighbours needs 20 validation windows" in capsys.readouterr().err
    with pytest.raises(InputError, match="needs 20 validation windows"):
        check_inputs(from_mapping(tree | {"probe": {"tasks": ["neighbours", "bbc_news"]}}))
    with pytest.raises(InputError, match="needs 20 validation windows"):  # who names it wants it
        check_inputs(from_mapping(tree | {"probe": {"tasks": ["neighbours"]}}))
    short = make_shards(str(tmp_path / "short"), validation=40, seq_len=16)  # enough windows, each too short
    assert not check_inputs(from_mapping(settings(tmp_path, short, probe=5))).tasks
    again = from_mapping(from_mapping(tree).model_dump(mode="json"))  # as a sweep's trial is
    assert not check_inputs(again).tasks


def test_a_suite_adds_its_tasks(tmp_path):
    shards = make_shards(str(tmp_path / "shards"), validation=200)
    make_task(tmp_path)
    (tmp_path / "suite.yaml").write_text("name: ours\ntasks: [mine.yaml, neighbours]\n")
    tree = settings(tmp_path, shards, probe=5) | {"probe": {"suite": str(tmp_path / "suite.yaml")}}
    config = from_mapping(tree)
    assert task_specs(config) == [f"{tmp_path}/mine.yaml", "neighbours"]
    assert [task.name for task in check_inputs(config).tasks] == ["mine", "neighbours"]
    both = from_mapping(tree | {"probe": {"tasks": ["bbc_news"], "suite": "offline"}})
    assert task_specs(both) == ["bbc_news", "neighbours"]
    named = from_mapping(tree | {"probe": {"tasks": ["neighbours"], "suite": str(tmp_path / "suite.yaml")}})
    assert task_specs(named) == ["neighbours", f"{tmp_path}/mine.yaml"]
    with pytest.raises(InputError, match="There is no probe suite of; the packaged ones are offline"):
        task_specs(from_mapping(tree | {"probe": {"suite": "of"}}))
