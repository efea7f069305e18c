"""The notebooks: they run, and what is committed is fit to be read.

Each is executed as a reader would, in a kernel of its own, with NANOGEN_SMOKE=1: a few drawn pictures, trainings of three
steps. What comes out means nothing; that it comes out is the test.
"""

import json
import re
from pathlib import Path
from textwrap import indent

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
MACHINE_PATHS = (str(FOLDER.parent), "/home/", "/root/", "/tmp/", "/Users/", "site-packages")


SOURCE = re.compile(r"`(nanogen/\S+\.py)`\n\n```python\n(.*)\n```", re.DOTALL)  # what `show` prints


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder of runs for all notebooks: what the first one trains, the next ones find."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, runs, monkeypatch):
    for name, value in {"NANOGEN_SMOKE": "1", "NANOGEN_RUNS": str(runs), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    shown = json.dumps([cell.outputs for cell in code_cells(notebook)])
    assert "image/png" in shown and "Traceback" not in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_executed_and_fit_to_be_read(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not executed in one go"
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert "widgets" not in notebook.metadata, "widget state leaves a blank page on GitHub"
    assert len(cells) <= 25 and path.stat().st_size < 1.3e6
    text = path.read_text()
    assert "TODO" not in text
    assert not [place for place in MACHINE_PATHS if place in text], "a path of the machine that ran it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_source_on_the_page_is_the_source_that_runs(path):
    notebook = nbformat.read(path, as_version=4)
    pages = [output.data["text/markdown"] for cell in code_cells(notebook) for output in cell.outputs
             if "text/markdown" in output.get("data", {})]
    shown = [found.groups() for found in map(SOURCE.fullmatch, pages) if found]
    assert shown, "every notebook shows code"
    for place, source in shown:
        there = (FOLDER.parent / place).read_text()
        assert source in there or indent(source, "    ") in there, f"execute it again: {place} has changed since\n{source}"
