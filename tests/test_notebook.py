"""The notebooks run from top to bottom, and what is committed says nothing of the machine."""

import json
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "analyses"
# What each is to print, besides running through.
PRINTED = {"explore.ipynb": "<- the largest step", "features.ipynb": "nearest neighbours tell"}
# What the first cell does, in how many lines.
START = {"explore.ipynb": ("cka.measure(", 3), "features.ipynb": ("vitprobe.extract(", 4)}
NOTEBOOKS = [HERE / name for name in PRINTED]
pytestmark = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook):
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_it_was_executed_in_order_and_is_small(notebook):
    code = cells(notebook)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert kinds == {"display_data", "execute_result", "stream"}
    assert notebook.stat().st_size < 400_000


def test_it_names_no_place_on_a_machine(notebook):
    text = re.sub(r'"[A-Za-z0-9+/=\\n]{500,}"', "", notebook.read_text(encoding="utf-8"))
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"/(root|home|tmp|Users|opt|work|usr)/|[A-Z]:\\\\", text)


def test_it_opens_with_a_start_of_a_few_lines(notebook):
    first = "".join(cells(notebook)[0]["source"])
    call, lines = START[notebook.name]
    assert len(first.replace("\n\n", "\n").splitlines()) == lines and call in first


def test_it_runs(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("pandas")
    # tqdm's, where ipywidgets is not installed; no other warning may come.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    read = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(read, timeout=300, resources=resources).execute()
    told = "".join(
        output.get("text", "") for cell in read.cells for output in cell.get("outputs", [])
    )
    assert PRINTED[notebook.name] in told and "Warning" not in told
