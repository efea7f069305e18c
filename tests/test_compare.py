"""The comparison: every method has its row, with what it cost, and what is trained already is left alone."""

import pytest

from nanogen import UserError
from nanogen.__main__ import main
from nanogen.lab import compare, report, runs

SMALL = {
    "judge": dict(widths=(16, 16, 16)), "tokenizer": dict(codes=32, widths=(16, 16), blocks=1, channels=4),
    "pixel_ar": dict(width=32, depth=1, heads=2, size=4), "token_ar": dict(width=32, depth=1, heads=2),
    "maskgit": dict(width=32, depth=1, heads=2), "var": dict(width=32, depth=1, heads=2),
    "mar": dict(width=32, depth=1, heads=2, head_width=32), "flow": dict(widths=(16, 32), width=32),
    "meanflow": dict(widths=(16, 32), width=32),
}
EVALUATIONS = {  # of the network for a picture, two a step where SAMPLING guides
    "pixel_ar": 16, "token_ar": 128, "maskgit": 4, "var": 12, "mar, MSE": 4, "mar, diffusion": 4, "mar, flow": 4,
    "flow": 12, "meanflow": 1,  # midpoint looks twice a step
}
SAMPLING = {
    "token_ar": dict(guidance=2.0), "maskgit": dict(steps=2, guidance=2.0), "var": dict(guidance=2.0), "flow": dict(steps=3, guidance=2.0),
    "mar": dict(steps=2, guidance=2.0, head_steps=5),
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(folder, rows) of a comparison of tiny networks on a few drawn scenes, each trained for a step or two."""
    folder = tmp_path_factory.mktemp("compared") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGEN_DATA", str(folder.parent / "no-data"))
        patch.setattr(runs, "recipes", small_recipes)
        yield folder, compare.compare("scenes", 0.002, folder, n=20, seeds=2, count=300)


def small_recipes(chapter):
    recipe = {"training": dict(steps=2, batch_size=8, compile=False), "config": dict(SMALL[chapter]), "sampling": SAMPLING.get(chapter, {})}
    return {"cifar10": {"first look": recipe, "eye": recipe}}


def test_every_method_has_a_row_with_what_it_cost_and_what_it_gave(compared):
    rows = {row["method"]: row for row in compared[1]}
    assert list(rows) == list(compare.METHODS)
    for name, row in rows.items():
        assert row["evaluations"] == EVALUATIONS[name], name
        assert row["parameters"] > 1000 and row["training TFLOPs"] > 1e-7 and row["s/picture"] > 0 and row["minutes"] >= 0
        assert row["FD-nano"] >= 0 and row["+-"] >= 0 and all(0 <= row[mark] <= 1 for mark in ("class accuracy", "precision", "recall"))
        assert ("tokenizer minutes" in row) == (name not in ("pixel_ar", "flow", "meanflow"))
    assert {name: row["of the head"] for name, row in rows.items() if "of the head" in row} == {
        "mar, MSE": 2, "mar, diffusion": 10, "mar, flow": 8}  # guided; midpoint makes 4 passes of 5


def test_a_flop_is_counted_for_every_product_of_a_step(compared):
    folder, _ = compared
    run, source = runs.load_run(folder / "token_ar-scenes"), runs.load_data("scenes", 300)
    base = runs.load_run(folder / "tokenizer-scenes")
    counted = compare.training_flops(run, source, base)
    seen = 8 * int((folder / "token_ar-scenes/log.jsonl").read_text().splitlines()[-1].split('"step": ')[1].split(",")[0])
    blocks = sum(p.numel() for p in run.model.transformer.parameters() if p.dim() == 2)
    assert counted > 6 * 0.5 * blocks * 64 * seen  # 6 a weight and token, but for modulations, which are once a picture


def test_a_step_has_no_more_pictures_than_there_are(compared):
    folder, _ = compared
    run, source = runs.load_run(folder / "flow-scenes"), runs.load_data("scenes", 300)
    run.config["training"]["batch_size"] = 300
    counted = compare.training_flops(run, source)
    run.config["training"]["batch_size"] = 10_000
    assert compare.training_flops(run, source) == counted


def test_it_leaves_a_page_and_a_table(compared):
    folder, rows = compared
    page, text = (folder / "index.html").read_text(), (folder / "table.md").read_text()
    assert all(name in page and name in text for name in compare.METHODS) and page.count("data:image/png") >= 2 * len(rows)
    assert report.read_run(folder / "flow-scenes").metrics["seeds"] == 2 and (folder / "flow-scenes/samples/process.gif").exists()


def test_a_second_call_trains_nothing_again_and_says_the_same(compared, monkeypatch, capsys):
    folder, rows = compared
    monkeypatch.setattr(runs, "train", None)
    again = compare.compare("scenes", 0.002, folder, n=20, seeds=2, count=300)
    for before, after in zip(rows, again, strict=True):
        assert {name: v for name, v in before.items() if name != "s/picture"} == {n: v for n, v in after.items() if n != "s/picture"}


def test_runs_of_another_budget_are_no_comparison(compared):
    with pytest.raises(UserError, match="not 3: choose another --out"):
        compare.compare("scenes", 3, compared[0], n=20, count=300)
    for numbers in (dict(n=5), dict(seeds=0)):
        with pytest.raises(UserError, match="at least 10 samples and 1 seed"):
            compare.compare("scenes", 3, compared[0], count=300, **numbers)


def test_the_command_names_its_folder_after_the_data(monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "compare", lambda *arguments: asked.append(arguments))
    assert main(["compare", "--data", "scenes", "--minutes", "2", "--n", "50"]) == 0
    assert asked[0][:2] == ("scenes", 2.0) and str(asked[0][2]) == "runs/compare-scenes" and asked[0][3:] == (50, 1)
