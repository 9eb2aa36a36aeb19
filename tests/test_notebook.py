"""The notebook runs from top to bottom, and what is committed says nothing of the machine."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "analyses" / "explore.ipynb"


def cells():
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_it_was_executed_in_order_and_is_small():
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    kinds = {output["output_type"] for cell in cells() for output in cell["outputs"]}
    assert kinds == {"display_data", "execute_result", "stream"}
    assert NOTEBOOK.stat().st_size < 400_000


def test_it_names_no_place_on_a_machine():
    text = re.sub(r'"[A-Za-z0-9+/=\\n]{500,}"', "", NOTEBOOK.read_text(encoding="utf-8"))
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"/(root|home|tmp|Users|opt|work|usr)/|[A-Z]:\\\\", text)


def test_it_opens_with_the_four_line_start():
    first = "".join(cells()[0]["source"])
    assert len(first.replace("\n\n", "\n").splitlines()) == 3 and "cka.measure(" in first


def test_it_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("pandas")
    # tqdm's, where ipywidgets is not installed; no other warning may come.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    told = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "<- the largest step" in told and "Warning" not in told
