"""The notebooks: each runs from top to bottom in smoke mode, and each is committed executed, small, and fit to be read."""

import base64
import io
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from nanogen.data.datasets import data_folder
from nanogen.lab import notebook
from nanogen.lab.train import Training

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
MOST_CODE_CELLS, MOST_BYTES = 25, 1_500_000


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder of runs for all notebooks: the second finds the tokenizer and the judge of the first."""
    return tmp_path_factory.mktemp("runs")


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def pictures(cells) -> list[Image.Image]:
    outputs = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))) for output in outputs]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.real_data
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_from_top_to_bottom(name, runs, tmp_path_factory, monkeypatch):
    """In smoke mode, on drawn pictures unless CIFAR-10 is there already. A cell that fails raises here."""
    if not (data_folder() / "cifar10.npz").exists():
        monkeypatch.setenv("NANOGEN_DATA", str(tmp_path_factory.getbasetemp() / "no-data"))
    monkeypatch.setenv("NANOGEN_SMOKE", "1")
    monkeypatch.setenv("NANOGEN_RUNS", str(runs))
    book = read(name)
    client = NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in cells), "every cell leaves something to look at"
    errors = [o.text for cell in cells for o in cell.outputs if o.output_type == "stream" and o.name == "stderr" and "Error" in o.text]
    assert not errors
    assert len(pictures(cells)) >= 5
    assert "widgets" not in book.metadata


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_short_and_small(name):
    assert len(code_cells(name)) <= MOST_CODE_CELLS
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_committed_executed(name):
    """Outputs in place, in order, and none of them an error or one of smoke mode's."""
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "execute it from top to bottom"
    assert all(cell.outputs for cell in cells)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    said = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "-cifar10: " in said, "executed in smoke mode"
    assert "TODO" not in "".join(cell.source for cell in read(name).cells), "numbers or an address are still to be filled in"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_shows_on_github(name):
    """No widget state, which blanks the page; no GIF, shown as text; no transparent ground, unreadable in dark mode."""
    assert "widgets" not in read(name).metadata
    cells = code_cells(name)
    assert not any("image/gif" in output.get("data", {}) for cell in cells for output in cell.outputs)
    for picture in pictures(cells):
        assert picture.convert("RGBA").getextrema()[3] == (255, 255)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_has_what_every_chapter_has(name):
    text = "\n".join(cell.source for cell in read(name).cells)
    prose = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    for wanted in ("**The question.**", "**Device and minutes.**", "## Something to break", "## Exercises", "Measured"):
        assert wanted in prose
    assert prose.count("<summary>Hint</summary>") == prose.count("<summary>Solution</summary>") == 3
    assert prose.count("<details>") == prose.count("</details>") == 6
    for call in ("show(", "chapter_run(", "loss_curve(", "picture(", "animate("):
        assert call in text
    assert not re.search(r"pip install[^\n]*torch", text), "Colab has its own torch"
    assert "tqdm.auto" not in text


# ---- lab/notebook.py


def test_a_variant_has_a_run_of_its_own(monkeypatch, tmp_path, capsys):
    asked = []

    def fake(chapter, data, overrides, folder, **_):
        asked.append(folder.name)
        return notebook.Run(folder, chapter, data, None, {"parameters": 1, "minutes": 1.0, "machine": "here"})

    monkeypatch.setattr(notebook, "RUNS", tmp_path)
    monkeypatch.setattr(notebook, "SMOKE", False)
    monkeypatch.setattr(notebook, "train_run", fake)
    notebook.chapter_run("flow", "cifar10")
    notebook.chapter_run("flow", "cifar10", objective="ddpm")
    notebook.chapter_run("tokenizer", "cifar10", bottleneck="vq", minutes=3)
    notebook.chapter_run("tokenizer", "cifar10", bottleneck="vq", widths=(64, 128, 128), minutes=3)
    notebook.chapter_run("tokenizer", "cifar10", bottleneck="vq", minutes=3, perceptual=0.0)
    assert asked == ["flow-cifar10", "flow-ddpm-cifar10", "tokenizer-vq-3min-cifar10", "tokenizer-vq-64x128x128-3min-cifar10",
                     "tokenizer-vq-3min-perceptual0.0-cifar10"]
    assert "1.0 minutes on here" in capsys.readouterr().out


def test_show_prints_the_source_and_where_it_stands(monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "display", shown.append)
    notebook.show(Training, notebook.picture)
    assert shown[0].data.startswith("`nanogen/lab/train.py, line ") and "```python\n@dataclass\nclass Training" in shown[0].data
    assert "\ndef picture(" in shown[1].data and os.sep not in shown[1].data.split("`")[1].replace("/", "")


def test_an_animation_is_a_png_that_moves(monkeypatch):
    import numpy as np

    shown = []
    monkeypatch.setattr(notebook, "display", shown.append)
    frames = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 8, 3), dtype=np.uint8)
    notebook.animate(frames, columns=3, scale=2)
    notebook.picture(frames[0], columns=3, scale=2)
    moving, still = (Image.open(io.BytesIO(image.data)) for image in shown)
    assert moving.format == still.format == "PNG"
    assert moving.n_frames == 4 and moving.size == still.size == (3 * 18 + 2, 2 * 18 + 2)
