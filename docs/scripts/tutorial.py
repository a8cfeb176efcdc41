"""Run docs/tutorial.ipynb and keep its outputs, which the site shows: `make tutorial`."""

import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "tutorial.ipynb"
LOG_LINE = re.compile(r"\(.*pid=\d+.*\)|\d{4}-\d\d-\d\d \d\d:\d\d")  # of Ray's processes


def tidy(cell: nbformat.NotebookNode) -> None:
    """Leave out what is only of this machine: logs, process ids, how long a cell took."""
    kept: list[nbformat.NotebookNode] = []
    for output in cell.outputs:
        if output.output_type == "stream":
            lines = [line for line in output.text.splitlines(keepends=True) if not LOG_LINE.search(line)]
            output.text = "".join(lines)
            if output.name == "stderr" or not output.text.strip():
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        elif "metadata" in output:
            output.metadata = {}
        kept.append(output)
    cell.outputs = kept
    cell.metadata.pop("execution", None)


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory(prefix="raybert-tutorial-") as folder:
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()
        for cell in notebook.cells:
            if cell.cell_type == "code":
                tidy(cell)
        text = nbformat.writes(notebook).replace(folder + "/", "")
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
