"""The notebooks: they run, and what is committed is fit to be read.

Each is executed as a reader would, in a kernel of its own, but with a few images or sounds made by
code and with trainings of three steps. What it prints then means nothing; that it runs is the test.
"""

import json
import re
from pathlib import Path
from textwrap import indent
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from conftest import fake_fsdd
from nbclient import NotebookClient

from nanogen.lab import notebook as tools

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
MACHINE_PATHS = (str(FOLDER.parent), "/home/", "/root/", "/tmp/", "/Users/", "site-packages")
SOURCE = re.compile(r"`(nanogen/\S+\.py)`\n\n```python\n(.*)\n```", re.DOTALL)  # from `show`

# The first cell of an execution: every recipe becomes three steps of a narrow network.
SMALL = """
import sys
sys.path.insert(0, "..")
from nanogen.lab import recipes, runs
from nanogen.listener import Listener
from nanogen.method import find

WIDTHS = {"meanflow": (32, 32, 32), "codec": (8, 8, 8), "judge": (16, 16, 16),
          "text_image": (32, 32, 32), "video": (32, 32, 32)}


def small_recipes(method):
    config = {"widths": WIDTHS[method]} if method in WIDTHS else {}
    for name, value in {"width": 96, "depth": 2, "crop": 2304, "priors": 16}.items():
        if hasattr(find(method).Config, name) and (method, name) != ("flow", "depth"):
            config[name] = value
    training, found = {"steps": 3, "batch_size": 16, "compile": False}, all_recipes(method)
    for recipe in [recipe for by_name in found.values() for recipe in by_name.values()]:
        recipe["training"] |= training
        recipe["config"] |= config
    return found


def small_train_run(method, data, overrides, folder, *recipe, **named):
    overrides = {name: value for name, value in overrides.items()
                 if name not in ("minutes", "steps", "batch_size")}
    if method == "flow":  # which of its two networks is meant stands in the overrides alone
        dit = overrides.get("network") == "dit"
        overrides |= {"depth": 2} if dit else {"widths": (32, 32, 32)}
    return train_run(method, data, overrides, folder, *recipe, **named)


def two_words(*inputs):  # a listener after three steps hears dozens
    found, voices = hear(*inputs)
    return [[*row, 3][:2] for row in found], voices


hear, Listener.listen = Listener.listen, two_words
all_recipes, train_run = recipes.recipes, runs.train_run
recipes.recipes, runs.train_run = small_recipes, small_train_run
"""


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder of runs for all notebooks: what the first one trains, the next ones find."""
    folder = tmp_path_factory.mktemp("runs")
    fake_fsdd(folder)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, runs, monkeypatch):
    settings = {"NANOGEN_SMOKE": "1", "NANOGEN_RUNS": str(runs), "OMP_NUM_THREADS": "1",
                "NANOGEN_DATA": str(runs)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SMALL))
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    shown = json.dumps([cell.outputs for cell in code_cells(notebook)])
    assert "image/png" in shown and "Traceback" not in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_executed_and_fit_to_be_read(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "not executed in one go"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert "widgets" not in notebook.metadata, "widget state leaves a blank page on GitHub"
    assert len(cells) <= 25 and path.stat().st_size < 1.3e6
    text = path.read_text(encoding="utf-8")
    assert "TODO" not in text
    assert not [place for place in MACHINE_PATHS if place in text], "a path of this machine"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_source_on_the_page_is_the_source_that_runs(path):
    notebook = nbformat.read(path, as_version=4)
    pages = [output.data["text/markdown"] for cell in code_cells(notebook)
             for output in cell.outputs if "text/markdown" in output.get("data", {})]
    shown = [found.groups() for found in map(SOURCE.fullmatch, pages) if found]
    assert shown, "every notebook shows code"
    for place, source in shown:
        there = (FOLDER.parent / place).read_text(encoding="utf-8")
        assert source in there or indent(source, "    ") in there, (
            f"execute it again: {place} has changed since\n{source}")


@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 16, 16, 3), (4000,)])
def test_a_slider_that_moves_draws_again(shape, monkeypatch):
    class Model:
        output = "images" if len(shape) > 1 else "waveforms"

        def sample(self, conditions, *, guidance: float = 2.0, steps: int = 8, seed: int = 0):
            pass

    asked, boxes, places, updated = [], [], [], []

    def sample(n, **chosen):
        asked.append(chosen)
        return np.zeros((n, *shape), np.uint8 if len(shape) > 1 else np.float32)

    def display(bundle, raw, display_id=False):
        places.append(SimpleNamespace(update=lambda part, raw: updated.append(part)))
        return places[-1]

    make_box = tools.ipywidgets.VBox
    monkeypatch.setattr(tools, "display", display)
    monkeypatch.setattr(tools.ipywidgets, "VBox",
                        lambda children: boxes.extend(children) or make_box(children))
    run = SimpleNamespace(model=Model(), sample=sample,
                          record={"sampling": {"guidance": 2.0, "steps": 8}})
    tools.play(run, 2, label="dog")
    assert asked == [{"label": "dog", "seed": 0, "guidance": 2.0, "steps": 8}] and not updated
    assert [slider.description for slider in boxes] == ["seed", "guidance", "steps"]
    boxes[1].value = 3.0
    assert asked[1]["guidance"] == 3.0 and asked[1]["label"] == "dog"
    assert len(updated) == len(places) - 1  # every output but the sliders themselves
