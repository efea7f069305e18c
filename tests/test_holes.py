"""The holes of the notebooks: the committed answer passes the asserts of its cell, and plausible
wrong answers do not."""

import ast
import json
from pathlib import Path

import nbformat
import pytest

from nanogen.data.datasets import load

FOLDER = Path(__file__).parents[1] / "notebooks"
# Cell -> the committed answer of each hole -> wrong ones.
WRONG = json.loads((Path(__file__).parent / "holes.json").read_text(encoding="utf-8"))
NEEDS = {"00-rotary": ["00-attention"], "00-model": ["00-attention", "00-rotary"],
         "13-build": ["13-picture"]}  # cells whose functions a cell calls
KEPT = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef


def cells_of(chapter: str) -> dict[str, str]:
    path = next(FOLDER.glob(f"{chapter}_*.ipynb"))
    return {cell.id: cell.source for cell in nbformat.read(path, 4).cells
            if cell.cell_type == "code" and not cell.source.startswith("# On Colab")}


def prepared(cells: dict[str, str], cell: str) -> dict:
    """The imports of a notebook, the functions of its first cells, and those that `cell` needs."""
    names = {}
    for name in [*list(cells)[:1], *NEEDS.get(cell, [])]:
        nodes = [node for node in ast.parse(cells[name]).body if isinstance(node, KEPT)]
        exec(compile(ast.Module(nodes, []), name, "exec"), names)
    if cell == "13-build":
        scores = load("songs", count=4).test["scores"]
        names["real"] = [names["songs"].from_text(str(text)) for text in scores]
    return names | {"show_images": lambda *_, **__: None}


@pytest.mark.parametrize("cell", WRONG)
def test_the_right_answer_passes_and_wrong_ones_do_not(cell, capsys):
    cells = cells_of(cell[:2])
    source, holes = cells[cell], WRONG[cell]
    assert source.count("# HOLE") == len(holes)
    exec(source, prepared(cells, cell))
    for right, answers in holes.items():
        assert source.count(right) == 1, f"{right} is not in the cell once"
        for wrong in answers:
            with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
                exec(source.replace(right, wrong), prepared(cells, cell))
                pytest.fail(f"{wrong} passes instead of {right}", pytrace=False)


def test_every_hole_is_tried():
    found = {id for path in FOLDER.glob("*.ipynb") for id, source in cells_of(path.name[:2]).items()
             if "# HOLE" in source}
    assert found == WRONG.keys()
