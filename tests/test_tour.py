"""examples/tour.ipynb runs from its first cell to its last, as a reader would run it."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def test_it_is_kept_without_results():
    cells = nbformat.read(TOUR, as_version=4).cells
    assert sum(cell.cell_type == "code" for cell in cells) > 5
    assert not any(cell.outputs or cell.execution_count for cell in cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own
def test_it_runs_to_its_end(tmp_path):
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "scenes, step 20: 32 images" in printed
    assert "scores differ by" in printed
    assert (tmp_path / "runs/tour/eval/scenes/metrics.json").is_file()
