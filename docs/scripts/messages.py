"""List every sentence of the code that a user can meet, to read them in one go: `python -m docs.scripts.messages`.

Read them one after another, as somebody who does not know the code: does each say what is wrong, where, and what to do,
in the words of the docs? With `--docstrings` it lists the public docstrings instead.

A line has the place, what the string is passed to (an error, `say`, an option, a field of the settings), and the
string; `{name}` stands for a value. Messages are also put together from strings that functions return or tables hold,
so every string of three words is listed.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]
WORD = re.compile(r"[^\W\d_]{2,}|\{")
FEWEST_WORDS = 3
Line = tuple[int, str, str]  # number, what the string is passed to, the string


def in_code(source: str) -> Iterator[Line]:
    """Strings outside docstrings; a command's docstring is its help, and counts."""
    yield from _strings(ast.parse(source), "")


def in_docstrings(source: str) -> Iterator[Line]:
    """The docstrings of public classes and functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
            if text and not node.name.startswith("_"):
                yield node.lineno, node.name, text


def in_page(source: str) -> Iterator[Line]:
    """The text of a template."""
    page = _Page()
    page.feed(source)
    yield from page.found


def in_dashboard(source: str) -> Iterator[Line]:
    """Titles and descriptions of a Grafana dashboard."""
    for number, line in enumerate(source.splitlines(), 1):
        for key, text in re.findall(r'"(title|description)": ("(?:[^"\\]|\\.)*")', line):
            yield number, key, json.loads(text)


def _strings(node: ast.AST, passed_to: str) -> Iterator[Line]:
    if isinstance(node, ast.Constant | ast.JoinedStr):
        text = _text(node)
        if " " in text.strip() and len(WORD.findall(text)) >= FEWEST_WORDS:
            yield node.lineno, passed_to, text
    if isinstance(node, ast.Call):
        passed_to = ast.unparse(node.func).rpartition(".")[2]
    inner = ast.walk(node) if isinstance(node, ast.JoinedStr) else ast.iter_child_nodes(node)
    for child in inner:
        if isinstance(node, ast.JoinedStr):  # of its parts, only the strings inside its values are others
            yield from _strings(child.value, passed_to) if isinstance(child, ast.FormattedValue) else ()
        elif child is not _docstring(node):
            yield from _strings(child, passed_to)


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(
        "{" + ast.unparse(part.value) + "}" if isinstance(part, ast.FormattedValue) else str(ast.literal_eval(part))
        for part in node.values
    )


def _docstring(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) or ast.get_docstring(node) is None:
        return None
    decorators = [] if isinstance(node, ast.Module) else node.decorator_list
    return None if any("command(" in ast.unparse(each) for each in decorators) else node.body[0]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Line] = []

    def handle_data(self, data: str) -> None:
        text = re.sub(r"\{%.*?%\}", "", data)
        if self.lasttag != "style" and len(WORD.findall(text)) >= FEWEST_WORDS - 1:
            self.found.append((self.getpos()[0], self.lasttag, text))


READERS: dict[str, Callable[[str], Iterator[Line]]] = {
    "raybert/**/*.py": in_code,
    "raybert/**/*.html": in_page,
    "cluster/grafana/*.json": in_dashboard,
}


def main(docstrings: Annotated[bool, typer.Option(help="list the public docstrings instead")] = False) -> None:
    readers = {"raybert/**/*.py": in_docstrings} if docstrings else READERS
    for pattern, read in readers.items():
        for path in sorted(ROOT.glob(pattern)):
            for number, passed_to, text in read(path.read_text(encoding="utf-8")):
                print(f"{path.relative_to(ROOT)}:{number}  {passed_to or '-'}  {' '.join(text.split())}")


if __name__ == "__main__":
    typer.run(main)
