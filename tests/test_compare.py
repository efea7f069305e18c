"""The comparison and the tour: each method has its row, and nothing is trained a second time."""

import os
import subprocess
import sys

import pytest
import torch

from nanogen import UserError
from nanogen.__main__ import main
from nanogen.data.datasets import load
from nanogen.lab import machine, recipes, report, runs, tour
from nanogen.lab.recipes import find_recipe, minutes_here

SMALL = {  # fields of Configs
    "judge": dict(widths=(16, 16, 16)),
    "tokenizer": dict(widths=(16, 16), blocks=1),
    "pixel_ar": dict(width=32, depth=1, heads=2, size=4),
    "token_ar": dict(width=32, depth=1, heads=2),
    "maskgit": dict(width=32, depth=1, heads=2),
    "var": dict(width=32, depth=1, heads=2),
    "mar": dict(width=32, depth=1, heads=2, head_width=32),
    "flow": dict(widths=(16, 32), width=32),
    "meanflow": dict(widths=(16, 32), width=32),
    "codec": dict(widths=(4, 4, 4), crop=1024),
    "audio_lm": dict(width=32, depth=1, heads=2),
    "wave_ar": dict(width=16, layers=2, sample_width=16, crop=1024),
}
SAMPLING = {
    "wave_ar": dict(seconds=0.1),
    "token_ar": dict(guidance=2.0),
    "maskgit": dict(steps=2, guidance=2.0),
    "var": dict(guidance=2.0),
    "flow": dict(steps=3, guidance=2.0),
    "mar": dict(steps=2, guidance=2.0, head_steps=5),
}
NAMES = ["pixel_ar", "token_ar", "maskgit", "var", "mar, mse", "mar, diffusion", "mar, flow",
         "flow", "meanflow"]


def small_recipe(method, data, kind, name="default"):
    find_recipe(method, data, kind, name)  # refuses an unknown one
    return {"training": dict(steps=2, batch_size=8, compile=False), "config": SMALL[method],
            "sampling": SAMPLING.get(method, {})}


@pytest.fixture(scope="module")
def small_recipes():
    with pytest.MonkeyPatch.context() as patch:
        for module in (recipes, runs, tour):
            patch.setattr(module, "find_recipe", small_recipe)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory, small_recipes):
    """(data, folder, rows) of a comparison of tiny networks, each trained for a step or two."""
    folder, data = tmp_path_factory.mktemp("compared") / "all", load("scenes", count=200)
    return data, folder, tour.compare(data, 0.002, folder, n=10)


def test_every_method_has_a_row_with_what_it_cost_and_what_it_gave(compared):
    rows = {row["method"]: row for row in compared[2]}
    assert list(rows) == NAMES
    for name, row in rows.items():
        assert row["parameters"] > 1000 and row["s/image"] > 0 and row["minutes"] >= 0
        assert row["FD-nano"] >= 0 and row["floor"] >= 0
        assert all(0 <= row[mark] <= 1 for mark in ("class accuracy", "precision", "recall"))
        assert ("base's minutes" in row) == (name not in ("pixel_ar", "flow", "meanflow"))


def test_tokenizer_minutes_include_those_of_the_perceptual_network(compared):
    _, folder, rows = compared
    parts = [runs.read_record(folder / f"{name}-scenes")["minutes"]
             for name in ("tokenizer", "perceptual")]
    assert rows[NAMES.index("maskgit")]["base's minutes"] == sum(parts)
    assert runs.read_record(folder / "tokenizer-scenes")["training"]["minutes"] == 0.002
    assert runs.read_record(folder / "perceptual-scenes")["training"]["steps"] == 2


def test_it_leaves_a_page_and_a_table(compared):
    _, folder, rows = compared
    page, text = (folder / "index.html").read_text(), (folder / "table.md").read_text()
    assert all(name in page and name in text for name in NAMES)
    assert page.count("data:image/png") >= 2 * len(rows)
    assert (folder / "flow-scenes/samples/process.gif").exists()


def test_all_methods_are_judged_by_as_many_samples_of_one_judge(compared):
    _, folder, rows = compared
    metrics = [report.read_run(path.parent)["metrics"] for path in folder.glob("*/metrics.json")]
    assert len(metrics) == len(rows)
    assert {found["samples"] for found in metrics} == {10}
    assert len({found["judge"] for found in metrics}) == 1


def test_a_second_call_trains_nothing_again_and_says_the_same(compared, monkeypatch):
    data, folder, rows = compared
    monkeypatch.setattr(runs, "train", None)
    again = tour.compare(data, 0.002, folder, n=10)
    for before, after in zip(rows, again, strict=True):
        assert before | {"s/image": 0} == after | {"s/image": 0}


def test_a_judge_beside_the_folder_judges_here_too_if_it_is_of_this_data(compared, tmp_path):
    data, folder, _ = compared
    runs.copy_run(folder / "judge-scenes", tmp_path / "judge-scenes")
    judge = runs.judge(data, tmp_path / "new")
    assert judge.folder == tmp_path / "judge-scenes" and not (tmp_path / "new").exists()
    assert runs.judge(data, folder).folder == folder / "judge-scenes"
    other = runs.judge(load("scenes", count=100), tmp_path / "other", quiet=True)
    assert other.folder == tmp_path / "other/judge-scenes"


def test_what_is_no_comparison_is_refused(compared):
    data, folder, _ = compared
    with pytest.raises(UserError, match="not 3: --out new/RUN starts another"):
        tour.compare(data, 3, folder, n=10)
    with pytest.raises(UserError, match="at least 10 samples"):
        tour.compare(data, 3, folder, n=5)
    for name in ("songs", "clips"):
        with pytest.raises(UserError, match="compare needs images, or sounds of one class"):
            tour.compare(load(name, count=20), 3, folder)


def test_sounds_of_a_class_are_compared_in_the_same_way(small_recipes, tmp_path):
    rows = tour.compare(load("voices", count=50), 0.002, tmp_path, n=10)
    names = ["wave_ar", *(f"audio_lm, {order}" for order in ("delay", "flat", "parallel",
                                                            "latents"))]
    assert [row["method"] for row in rows] == names
    for row in rows:
        assert row["s/s of sound"] > 0 and row["FD-nano"] >= 0
        assert 0 <= row["class accuracy"] <= 1 and 0 <= row["speakers right"] <= 1
        assert ("base's minutes" in row) == (row["method"] != "wave_ar")
    assert len(list(tmp_path.glob("codec-*"))) == 1  # shared


def test_the_command_names_its_folder_after_the_data(monkeypatch):
    asked = []
    monkeypatch.setattr(tour, "compare", lambda *arguments: asked.append(arguments))
    assert main(["compare", "--data", "scenes", "--minutes", "2", "--n", "50"]) == 0
    assert asked[0][:2] == ("scenes", 2.0) and str(asked[0][2]) == "runs/compare-scenes"
    assert asked[0][3:] == (50,)


def test_the_tour_trains_what_it_tells_of_and_goes_on_where_it_was(
        small_recipes, tmp_path, monkeypatch):
    story = {"tokenizer": "An image as tokens.", "var": "Scale by scale.", "audio_lm": "A voice."}
    monkeypatch.setattr(tour, "STORY", story)
    sizes = {"scenes": 100, "voices": 50}
    page = tour.tour(tmp_path, sizes).read_text()
    assert all(text in page for text in story.values())
    assert page.count("<article") == 3 and "data:audio/wav" in page and "data:image/gif" in page
    names = ["audio_lm-voices", "codec-voices", "judge-scenes", "judge-voices", "perceptual-scenes",
             "tokenizer-multiscale-scenes", "tokenizer-scenes", "var-scenes"]
    assert sorted(path.parent.name for path in tmp_path.glob("*/config.json")) == names
    monkeypatch.setattr(runs, "train", None)
    monkeypatch.setattr(tour, "evaluate", lambda *_: {})
    tour.tour(tmp_path, sizes)


def test_the_list_has_every_method_and_its_recipes(monkeypatch):
    monkeypatch.setattr(tour, "find_recipe", find_recipe)  # not the small ones
    text = tour.list_methods()
    assert all(name in text for name in (*NAMES[:4], "audio_lm", "tokenizer (multiscale)", "codec"))
    assert "perceptual" in text and "tour" not in text and "minutes here" in text
    rows = tour.recipe_rows("sounds", here=False)
    assert {row["data"] for row in rows} == {"fsdd", "voices", "all"}
    assert tour.recipe_tables()[1].count("\n") == len(rows) + 1
    minutes = [tour.short(value) for value in (102.1, 4.004, 0.5, None)]
    assert minutes == ["100", "4", "0.5", "-"], "no exponents"


def test_the_time_of_a_recipe_goes_with_the_speed_of_the_machine(monkeypatch):
    measured = {"minutes": 2, "training_steps": 100, "gflops": 50}
    recipe = {"training": {"steps": 300}, "expected": measured}
    monkeypatch.setattr(machine, "speed", {torch.float32: 25.0}.get)
    assert minutes_here(recipe) == 12 and minutes_here({"training": {"steps": 1}}) is None


def test_a_page_is_written_where_the_locale_knows_only_ascii(tmp_path):
    code = ("from pathlib import Path; from nanogen.lab import report; from nanogen import files; "
            f"folder = Path({str(tmp_path)!r}); "
            "files.write_text(folder / 'run' / 'config.json', '{}'); "
            "rows = {'A': [{'b': '\\u732b'}]}; "
            "report.write([folder / 'run'], folder / 'index.html', '\\u732b', tables=rows)")
    locale = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], env=locale, check=True)
    assert (tmp_path / "index.html").read_text(encoding="utf-8").count("\u732b") == 3
