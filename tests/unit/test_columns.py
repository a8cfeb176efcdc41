"""JSON columns get one Arrow type, however they are cut."""

import json
from functools import reduce
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from raybert.data.text.columns import MOST_FIELDS, NULL, TEXT, Kind, array, kind_of, merge

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1]),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
# Alone, most columns would be mixed.
COLUMNS = st.one_of(
    st.lists(VALUES, max_size=8),
    st.lists(st.none() | st.integers(-(2**65), 2**65), max_size=8),
    st.lists(st.integers(-3, 3) | st.floats(-9, 9), max_size=8),
    st.lists(st.none() | st.dictionaries(st.sampled_from("ab"), st.lists(st.integers(0, 9), max_size=2)), max_size=8),
)


@given(COLUMNS, st.integers(0, 8), st.integers(0, 8))
def test_a_kind_does_not_depend_on_the_cuts(values, first, second):
    cuts = [0, *sorted((first, second)), len(values)]
    parts = [kind_of(values[a:b]) for a, b in pairwise(cuts)]
    whole = kind_of(values)
    assert reduce(merge, parts, NULL) == whole
    assert reduce(merge, parts[::-1], NULL) == whole
    assert merge(whole, whole) == whole


@given(COLUMNS, st.integers(0, 8))
def test_every_part_becomes_a_column_that_holds_its_values(values, cut):
    kind = kind_of(values)
    parts = [array(values[:cut], kind), array(values[cut:], kind)]
    assert parts[0].type == parts[1].type
    found = [value for part in parts for value in part.to_pylist()]
    if kind.arrow is None:
        found = [None if text is None else json.loads(text) for text in found]
    assert without_nulls(found) == without_nulls(values)


def without_nulls(value):
    """Arrow has no difference between a key that is missing and one that is null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return list(map(without_nulls, value)) if isinstance(value, list) else value


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_every_column_can_be_written(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "t.parquet"
    pq.write_table(pa.table({"a": array(values, kind_of(values))}), path)
    assert pq.read_table(path).num_rows == len(values)


def test_a_dictionary_of_many_keys_and_a_deep_value_are_json_text():
    many = [{f"key {i}": 1} for i in range(MOST_FIELDS + 1)]
    assert kind_of(many[1:]).arrow is not None
    assert kind_of(many).arrow is None
    assert merge(kind_of(many[:200]), kind_of(many[200:])).arrow is None
    deep = value = []
    for _ in range(100):
        value.append([])
        value = value[0]
    assert array([deep], kind_of([deep])).to_pylist() == [json.dumps(deep)]


def test_missing_values_have_every_type():
    assert merge(NULL, TEXT) == merge(TEXT, NULL) == TEXT
    assert kind_of([1, None, 2]) == Kind("number", 0, 2)
