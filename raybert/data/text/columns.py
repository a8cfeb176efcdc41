"""What the values of JSON columns have in common, so that every part of a table gets the same Arrow types.

A *kind* is found for any part of a column, and `merge` joins those of several parts; the result does not depend on how
the column was cut. Values that share no Arrow type (a number and a string, an integer beyond 64 bits) are kept as their
JSON text.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

EXACT = 1 << 53  # integers up to here are exact as float64
MOST_FIELDS = 256  # an object with more different keys is a dictionary of the user's, not a row
MOST_LEVELS = 16


@dataclass(frozen=True)
class Kind:
    """`form` is one of null, bool, number, text, list, object, mixed; the other fields belong to some of them."""

    form: str
    low: int = 0  # range of the integers among the numbers, which includes 0
    high: int = 0
    real: bool = False  # some numbers are not integers
    item: "Kind | None" = None
    fields: dict[str, "Kind"] = field(default_factory=dict)

    @functools.cached_property
    def arrow(self) -> pa.DataType | None:
        """The Arrow type of such values; None where only JSON text holds them."""
        if self.form == "number":
            return _number(self)
        if self.item is not None:
            return self.item.arrow and pa.list_(self.item.arrow)
        if self.form == "object":
            inner = [(name, kind.arrow) for name, kind in self.fields.items()]
            # Parquet has no object without fields.
            return pa.struct(inner) if inner and all(arrow is not None for _, arrow in inner) else None
        return {"null": pa.null(), "bool": pa.bool_(), "text": pa.string()}.get(self.form)


NULL, BOOL, TEXT, MIXED = Kind("null"), Kind("bool"), Kind("text"), Kind("mixed")
_SIMPLE = {type(None): NULL, bool: BOOL, str: TEXT, float: Kind("number", real=True)}


def kind_of(values: Sequence[Any], levels: int = MOST_LEVELS) -> Kind:
    """What JSON values have in common; of none, and of nulls alone, NULL."""
    found = NULL
    for type_ in dict.fromkeys(map(type, values)):
        some = [value for value in values if type(value) is type_] if type_ in (int, list, dict) else []
        found = merge(found, _SIMPLE.get(type_) or _compound(type_, some, levels))
    return found


def _compound(type_: type, values: list[Any], levels: int) -> Kind:
    if type_ is int:
        return Kind("number", low=min(0, *values), high=max(0, *values))
    if not levels:
        return MIXED
    if type_ is list:
        return Kind("list", item=kind_of([item for value in values for item in value], levels - 1))
    fields = kinds_of(values, levels - 1)
    return MIXED if len(fields) > MOST_FIELDS else Kind("object", fields=fields)


def merge(a: Kind, b: Kind) -> Kind:
    """What the values of both have in common."""
    if a.form == "null" or b.form == "null":
        return b if a.form == "null" else a
    if a.form != b.form:
        return MIXED
    if a.form == "number":
        return Kind("number", min(a.low, b.low), max(a.high, b.high), a.real or b.real)
    if a.item is not None and b.item is not None:
        return Kind("list", item=merge(a.item, b.item))
    if a.form == "object":
        fields = merge_all(a.fields, b.fields)
        return MIXED if len(fields) > MOST_FIELDS else Kind("object", fields=fields)
    return a


def merge_all(a: dict[str, Kind], b: dict[str, Kind]) -> dict[str, Kind]:
    """The columns of both, in the order in which they come."""
    return a | {name: merge(a.get(name, NULL), kind) for name, kind in b.items()}


def kinds_of(rows: Sequence[dict[str, Any]], levels: int = MOST_LEVELS) -> dict[str, Kind]:
    """The kind of each column of some rows."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: kind_of([row[name] for row in rows if name in row], levels) for name in names}


def array(values: Sequence[Any], kind: Kind) -> pa.Array:
    """The values as Arrow; as JSON text where the kind has no Arrow type. A null stays one."""
    if kind.arrow is not None:
        return pa.array(values, kind.arrow)
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.array(texts, pa.string())


def _number(kind: Kind) -> pa.DataType | None:
    if kind.real:
        return pa.float64() if kind.low >= -EXACT and kind.high <= EXACT else None
    if kind.low >= -(1 << 63) and kind.high < 1 << 63:
        return pa.int64()
    return pa.uint64() if kind.low == 0 and kind.high < 1 << 64 else None
