"""Samples and the evaluation of runs on images. Those on sounds: test_sound_lab.py."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny_tokenizer
from PIL import Image

from nanogen import UserError, judge
from nanogen.__main__ import main
from nanogen.data.datasets import load
from nanogen.files import content_hash
from nanogen.lab import evaluate as evaluation
from nanogen.lab import runs
from nanogen.lab.evaluate import evaluate, rounded
from nanogen.lab.report import write
from nanogen.lab.runs import load_run, train_run
from nanogen.lab.sample import number_of, sample

STEPS = {"maskgit": {"steps": 5}, "flow": {"steps": 5}, "dit": {"steps": 5}}  # the others have none


# ---- samples


@pytest.mark.parametrize("method", ["token_ar", "maskgit", "pixel_ar", "flow", "dit"])
def test_samples_are_written_as_promised(method, finished, tmp_path):
    run, out = finished[method], tmp_path / "samples"
    size = run.model.config.size
    drawn = sample(run, 6, out=out, guidance=2.0, **STEPS.get(method, {}))
    with np.load(out / "samples.npz") as file:
        assert set(file.files) == {"images", "labels"}
        assert file["images"].shape == (6, size, size, 3) and file["images"].dtype == np.uint8
        assert file["labels"].tolist() == [0, 0, 0, 1, 1, 1] and file["labels"].dtype == np.int64
        assert np.array_equal(file["images"], drawn["images"])
    with Image.open(out / "process.gif") as film, Image.open(out / "grid.png") as sheet:
        assert film.is_animated and sheet.width >= 6 * size
    assert not list(out.glob("*partial*"))


def test_samples_of_some_classes_and_with_frames(finished):
    run = finished["flow"]
    for labels, numbers in ((["Plum"], [1] * 4), (["1", "apple"], [1, 1, 0, 0]), ([0], [0] * 4)):
        assert sample(run, 4, {"labels": labels}, steps=2)["labels"].tolist() == numbers
    drawn = sample(run, 5, frames=True, steps=3, batch_size=2)
    assert drawn["frames"].shape == (4, 5, 32, 32, 3)
    assert np.array_equal(drawn["frames"][-1], drawn["images"])
    first, second = (sample(run, 4, steps=3, seed=seed)["images"] for seed in (1, 2))
    assert not np.array_equal(first, second)
    assert np.array_equal(run.sample(4, seed=1, steps=3), first)
    plums = sample(run, 2, {"labels": ["plum"]}, steps=3)["images"]
    assert np.array_equal(run.sample(2, label="plum", steps=3), plums)


def test_a_picture_with_a_hole_is_completed(finished, own_images, tmp_path):
    run, out = finished["flow"], tmp_path / "completed"
    file, mask = own_images / "plum" / "0.png", tmp_path / "mask.png"
    Image.fromarray(np.pad(np.full((16, 8), 255, np.uint8), ((8, 8), (4, 20)))).save(mask)
    arguments = ["sample", str(run.folder), "--n", "3", "--label", "plum", "--steps", "3"]
    for where in (["--hole", "4,8,8,16"], ["--mask", str(mask)]):
        assert main([*arguments, "--known", str(file), "--out", str(out), *where]) == 0
        with np.load(out / "samples.npz") as drawn:
            images, known, seen = drawn["images"], drawn["known"], drawn["seen"]
        picture = np.asarray(Image.open(file))
        assert (known == picture).all() and (~seen).sum() == 8 * 16 and not seen[8:24, 4:12].any()
        assert (images[:, seen] == picture[seen]).all(), "to the bit"
        assert (images[:, ~seen] != picture[~seen]).mean() > 0.5
    again = run.sample(3, label="plum", steps=3, known=picture, hole=(4, 8, 8, 16))
    assert np.array_equal(again, images)


@pytest.mark.parametrize(("method", "arguments", "said"), [
    ("flow", ["--known", "PLUM"], "Which part is to be drawn"),
    ("flow", ["--known", "PLUM", "--hole", "4,8,8"], "must be x,y,width,height"),
    ("flow", ["--known", "PLUM", "--hole", "30,8,8,8"], "inside 32x32 pixels, got 30,8,8,8"),
    ("flow", ["--hole", "4,8,8,8"], "--hole needs --known FILE"),
    ("dit", ["--known", "PLUM", "--hole", "4,8,8,8"], "only a flow on pixels"),
    ("pixel_ar", ["--known", "PLUM", "--hole", "4,8,8,8"], "unrecognized arguments: --known")])
def test_what_cannot_be_completed_is_said(method, arguments, said, finished, own_images, capsys):
    plum = str(own_images / "plum" / "0.png")
    arguments = [plum if part == "PLUM" else part for part in arguments]
    assert main(["sample", str(finished[method].folder), "--n", "2", *arguments]) != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "words"), [
    (dict(n=0), "at least 1"), (dict(labels=["pear"]), "no label 'pear'.*apple, plum"),
    (dict(labels=["2"]), "no label"), (dict(labels=["-1"]), "no label"),
    (dict(speakers=["ann"]), "no condition 'speakers': choose from labels"),
    (dict(steps=-3), "steps must be"), (dict(sparkle="red"), "no sampler setting 'sparkle'")])
def test_what_cannot_be_sampled_is_a_sentence(arguments, words, finished):
    conditions = {name: arguments[name] for name in arguments if name in ("labels", "speakers")}
    others = {name: arguments[name] for name in arguments if name not in conditions}
    with pytest.raises(UserError, match=words):
        sample(finished["flow"], **{"n": 2} | others, conditions=conditions)


@pytest.mark.parametrize(("names", "said", "number"), [
    ("A a", "a", 1), ("A a", "A", 0), ("Cat dog", "cAT", 0), ("Cat CAT", "cat", None),
    ("2 10", "1", None), ("2 10", "10", 1), ("cat dog", "1", 1), ("cat dog", 1, 1),
    ("cat dog", "\u00b2", None), ("cat dog", "-1", None), ("cat dog", "2", None),
    ("Lo\u0308we dog", "l\u00f6we", 0), (" dog", "", None), (" dog", "0", None)])
def test_a_class_is_found_by_its_own_name_first(names, said, number):
    run = SimpleNamespace(names={"labels": names.split(" ")})
    if number is None:
        with pytest.raises(UserError, match="There is no label .*: choose from "):
            number_of(said, "labels", run)
    else:
        assert number_of(said, "labels", run) == number


@pytest.mark.parametrize("name", ["judge", "tokenizer"])
def test_judges_and_tokenizers_have_nothing_to_sample(name, finished):
    with pytest.raises(UserError, match="nothing to sample"):
        sample(finished[name], 2)
    with pytest.raises(UserError, match="nothing to sample, and no use for guidance"):
        evaluate(finished[name], steps=None, guidance=2.0)


# ---- evaluation

GENERATOR = {"fd_nano", "fd_nano_floor", "fd_nano_ceiling", "class_accuracy", "precision", "recall",
             "seconds_per_image", "judge"}
METRICS = {
    "judge": {"test_accuracy", "judge"},
    "tokenizer": {"psnr", "ssim", "fd_nano", "codebook_usage", "perplexity", "codebook_size"},
    "tokenizer-kl": {"psnr", "ssim", "fd_nano", "class_accuracy"},
    "pixel_ar": {"bits_per_dim", "bits_per_dim_png", "fd_nano"},
    "maskgit": GENERATOR, "flow": GENERATOR,
}


@pytest.mark.parametrize("name", METRICS)
def test_evaluation_writes_the_metrics_of_the_method(name, copied):
    run, steps = load_run(copied(name)), 2 if name in ("maskgit", "flow") else None
    metrics = evaluate(run, n=6, quiet=True, steps=steps, guidance=None)
    assert json.loads((run.folder / "metrics.json").read_text()) == metrics
    assert metrics["parameters"] > 0 and "machine" in metrics
    judge = run.folder.parent / "judge-fruit/model.safetensors"
    assert metrics["judge"] == content_hash(judge)
    assert all(math.isfinite(metrics[key]) for key in METRICS[name] - {"judge"})
    if steps:  # what was really used
        assert metrics["steps"] == 2
        assert metrics["guidance"] == run.record["sampling"]["guidance"]
        assert (run.folder / "samples/grid.png").exists()
    if name == "tokenizer":
        assert 0 < metrics["codebook_usage"] <= 1


@pytest.mark.parametrize("count", [2, 6, 13, 25])
def test_originals_and_reconstructions_have_rows_of_their_own_and_the_size_of_the_tokenizer(
        count, own_images, tmp_path, monkeypatch):
    source, shown = load(own_images), []
    few = {name: column[:count] for name, column in source.train.items()}
    source = dataclasses.replace(source, test=few)
    tokenizer = tiny_tokenizer("none", grid=8)  # of 16x16 pixels, from 32x32
    run = SimpleNamespace(model=tokenizer, folder=tmp_path)
    monkeypatch.setattr(tokenizer, "encode", lambda images: images)
    monkeypatch.setattr(tokenizer, "decode", lambda images: -images)
    monkeypatch.setattr(evaluation, "grid", lambda images, columns: shown.append(
        (images, columns)) or Image.new("RGB", (1, 1)))
    expert, sizes = judge.Judge(judge.Config(widths=(16, 16, 16), classes=2)).eval(), []
    features = expert.features
    monkeypatch.setattr(expert, "features", lambda x: sizes.append(x.shape[-1]) or features(x))
    evaluation.evaluate_tokenizer(run, source, expert, count)
    assert set(sizes) == {32}, "the size that the judge has learned"
    images, columns = shown[0]
    rows = np.split(images, len(images) // columns)
    assert columns == min(10, count) and images.shape[1:] == (16, 16, 3)
    assert len(rows) == (4 if count > 20 else 2)
    for original, reconstruction in zip(rows[::2], rows[1::2], strict=True):
        assert (abs(255.0 - original - reconstruction) <= 1).all()


def test_what_could_not_be_measured_is_left_out():
    result = {"a": 0.123456, "b": math.nan, "c": {"d": math.nan, "e": 1}}
    assert rounded(result) == {"a": 0.12346, "c": {"e": 1}}


def test_the_report_takes_every_kind_of_run(finished, tmp_path):
    page = write([run.folder for run in finished.values()], tmp_path / "report.html").read_text()
    assert page.count("<svg") + page.count("data:image/png") >= len(finished)
    assert "maskgit on fruit" in page


def test_a_run_that_is_named_by_a_dot_has_the_judge_beside_it(copied, monkeypatch):
    folder = copied("flow")
    monkeypatch.chdir(folder)
    assert evaluate(load_run("."), n=4, steps=1, quiet=True)["fd_nano"] >= 0
    assert not list(folder.glob("judge-*"))


def test_data_that_was_moved_is_known_by_its_content(
        copied, own_images, tmp_path, monkeypatch):
    folder, place = copied("flow"), shutil.copytree(own_images, tmp_path / "animals")
    record = json.loads((folder / "config.json").read_text())
    record["data"]["origin"] = str(tmp_path / "gone")
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="trained on .*gone, which is not there: evaluate --data"):
        load_run(folder).dataset()
    said = ["evaluate", folder, "--data", place, "--n", 4, "--steps", 1]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train", None)  # judge-fruit is of the same data
        assert main([str(part) for part in said]) == 0
    assert train_run("flow", place, {}, folder, resume=True).record["steps"] == 3, "as it is"
    (folder / "model.safetensors").unlink()
    data = train_run("flow", place, {"steps": 4}, folder, resume=True, quiet=True).record["data"]
    assert data["name"] == "animals" and data["origin"] == str(place)
    (place / "plum/0.png").unlink()
    assert main([str(part) for part in said]) == 1, "other content is other data"


def test_another_folder_of_the_same_name_needs_another_place_for_its_judge(
        copied, own_images, tmp_path):
    other = shutil.copytree(own_images / "plum", tmp_path / "fruit/plum").parent
    folder = copied("judge").parent
    assert runs.judge(load(own_images), folder).folder == folder / "judge-fruit"
    with pytest.raises(UserError, match="judge-fruit was trained on other data than fruit is now"):
        runs.judge(load(other), folder, quiet=True)
