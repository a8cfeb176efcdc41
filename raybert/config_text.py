"""YAML files and ``key.sub=value`` overrides as trees of text, and what the text means for a key's type.

The same text can be a name, a number or a flag (``20240101``, ``1e3``, ``yes``). What it is depends on the key that it
is written for, in a file as in an override: a key of type str takes the text as it stands.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from raybert import storage
from raybert.errors import InputError

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(?:0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
       |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
       |[0-9][0-9_]*[eE][-+]?[0-9]+
       |\.(?:inf|Inf|INF))$
       |\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of YAML 1.2 (``1e-3`` is one, ``010`` is ten), without dates or duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, where merge keys (`<<`) are not resolved yet: a key may stand beside the one that it replaces.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise InputError(
                    f"{self.name} has the key {key.value} twice, on line {lines[key.value]} and on line {line}; "
                    "write it once."
                )
            lines[key.value] = line
        return node

    def construct_yaml_int(self, node: Any) -> int:
        text = node.value.replace("_", "").lower()
        base = {"0x": 16, "0o": 8, "0b": 2}.get(text.lstrip("+-")[:2], 10)
        return int(text, base)


class _Dumper(yaml.SafeDumper):
    """Quotes each string that `_Loader` would read as something else."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.removeprefix(_TAG) in ("bool", "null", "merge")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)


class Written(str):
    """A value that has not met its key yet: the text, and in `value` what it is as YAML."""

    value: Any

    def __new__(cls, text: str, value: Any) -> "Written":
        self = super().__new__(cls, text)
        self.value = value
        return self


class _WrittenLoader(_Loader):
    """Keeps the text of every plain scalar that is not a string to YAML."""


def _keep_text(read: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Written]:
    return lambda loader, node: Written(node.value, read(loader, node))


for _kind in ("bool", "int", "float", "null"):
    _WrittenLoader.add_constructor(_TAG + _kind, _keep_text(_WrittenLoader.yaml_constructors[_TAG + _kind]))


def read_yaml_mapping(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, as plain values.

    Raises:
        InputError: it cannot be read, is not YAML, has a key twice, or is not a mapping.
    """
    return _read(path, _Loader)


def read_overridden(
    path: str, overrides: Iterable[str] = (), place: Callable[[str], list[str]] | None = None
) -> dict[str, Any]:
    """The mapping in a YAML file after overrides, with the text of its values: see `typed`.

    Args:
        place: splits an override's key into its parts; by default at the dots.

    Raises:
        InputError: as `read_yaml_mapping`; or an override cannot be applied.
    """
    tree = _read(path, _WrittenLoader)
    for override in overrides:
        set_dotted(tree, override, place)
    return tree


def _read(path: str, loader: type[_Loader]) -> dict[str, Any]:
    try:
        tree = _parse(storage.read_bytes(path), path, loader)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number that is none, say
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())[:500]}") from error
    tree = _plain_value(tree) or {}
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold a mapping of settings, not a {type(tree).__name__}.")
    return tree


def _parse(text: str | bytes, name: str, loader: type[_Loader]) -> Any:
    parser = loader(text)
    parser.name = name  # what errors call it
    try:
        return parser.get_single_data()
    finally:
        parser.dispose()


def dump(tree: Any) -> str:
    """YAML that is read back as the same values, by `read_yaml_mapping` and by any reader of YAML 1.1."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def set_dotted(tree: dict[str, Any], override: str, place: Callable[[str], list[str]] | None = None) -> None:
    """Apply one ``a.b=value`` to the tree in place.

    Raises:
        InputError: there is no ``=``, or a part of the key is already a plain value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"Cannot read the override {override!r}: write it as key.sub=value.")
    _set(tree, place(key) if place else key.split("."), key, _written(text.strip(), key))


def _written(text: str, key: str) -> Any:
    """An override's value: its text, or what stands between quotes that enclose all of it."""
    try:
        value = _parse(text, f"The override of {key}", _WrittenLoader)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if text[:1] in ("'", '"') and isinstance(value, str):
        return value
    return Written(text, _plain_value(value))


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put a value under ``a.b`` in the tree, in place.

    Raises:
        InputError: a part of the key is already a plain value.
    """
    _set(tree, key.split("."), key, value)


def _set(tree: dict[str, Any], path: list[str], key: str, value: Any) -> None:
    *parents, last = path
    node = tree
    for parent in parents:
        inside = _plain_value(node.get(parent))
        if not isinstance(inside, dict | None):
            raise InputError(f"Cannot set {key}: {parent} is a plain value in the config file, not a section.")
        # A copy, since an alias of YAML may have put the same mapping under another key too.
        node[parent] = node = dict(inside or {})
    node[last] = value


def look_up(tree: Any, key: str) -> Any:
    """The value under ``a.b``, None where there is none."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def typed(value: Any, annotation: Any) -> Any:
    """What was read by `read_overridden`, as the type of its key asks for; nothing is checked.

    A str takes the text, everything else what it is as YAML. In a mapping of settings a section that is null, since
    all its lines are commented out, is left out. Values that are no `Written` stay as they are.

    Args:
        annotation: of the key; a model for a mapping of settings. For `Any` the text is kept.
    """
    kinds = _kinds(annotation)
    if isinstance(value, Written) and Any not in kinds:
        value = _choose(value, kinds)
    if isinstance(value, Mapping):
        for kind in kinds:
            if _is_model(kind):
                return _typed_section(value, kind)
            if get_origin(kind) is dict:
                return {key: typed(inside, get_args(kind)[1]) for key, inside in value.items()}
    if isinstance(value, list):
        for kind in kinds:
            if get_origin(kind) in (list, tuple):  # whose parts are all of one type, in all our settings
                return [typed(inside, get_args(kind)[0]) for inside in value]
    return value


def _typed_section(tree: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        field = model.model_fields.get(key)
        if field is None:
            found[key] = _plain_value(value)  # refused when the model is validated
        elif _plain_value(value) is not None or not any(_holds_keys(kind) for kind in _kinds(field.annotation)):
            found[key] = typed(value, field.annotation)
    return found


def annotation_of(model: type[BaseModel], path: Iterable[int | str]) -> Any:
    """The type of the setting at a path of keys; `object` where there is none."""
    found: Any = model
    for part in path:
        inside: Any = object
        for kind in _kinds(found):
            if _is_model(kind) and part in kind.model_fields:
                inside = kind.model_fields[part].annotation
            elif get_origin(kind) is dict:
                inside = get_args(kind)[1]
        found = inside
    return found


def _choose(value: Written, kinds: list[Any]) -> Any:
    meant = value.value
    # A key without a value is refused where the setting needs one; the word "null" is a text for a text.
    if meant is None and (NoneType in kinds or str(value) in ("", "~")):
        return None
    if isinstance(meant, list) and any(get_origin(kind) in (list, tuple) for kind in kinds):
        return meant
    if str in kinds or any(get_origin(kind) is Literal and str(value) in get_args(kind) for kind in kinds):
        return str(value)
    if int in kinds and float not in kinds and isinstance(meant, float) and meant.is_integer():
        return int(meant)  # 1e6
    return meant


def _kinds(annotation: Any) -> list[Any]:
    """The types of a union, or the one that it is, without what pydantic says of them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _holds_keys(kind: Any) -> bool:
    return _is_model(kind) or get_origin(kind) is dict


def _plain_value(value: Any) -> Any:
    return value.value if isinstance(value, Written) else value
