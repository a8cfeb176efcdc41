"""Manifests, configs and task files from anywhere: either they are read, or they are refused with an InputError.

RAYBERT_FUZZ=N sets the number of cases of each (10,000 in `make test-faults`).
"""

import copy
import json
import os
from functools import cache

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raybert import config as configs
from raybert.config import from_mapping, read_yaml_mapping, set_dotted
from raybert.data import manifest
from raybert.errors import InputError
from raybert.probe.tasks import parse_task
from raybert.tokenizer import Tokenizer

CASES = int(os.environ.get("RAYBERT_FUZZ", "500"))
fuzz = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)

SHARD = {"name": "train-00000-of-00001.parquet", "rows": 5, "tokens": 100, "bytes": 900, "sha256": "0" * 64}
MANIFEST = {
    "format": manifest.FORMAT,
    "version": manifest.VERSION,
    "tokenizer": {"name": "gpt2", "hash": Tokenizer.hash},
    "seq_len": 64,
    "unit_rows": 512,
    "settings": {},
    "inputs": {},
    "counts": {},
    "splits": {"train": [SHARD], "validation": []},
}
TASK = {"name": "mine", "train": "a.csv", "test": "b.csv", "text": ["x", "y"], "label": "z", "n_train": 5, "seed": 1}

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [2**63, 2**64, -1, 1e308, "", "../x", "/etc/passwd", "\x00", "nan", "0" * 64, [], {}, [[]], {"": 0}]
    ),
)


def paths(tree, prefix=()):
    """Every place in a tree of mappings and lists."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [prefix, *(path for key, value in inside for path in paths(value, (*prefix, key)))]


def changed(tree, changes):
    """The tree with values replaced, removed or added at some of its places."""
    tree = copy.deepcopy(tree)
    for place, value, how in changes:
        found, value = paths(tree), copy.deepcopy(value)
        path = found[place % len(found)]
        if not path:
            if how == "replace":
                tree = value
            continue
        node = tree
        for key in path[:-1]:
            node = node[key]
        if how == "replace":
            node[path[-1]] = value
        elif how == "remove":
            del node[path[-1]]
        elif isinstance(node, dict):
            node[str(value)] = value
        else:
            node.append(value)
        if not isinstance(tree, dict | list):
            break
    return tree


CHANGES = st.lists(
    st.tuples(st.integers(0, 200), SCALARS, st.sampled_from(["replace", "remove", "add"])), min_size=1, max_size=3
)


def accepted_or_refused(read):
    said = ""
    try:
        return read()
    except InputError as error:
        said = str(error)
    assert 0 < len(said) < 5000
    return None


@fuzz
@given(CHANGES, st.integers(0, 10_000))
def test_manifests(changes, cut):
    data = json.dumps(changed(MANIFEST, changes)).encode()
    found = accepted_or_refused(lambda: manifest.parse(data, "m"))
    if found is not None:
        for entry in (*found.splits.train, *found.splits.validation):
            assert entry.rows >= 0
            assert "/" not in entry.name
    accepted_or_refused(lambda: manifest.parse(data[: cut % (len(data) + 1)], "m"))


@fuzz
@given(st.binary(max_size=60))
def test_bytes_as_manifest(data):
    accepted_or_refused(lambda: manifest.parse(data, "m"))


def test_a_manifest_as_it_should_be():
    assert manifest.parse(json.dumps(MANIFEST).encode(), "m").splits.train[0].rows == 5


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b"\xff\xfe", b"NaN", b""])
def test_manifests_that_break_parsers(data):
    with pytest.raises(InputError):
        manifest.parse(data, "m")


@cache
def a_config():
    return configs.Config().model_dump(mode="json")


@fuzz
@given(CHANGES)
def test_configs(changes):
    found = accepted_or_refused(lambda: from_mapping(changed(a_config(), changes)))
    if found is not None:
        assert from_mapping(yaml.safe_load(found.to_yaml())) == found, "what was written down is not what was meant"


@fuzz
@given(st.text(max_size=40))
def test_overrides(text):
    def read():
        tree = a_config()
        tree = copy.deepcopy(tree)
        set_dotted(tree, text)
        return from_mapping(tree)

    accepted_or_refused(read)


@fuzz
@given(st.sampled_from(configs.all_keys(configs.Config)), st.text(max_size=20))
def test_values_of_overrides(key, text):
    def read():
        tree = copy.deepcopy(a_config())
        set_dotted(tree, f"{key}={text}")
        return from_mapping(tree)

    accepted_or_refused(read)


@pytest.fixture(scope="module")
def yaml_file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "c.yaml"


YAML_BYTES = st.one_of(
    st.binary(max_size=60), st.text("ab:{}[]&*!-?|>%@`\"'#, \n\t0129.~<", max_size=40).map(str.encode)
)


@fuzz
@given(YAML_BYTES)
def test_bytes_as_config(yaml_file, data):
    yaml_file.write_bytes(data)
    accepted_or_refused(lambda: configs.load(str(yaml_file)))


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b"&a [*a]",
        b"a: &a {b: *a}",
        b"2001-99-99",
        b"x: !!python/object:os.system {}",
        b"1" * 9000,
        b"? {}",
    ],
)
def test_configs_that_break_parsers(yaml_file, data):
    yaml_file.write_bytes(data)
    with pytest.raises(InputError):
        configs.load(str(yaml_file))


@fuzz
@given(CHANGES)
def test_tasks(changes):
    tree = changed(TASK, changes)
    if isinstance(tree, dict):
        accepted_or_refused(lambda: parse_task(tree, "t.yaml"))


@fuzz
@given(YAML_BYTES)
def test_bytes_as_task(yaml_file, data):
    yaml_file.write_bytes(data)
    accepted_or_refused(lambda: parse_task(read_yaml_mapping(str(yaml_file)), "t.yaml"))
