"""Write the reference of the command line and of the settings into their pages, from the code.

    python -m docs.scripts.pages

A page has a part between `<!-- generated: NAME -->` and `<!-- end of NAME -->`, NAME being one of `PARTS`.
"""

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raybert.cli import app
from raybert.config import Config
from raybert.probe.kinds import KINDS
from raybert.sweep.space import AshaConfig, Dimension, SweepConfig

PART = re.compile(r"<!-- generated: ([a-z-]+) -->\n.*?<!-- end of \1 -->", re.DOTALL)


def command_line() -> str:
    """Every command with its arguments and options, from typer."""
    return "\n".join(_command(words, command) for words, command in commands())


def settings() -> str:
    """A table for each section of a run's settings, from pydantic."""
    parts = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        parts.append(f"## {name}\n\n{_plain(section)}\n\n{_table(section, f'{name}.')}")
    return "\n\n".join(parts)


def sweep_settings() -> str:
    """The keys of a sweep's file."""
    return "\n\n".join(
        [
            _table(SweepConfig, ""),
            f"### A dimension of `space`\n\n{_plain(Dimension)}\n\n{_table(Dimension, '')}",
            f"### asha\n\n{_plain(AshaConfig)}\n\n{_table(AshaConfig, 'asha.')}",
        ]
    )


def task_settings() -> str:
    """The keys of a probe task's file, for each kind."""
    return "\n\n".join(f"### {name}\n\n{_table(kind.settings, '')}" for name, kind in KINDS.items())


PARTS = {
    "command-line": command_line,
    "settings": settings,
    "sweep-settings": sweep_settings,
    "task-settings": task_settings,
}


def filled(page: str) -> str:
    """The page with its parts as the code has them now."""
    return PART.sub(
        lambda found: f"<!-- generated: {found[1]} -->\n\n{PARTS[found[1]]().strip()}\n\n<!-- end of {found[1]} -->",
        page,
    )


def main() -> None:
    for path in Path(__file__).parents[1].glob("*.md"):
        page = path.read_text(encoding="utf-8")
        if (current := filled(page)) != page:
            path.write_text(current, encoding="utf-8")


def commands() -> Iterator[tuple[str, Any]]:
    """(words, command) of every command, those of groups included: ("probe run", ...)."""
    group = typer.main.get_command(app)
    for name in group.list_commands(None):  # type: ignore[attr-defined]
        command = group.commands[name]  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            for inner in command.commands:
                yield f"{name} {inner}", command.commands[inner]
        else:
            yield name, command


def _command(words: str, command: Any) -> str:
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    options = [p for p in shown if p.param_type_name == "option"]
    names = [a.metavar or a.name.upper() for a in arguments]
    given = [name if a.required else f"[{name}]" for a, name in zip(arguments, names, strict=True)]
    usage = " ".join(["raybert", words, *given, *["[OPTIONS]"] * bool(options)])
    parts = [f"## raybert {words}", _paragraphs(command.help), f"```text\n{usage}\n```"]
    if shown:
        rows = [(f"`{name}`", "", a.help) for a, name in zip(arguments, names, strict=True)]
        rows += [(_option(o), _default(o), o.help) for o in options]
        parts.append(_rows(("argument or option", "default", "meaning"), rows))
    if command.epilog:
        parts.append("```text\n" + command.epilog.removeprefix("Example: ") + "\n```")
    return "\n\n".join(parts) + "\n"


def _option(option: Any) -> str:
    takes = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    return f"`{', '.join(option.opts)}{takes}`"


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.is_flag or option.default in (None, ""):
        return ""
    return f"`{option.default}`"


def _paragraphs(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def _plain(model: type[BaseModel]) -> str:
    return _paragraphs(model.__doc__).replace("``", "`")


def _table(model: type[BaseModel], prefix: str) -> str:
    rows = []
    for name, field in model.model_fields.items():
        if name == "kind" or _is_section(field.annotation):
            continue
        rows.append((f"`{prefix}{name}`", _type(field.annotation, field.metadata), _value(field), field.description))
    return _rows(("key", "value", "default", "meaning"), rows)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _value(field: FieldInfo) -> str:
    value = field.default_factory() if field.default_factory else field.default  # type: ignore[call-arg]
    if value is PydanticUndefined:
        return "required"
    if value is None or value == "" or value == {}:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


NAMES = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Any: "any", dict: "mapping"}


def _type(annotation: Any, metadata: Any = ()) -> str:
    """An annotation and its limits in words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inside[0], inside[1:])
    if origin is Literal:
        return ", ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in inside)
    if origin in (Union, types.UnionType):
        said = ", ".join(dict.fromkeys(_type(part) for part in inside if part is not type(None)))
    elif origin is list:
        said = "list" if inside[0] is Any else f"list of {_type(inside[0])}"
    elif origin is tuple:
        said = f"[{', '.join(_type(part) for part in inside)}]"
    else:
        said = NAMES.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))
    return " ".join([said, *[" and ".join(_limits(metadata))] * bool(metadata)]).strip()


def _limits(metadata: Any) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _limits(item.metadata)
        for kind, sign in ((limits.Gt, ">"), (limits.Ge, "≥"), (limits.Lt, "<"), (limits.Le, "≤")):
            if isinstance(item, kind):
                bound = getattr(item, kind.__name__.lower())
                yield f"{sign} {'2^63' if bound == 2**63 else format(bound, 'g')}"


def _rows(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join((cell or "").replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
