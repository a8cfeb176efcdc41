from importlib import resources

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raybert import config
from raybert.errors import InputError
from raybert.probe.kinds import KINDS
from raybert.probe.tasks import load_task
from raybert.sweep import space

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
# Text that YAML or Python could take for something else than what stands there.
AWKWARD = ["20240101", "1e3", "2024-01-01", "0755", "1_000", "0x1F", "yes", "null", "1.10", "12.5e-3", "1-2"]


def test_overrides_replace_what_the_file_says(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run: {name: a}\noptimizer: {lr: 1.0e-3}\nmodel: {size: tiny}\n")
    found = config.load(str(path), ["optimizer.lr=2e-3", "model.num_hidden_layers=3", "train.workers=[1, 2]"])
    assert found.run.name == "a"
    assert found.optimizer.lr == 2e-3
    assert found.model.bert().hidden_size == 128
    assert found.model.bert().num_hidden_layers == 3
    assert found.train.worker_range == (1, 2)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.leaning_rate=1", "Unknown config key optimizer.leaning_rate"),
        ("optimizer.weight_decy=1", "Did you mean optimizer.weight_decay?"),
        ("trian.steps=3", "Did you mean train"),
        ("train.steps=many", "train.steps='many'"),
        ("model.size=huge", "use one of tiny, mini, compact, small, base"),
        ("model.num_attention_heads=5", "num_attention_heads=5 does not divide hidden_size=384"),
        ("train.global_batch=33", "cannot be divided"),
        ("train.workers=[3,6]", "over 3 workers"),
        ("train.workers=0", "train.workers must be"),
        ("schedule.warmup_steps=20000", "more than train.steps"),
        ("train.steps", "write it as key.sub=value"),
        ("run.name=../elsewhere", "run.name"),
    ],
)
def test_a_wrong_setting_is_one_sentence(override, sentence):
    with pytest.raises(InputError) as caught:
        config.load(None, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rule_for_the_best_weights_needs_best_weights():
    with pytest.raises(InputError, match=r"best=sts.spearman has no effect with checkpoint\.keep_best=false"):
        config.load(None, ["checkpoint.best=sts.spearman", "checkpoint.keep_best=false"])


def test_a_missing_or_broken_file_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="no config file"):
        config.load(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="must hold a mapping"):
        config.load(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match="not valid YAML"):
        config.load(str(tmp_path / "broken.yaml"))


@given(
    lr=st.floats(1e-6, 1.0),
    steps=st.integers(100, 10**7),
    name=NAMES | st.sampled_from(AWKWARD),
)
def test_yaml_of_a_config_is_the_same_config(lr, steps, name):
    # `name` may look like a number to YAML; it must come back as the text it was.
    first = config.from_mapping({"run": {"name": name}, "optimizer": {"lr": lr}, "train": {"steps": steps}})
    assert config.from_mapping(yaml.safe_load(first.to_yaml())) == first


@given(name=NAMES | st.sampled_from(AWKWARD))
def test_a_name_is_the_text_that_stands_there(tmp_path_factory, name):
    run = tmp_path_factory.getbasetemp() / name
    run.mkdir(exist_ok=True)
    path = run / "config.yaml"
    path.write_text(f"run:\n  name: {name}\n")
    given = config.load(None, [f"run.name={name}"])
    assert given.run.name == name
    assert config.load(str(path)) == given, "file and override differ"
    path.write_text(given.to_yaml())
    assert config.read_yaml_mapping(str(path))["run"]["name"] == name
    again = config.load_run(str(run))
    assert again.run_uri == str(run)
    assert config.load_run(str(run), [f"run.name={name}-2"]).run.name == f"{name}-2"


@pytest.mark.parametrize(
    "text", ["data/my shards #2", "[v1]", "{a: b}", "*x", "- x", "x: y", "2024", "%x", "a, b", "!x"]
)
def test_a_path_of_an_override_is_its_text(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert config.load(None, [f"data.shards={text}"]).data.shards == str(tmp_path / text)
    assert config.load(None, [f'data.shards="{text}"']).data.shards == str(tmp_path / text), "quotes enclose a text"
    assert config.load(None, [f'probe.tasks=["{text}", bbc_news, 2024]']).probe.tasks == [text, "bbc_news", "2024"]


def loaded(path, key, text, *, in_file):
    section, _, last = key.partition(".")
    path.write_text(f"{section}:\n  {last}: {text}\n")
    try:
        return config.look_up(config.load(*([str(path)] if in_file else [None, [f"{key}={text}"]])).model_dump(), key)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "1e6", 1_000_000),
        ("train.steps", "1_000_000", 1_000_000),
        ("train.steps", "0700", 700),
        ("train.steps", "700.0", 700),
        ("optimizer.lr", "1e-3", 0.001),
        ("optimizer.lr", ".5", 0.5),
        ("optimizer.lr", "1", 1.0),
        ("train.workers", "1e0", 1),
        ("train.workers", "[1, 2]", (1, 2)),
        ("train.compile", "yes", True),
        ("train.compile", "auto", "auto"),
        ("data.task_cpus", "1e-1", 0.1),
        ("model.size", "null", None),
        ("model.hidden_size", "", None),
        ("run.trackers", "[]", []),
        ("train.steps", "1.5", "train.steps=1.5"),
        ("train.steps", "1:30", "train.steps='1:30'"),
        ("train.steps", "yes", "steps=true is a boolean, which is not allowed here"),
        ("train.steps", "1e400", "train.steps=inf"),
        ("probe.tasks", "bbc_news", "write a list, [bbc_news]"),
    ],
)
def test_a_value_is_the_same_in_a_file_and_as_an_override(tmp_path, key, text, value):
    there, here = (loaded(tmp_path / "c.yaml", key, text, in_file=in_file) for in_file in (True, False))
    assert there == here
    assert value in here if isinstance(here, str) and isinstance(value, str) else here == value


@pytest.mark.parametrize("section", ["train:", "train: ~", "train: {}", "train:\n  # steps: 3"])
def test_a_section_whose_lines_are_commented_out_is_empty(tmp_path, section):
    path = tmp_path / "c.yaml"
    path.write_text(f"{section}\nrun:\n")
    assert config.load(str(path)).train.steps == 10_000
    found = config.load(str(path), ["train.steps=400", "run.name=a", "train.workers=2"])
    assert (found.train.steps, found.run.name, found.train.workers) == (400, "a", 2)
    assert config.load(str(path), ["train={steps: 400}", "train.workers=2"]).train == found.train


def test_a_key_that_stands_twice_is_refused_with_its_lines(tmp_path):
    path = tmp_path / "twice.yaml"
    for text, key, lines in (
        ("train:\n  steps: 500\nrun: {name: a}\ntrain:\n  workers: 1\n", "train", (1, 4)),
        ("train:\n  steps: 500\n  workers: 1\n  steps: 600\n", "steps", (2, 4)),
        ("name: a\nspace:\n  x:\n    - {grid: 1, 'grid': 2}\n", "grid", (4, 4)),
    ):
        path.write_text(text)
        for read in (config.load, space.load, load_task, config.read_yaml_mapping):
            with pytest.raises(InputError) as caught:
                read(str(path))
            assert f"{path} has the key {key} twice, on line {lines[0]} and on line {lines[1]}" in str(caught.value)


def test_anchors_and_merge_keys_are_no_repetition(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "train: &t\n  steps: 500\nevery: {log: 1}\n"
        "model: {hidden_size: &h 128, intermediate_size: *h, num_attention_heads: 2}\n"
    )
    assert config.load(str(path)).model.bert().intermediate_size == 128
    path.write_text("base: &b\n  train: {steps: 400}\nother: &o {<<: *b, every: {log: 1}}\n<<: *o\nrun: {name: a}\n")
    found = config.read_yaml_mapping(str(path))
    assert found == yaml.safe_load(path.read_text())
    assert found["train"] == {"steps": 400}


def test_texts_of_a_probe_task_are_what_stands_there(tmp_path):
    (tmp_path / "rows.csv").write_text("2024,yes\na,no\nb,yes\n")
    path = tmp_path / "task.yaml"
    path.write_text("name: 1e3\ntrain: rows.csv\ntext: 2024\nlabel: yes\nlabel_names: [no, yes, 010]\nn_train: 1e3\n")
    task = load_task(str(path))
    assert (task.name, task.text, task.label, task.n_train) == ("1e3", "2024", "yes", 1000)
    assert task.label_names == ["no", "yes", "010"]
    path.write_text("name: pair\ntrain: rows.csv\ntext: [2024, yes]\nlabel: yes\ntest:\n")
    assert load_task(str(path)).columns == ["2024", "yes"]


def test_an_alias_is_changed_in_one_place_alone(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("space: {optimizer.lr: &d {log_uniform: [1e-3, 1e-2]}, optimizer.eps: *d}\n")
    found = space.load(str(path), ["space.optimizer.lr.draws=1"]).space
    assert [found[key].draws for key in ("optimizer.lr", "optimizer.eps")] == [1, 4]


@given(fraction=st.floats(0.001, 0.999), steps=st.integers(1, 10**6))
def test_a_warm_up_may_be_a_fraction_of_the_run(fraction, steps):
    def warm_up(given):
        return config.from_mapping({"schedule": {"warmup_steps": given}, "train": {"steps": steps}})

    found = warm_up(fraction)
    assert abs(found.warmup_steps - fraction * steps) <= 0.5
    assert config.from_mapping(yaml.safe_load(found.to_yaml())) == found
    assert warm_up(steps).warmup_steps == warm_up(float(steps)).warmup_steps == steps
    assert warm_up(0).warmup_steps == 0
    for wrong in (steps + 1, steps + 0.5, -fraction):
        with pytest.raises(InputError, match=r"warmup_steps"):
            warm_up(wrong)


def test_the_shipped_files_can_be_shortened_by_their_steps_alone(request):
    root = request.config.rootpath
    for path, steps in ((root / "jobs" / "compact.yaml", 500), (resources.files("raybert") / "demo.yaml", 15)):
        assert config.load(str(path)).warmup_steps == steps
        assert config.load(str(path), ["train.steps=3"]).warmup_steps == 0
    (trial, *_) = space.trials(space.load(str(root / "jobs" / "sweep.yaml")))
    assert trial.config.warmup_steps == 12


def test_every_key_of_the_shipped_configs_is_real(request):
    for path in sorted((request.config.rootpath / "jobs").glob("*.yaml")):
        if path.name != "sweep.yaml":
            assert config.load(str(path)).train.steps > 0


def test_paths_are_named_as_every_process_can_find_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {"data": {"shards": "s"}, "probe": {"tasks": ["bbc_news", "ag_news@texts", "mine.yaml", "gs://b/t.yaml"]}}
    found = config.from_mapping(tree)
    assert found.data.shards == str(tmp_path / "s")
    assert found.run_uri == str(tmp_path / "runs" / "bert")
    places = [f"ag_news@{tmp_path}/texts", f"{tmp_path}/mine.yaml"]
    assert found.probe.tasks == ["bbc_news", *places, "gs://b/t.yaml"]
    assert config.from_mapping(yaml.safe_load(found.to_yaml())) == found


@pytest.mark.parametrize("text", ["", "~"])
def test_a_text_setting_without_a_value_is_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"run:\n  storage: {text}\n")
    with pytest.raises(InputError, match=r"run\.storage"):
        config.load(str(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_text("run:\n  name: null\n")
    assert config.load(str(tmp_path / "c.yaml")).run.name == "null"


def test_every_setting_says_what_it_means():
    """The reference and the shell's completion show it."""
    for model in (config.Config, space.SweepConfig, space.Dimension, *(kind.settings for kind in KINDS.values())):
        unsaid = [key for key, meaning in config.meanings(model).items() if not meaning and key != "kind"]
        assert not unsaid, f"{model.__name__} has settings without a description: {unsaid}"
