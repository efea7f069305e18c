"""The holes of the notebooks: the committed answer passes the asserts of its cell, and plausible
wrong answers do not."""

import ast
from pathlib import Path

import nbformat
import pytest

from nanogen.data.datasets import load

FOLDER = Path(__file__).parents[1] / "notebooks"
SCORES = "q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])"
SPLIT = "[a * cos - b * sin, b * cos + a * sin]"
JOIN = "torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)"
TIMED = "self.norm(self.first(x)) + self.time(time)[:, :, None, None]"
RATE = "peak * min((step + 1) / warmup, fall, 1.0)"
SHARED = "extra.cumsum(0).round().diff(prepend=torch.zeros(1))"
MASKED = "logits.masked_fill(~allowed, -torch.inf)"
MEAN = "(h * weight).sum(1) / weight.sum(1).clamp(min=1)"
WRONG = {  # cell -> the committed answer of each hole, and wrong ones
    "00-attention": {
        SCORES: ("q @ k.transpose(-1, -2)", "q @ k.transpose(-1, -2) / q.shape[-1]",
                 "q @ k.transpose(-1, -2) / math.sqrt(q.shape[-2])"),
        ".tril(S - T)": (".tril()", ".tril(-1)", ".triu()", ".tril(T - S)", ".tril(1)")},
    "00-rotary": {SPLIT: ("[a * cos + b * sin, b * cos - a * sin]", "[a * cos, b * sin]",
                          "[a * cos - b * sin, b * cos - a * sin]",
                          "[b * cos + a * sin, a * cos - b * sin]")},
    "00-model": {JOIN: ("torch.cat([k, past_k], 2), torch.cat([v, past_v], 2)",
                        "torch.cat([past_k, k], 2), v", "past_k, past_v",
                        "torch.cat([past_k, k], 2), torch.cat([v, past_v], 2)")},
    "00-unet": {
        TIMED: ("self.norm(self.first(x))", "self.norm(self.first(x)) + self.time(time)",
                "self.norm(self.first(x) + self.time(time)[:, :, None, None])",
                "self.norm(self.first(x)) * self.time(time)[:, :, None, None]"),
        "maps.pop()": ("maps.pop(0)", "maps[-1]", "maps[0]", "x")},
    "00-schedule": {
        RATE: ("peak * min((step + 1) / warmup, fall)", "peak * min((step + 1) / warmup, 1.0)",
               "peak * max((step + 1) / warmup, fall)", "peak * (step + 1) / warmup * fall",
               "peak * min(fall, 1.0)"),
        "beta * old + (1 - beta) * new": ("(1 - beta) * old + beta * new", "(old + new) / 2",
                                          "old + (1 - beta) * new", "new")},
    "00-frechet": {
        "(a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2": (
            "(a.mean() - b.mean()) ** 2 + (a.var() - b.var()) ** 2",
            "(a.mean() - b.mean()) ** 2", "(a.mean() - b.mean()) ** 2 + a.var() + b.var()"),
        "root(middle).trace()": ("middle.trace()", "root(middle).sum()",
                                 "(root(cov_a) @ root(cov_b)).trace()",
                                 "(cov_a * cov_b).sqrt().trace()")},
    "12-08": {
        SHARED: ("extra.round()", "extra.floor()", "extra.cumsum(0).round()",
                 "extra.cumsum(0).floor().diff(prepend=torch.ones(1))"),
        "voice = torch.where(drawn, NULL, seen)": ("voice = seen",
                                                   "voice = torch.where(drawn, seen, NULL)",
                                                   "voice = torch.where(seen >= 0, NULL, seen)"),
        "torch.where(drawn, NULL, -1)": ("torch.where(drawn, NULL, seen)",
                                         "torch.where(drawn, seen, -1)",
                                         "torch.full_like(seen, NULL)")},
    "13-build": {
        MASKED: ("logits", "logits.masked_fill(allowed, -torch.inf)",
                 "logits.masked_fill(~allowed, 0.0)", "logits * allowed"),
        "np.searchsorted(ends, middle)": ("np.searchsorted(ends, middle) + 1",
                                          "np.searchsorted(seconds, middle)",
                                          "np.searchsorted(ends, middle - ends[0])",
                                          "np.repeat(np.arange(len(ends)), 3)")},
    "14-08": {
        "x.permute(0, 3, 4, 1, 2)": ("x.permute(0, 1, 3, 4, 2)", "x.movedim(2, 4)",
                                     "x.permute(0, 4, 3, 1, 2)", "x.permute(0, 3, 4, 2, 1)"),
        "torch.arange(T) >= known[:, None]": ("torch.arange(T) > known[:, None]",
                                              "torch.arange(T) < known[:, None]",
                                              "torch.arange(T) >= 0 * known[:, None]")},
    "15-06": {
        "torch.zeros(outputs, rank)": ("torch.randn(outputs, rank)", "torch.zeros(rank, outputs)",
                                       "torch.zeros(outputs, inputs)"),
        "x @ self.A.T @ self.B.T": ("x @ self.B @ self.A", "x @ self.A.T",
                                    "x @ self.A.T @ self.B.T * 2",
                                    "self.layer(x) @ self.B @ self.B.T")},
    "16-build": {
        "ranks >= left": ("ranks < left", "ranks > left", "ranks == left"),
        MEAN: ("h.mean(1)", "(h * weight).mean(1)", "(h * weight).sum(1)",
               "(h * weight).sum(1) / weight.sum(1)")},
}
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
