"""Both notebooks run from the first cell to the last in a kernel of their own, as they do for whoever opens them.

Outputs are not committed: they would be of one machine and one day, and what GitHub leaves of their styles misleads.
"""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))
# pyzmq and jupyter_client warn of event loops and of a home they cannot write to
pytestmark = pytest.mark.filterwarnings("ignore")


def executed(notebook: nbformat.NotebookNode, directory: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs. Raises CellExecutionError where a cell does."""
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": directory}})
    return client.execute()


def shown(notebook: nbformat.NotebookNode) -> str:
    """Everything that cells print and show."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") for output in outputs]
    return "".join(texts + [part for output in outputs for part in output.get("data", {}).values()])


def test_there_are_two_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["compare_backends", "life_of_a_weight"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_holds_no_outputs_and_nothing_of_the_machine_it_was_written_on(path):
    document = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(document)
    code = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert set(document["metadata"]) == {"kernelspec", "language_info"}
    assert all(cell["metadata"] == {} for cell in document["cells"])


def test_two_backends_are_compared_and_a_bug_of_one_percent_is_found_where_it_was_planted(tmp_path):
    text = shown(executed(nbformat.read(NOTEBOOKS[0], as_version=4), tmp_path))
    assert "agree to within rounding" in text
    assert "model.layers.0.mlp" in text
    assert "<svg" in text


def test_the_life_of_a_weight_ends_with_what_was_loaded(tmp_path):
    text = shown(executed(nbformat.read(NOTEBOOKS[1], as_version=4), tmp_path))
    assert "2 of 25 tensors differ" in text
    assert "swap in embedding and head of B" in text
    # the timeline is drawn from what was checked: every step on both backends, the quantised ones and the export too
    table = next(part for part in text.split("<table") if "timeline" in part[:30])
    assert table.count("<tr>") == 1 + 13
    assert table.count("<b>pass</b>") == 2 * 13
    for step in ("refuse a broken B", "unmerge it", "reload A quantised", "export"):
        assert f"<td>{step}</td>" in table
    assert "exported twice, and equal to what was loaded" in text


def test_a_cell_that_raises_fails_the_run(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(CellExecutionError):
        executed(notebook, tmp_path)
