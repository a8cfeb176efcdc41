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


def test_the_tutorial_is_kept_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not any(cell.get("outputs") for cell in cells), "clear the notebook's outputs before you commit it"
