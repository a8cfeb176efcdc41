"""The notebook runs from its first cell to its last, with fewer steps."""

from pathlib import Path

import pytest
import ray

from tests.waiting import LONGEST

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "tutorial.ipynb"


@pytest.mark.usefixtures("ray_cluster")
def test_the_tutorial_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("TUTORIAL_STEPS", "12")
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=LONGEST, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 2, "the losses and the probes"
    said = "".join(output.get("text", "") for output in outputs)
    assert "probed step 12" in said
    assert (tmp_path / "tutorial" / "export-12" / "model.safetensors").exists()


def test_the_tutorial_is_kept_with_its_outputs():
    """The site shows them; `make tutorial` makes them."""
    nbformat = pytest.importorskip("nbformat")
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2, "run `make tutorial`"
    assert not [output for output in outputs if output.output_type == "error"]
    said = "".join(output.get("text", "") for output in outputs)
    assert "probed step 320" in said
    assert not [part for part in ("/tmp/", "pid=") if part in said], "this is of one machine alone"
