import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raybert import config
from raybert.errors import InputError


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
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
)
def test_yaml_of_a_config_is_the_same_config(lr, steps, name):
    # `name` may look like a number to YAML; it must come back as the text it was.
    first = config.from_mapping({"run": {"name": name}, "optimizer": {"lr": lr}, "train": {"steps": steps}})
    assert config.from_mapping(yaml.safe_load(first.to_yaml())) == first


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
