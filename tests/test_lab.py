"""The lab: optimizer, training loop, runs, samples and metrics. What is interrupted goes on; what is broken says so."""

import errno
import json
import math
import os
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import awake, briefly, tiny, tiny_data, tiny_tokenizer
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nanogen import UserError
from nanogen.__main__ import main
from nanogen.data import datasets
from nanogen.data.datasets import load
from nanogen.lab import compare, judges, machine, runs
from nanogen.lab import evaluate as evaluation
from nanogen.lab import prepare as preparation
from nanogen.lab.evaluate import evaluate, rounded
from nanogen.lab.files import write_atomically
from nanogen.lab.optimizer import Muon, make_optimizers, orthogonalize
from nanogen.lab.report import write
from nanogen.lab.runs import content_hash, load_data, load_run, make_config, prepare, recipes, to_tensor, train_run, typed
from nanogen.lab.sampling import sample
from nanogen.lab.train import Training, check_options, draw_batch, train, update_average

# --- The optimizer


@pytest.mark.parametrize("shape", [(8, 8), (40, 16), (16, 40), (1, 12), (64, 3)])
def test_muon_follows_every_direction_of_a_matrix_by_about_the_same_amount(shape):
    matrix = torch.randn(shape) * torch.logspace(0, -1, shape[1])
    direction = orthogonalize(matrix)
    values = torch.linalg.svdvals(direction)
    assert direction.shape == shape and values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert ((direction * (u @ v)).sum() / (direction.norm() * (u @ v).norm())) > 0.95
    assert torch.allclose(orthogonalize(1000 * matrix), direction, atol=1e-4)  # the size of the gradient says nothing


def test_muon_treats_matrices_of_one_shape_together_as_it_treats_each_alone():
    weights = [nn.Parameter(torch.randn(size)) for size in ((8, 4), (8, 4), (4, 4, 2, 1), (8, 4))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    alone = [nn.Parameter(weight.detach().clone()) for weight in weights]
    for one, weight in zip(alone, weights, strict=True):
        one.grad = weight.grad.clone()
    together, each = Muon(weights, lr=0.1), [Muon([one], lr=0.1) for one in alone]
    for _ in range(3):
        for optimizer in (together, *each):
            optimizer.step()
    for one, weight in zip(alone, weights, strict=True):
        torch.testing.assert_close(one, weight)


def test_a_step_of_muon_is_as_large_as_one_of_adamw():
    weight = nn.Parameter(torch.zeros(64, 32, 1, 1))
    weight.grad = torch.randn_like(weight)
    Muon([weight], lr=0.1).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.3)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("chapter", ["pixel_ar", "token_ar", "maskgit", "var", "mar", "flow", "dit", "meanflow", "tokenizer"])
def test_every_weight_is_in_exactly_one_optimizer(chapter, kind):
    model = tiny_tokenizer() if chapter == "tokenizer" else tiny(chapter)
    optimizers = make_optimizers(model, kind, 1e-3, 0.1, torch.float32)
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    by_muon = {id(p) for o in optimizers if isinstance(o, Muon) for group in o.param_groups for p in group["params"]}
    assert bool(by_muon) == (kind == "muon")
    for module in model.modules():
        if isinstance(module, nn.Embedding) or getattr(module, "adamw", False):
            assert not by_muon & {id(p) for p in module.parameters(recurse=False)}
    assert not by_muon & {id(p) for p in model.parameters() if p.ndim < 2}
    undecayed = {id(p) for o in optimizers for group in o.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert undecayed == {id(p) for p in model.parameters() if p.ndim < 2}


# --- The batches


def counted(count, batch_size, **options):
    return {"number": torch.arange(count)}, Training(batch_size=batch_size, **options)


def test_every_example_comes_once_an_epoch_in_another_order_each_time():
    data, options = counted(20, 4)
    epochs = [torch.cat([draw_batch(data, 5 * epoch + i, options)["number"] for i in range(5)]) for epoch in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    other = torch.cat([draw_batch(data, i, Training(batch_size=4, seed=1))["number"] for i in range(5)])
    assert not torch.equal(epochs[0], other)


def test_processes_share_the_same_batch():
    data, options = counted(20, 8)
    whole = draw_batch(data, 3, options)["number"]
    parts = [draw_batch(data, 3, options, rank, world=4)["number"] for rank in range(4)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(), whole)


def test_fewer_examples_than_a_batch_are_one_batch():
    data, options = counted(3, 8)
    assert sorted(draw_batch(data, 5, options)["number"].tolist()) == [0, 1, 2]


def test_half_of_the_pictures_are_mirrored_and_all_are_floats():
    images = torch.arange(256).view(1, 1, 1, 256).expand(400, 3, 1, 256).byte()
    batch = draw_batch({"images": images}, 0, Training(batch_size=400))["images"]
    mirrored = batch[:, 0, 0, 0] == 1
    assert 150 < mirrored.sum() < 250 and batch.dtype == torch.float32 and batch.min() == -1 and batch.max() == 1
    assert torch.equal(batch[mirrored][0].flip(-1), batch[~mirrored][0])
    assert (draw_batch({"images": images}, 0, Training(batch_size=400, flip=False))["images"][:, 0, 0, 0] == -1).all()
    parts = [draw_batch({"images": images}, 0, Training(batch_size=400), rank, 2)["images"] for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), batch)


def test_a_batch_that_processes_cannot_share_evenly_is_a_sentence(monkeypatch):
    """Their gradients are averaged with equal weights, whoever has more examples."""
    monkeypatch.setattr("nanogen.lab.train.join_processes", lambda: (0, 3))
    for count, batch_size in ((64, 16), (64, 2), (2, 3), (16, 24)):
        with pytest.raises(UserError, match=f"batch_size must be a multiple of 3, .* {count}, .*got {batch_size}"):
            check_options(Training(batch_size=batch_size), count)
    for count, batch_size in ((64, 15), (15, 24)):
        check_options(Training(batch_size=batch_size), count)


# --- The moving average


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3])
def test_the_mean_age_of_the_average_is_the_given_share_of_the_run(share):
    """The weight at step i is i, so the average tells the mean step, and the age is how far that lies back."""
    model = nn.Linear(1, 1, bias=False)
    average = {"weight": torch.zeros(1, 1)}
    for step in range(1, 1001):
        nn.init.constant_(model.weight, step)
        update_average(average, model, step, share)
        if step in (200, 1000):
            assert (step - average["weight"].item()) / step == pytest.approx(share, rel=0.05, abs=2 / step)


def test_constant_weights_stay_and_buffers_are_copied():
    model = nn.BatchNorm1d(3)
    average = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for step in range(1, 6):
        update_average(average, model, step, 0.03)
        assert all(torch.allclose(average[name].float(), value.float()) for name, value in model.state_dict().items())
    model.weight.data += 1
    update_average(average, model, 6, 0.0)  # share 0: no averaging
    assert torch.equal(average["weight"], model.weight)


# --- The loop


class Counter(nn.Module):
    """One weight, whose loss is what a function of the step says; the gradient is always 1."""

    def __init__(self, loss=lambda step: 1.0):
        super().__init__()
        self.weight, self.step, self.value = nn.Parameter(torch.zeros(2)), 0, loss

    def loss(self, batch):
        self.step += 1
        return self.weight.sum() - self.weight.sum().detach() + self.value(self.step), {}


DATA = {"labels": torch.zeros(64, dtype=torch.long)}


def test_the_learning_rate_rises_holds_and_falls_to_zero():
    log = train(Counter(), DATA, briefly(100, lr=1.0, warmup=0.1, hold=0.5), quiet=True)
    rates = [line["lr"] for line in log]
    assert len(rates) == 100 and rates[0] == 0 and rates[5] == pytest.approx(0.5) and max(rates) == 1
    assert rates[10:50] == [1.0] * 40 and rates[75] == pytest.approx(0.5) and rates[-1] == pytest.approx(0.02)


def test_a_budget_in_minutes_ends_in_time_and_the_model_holds_the_average():
    model = Counter()
    log = train(model, DATA, Training(minutes=0.005, batch_size=8, compile=False, save_every=9e9), quiet=True)
    assert 0.004 < log[-1]["minutes"] < 0.2 and log[-1]["step"] == model.step > 1
    assert not model.training and model.weight.mean() < 0  # downhill
    assert [line["percent"] for line in log] == sorted({line["percent"] for line in log})


def test_examples_are_counted_that_a_step_has_seen_and_not_those_that_fit_into_a_batch():
    model = Counter(lambda step: time.sleep(0.02) or 1.0)
    log = train(model, {"labels": torch.zeros(4)}, briefly(3, batch_size=10_000), quiet=True)
    assert all(0 < line["examples_per_second"] <= 4 / 0.02 for line in log)


def test_a_loss_that_is_no_number_stops_the_run_with_what_to_try(tmp_path):
    with pytest.raises(UserError) as error:
        train(Counter(lambda step: math.nan if step == 30 else 1.0), DATA, briefly(50, lr=0.3), tmp_path, quiet=True)
    assert "nan" in str(error.value) and "--lr 0.1" in str(error.value) and "--warmup" in str(error.value)
    assert "keeps" not in str(error.value)  # nothing was saved yet
    with pytest.raises(UserError) as error:  # at the first step the rate is still 0: what helps is a smaller peak
        train(Counter(lambda step: math.inf), DATA, briefly(50, lr=0.3), quiet=True)
    assert "--lr 0.1" in str(error.value)


def test_what_is_saved_before_a_loss_is_no_number_is_good(tmp_path):
    """The loss is looked at once a percent, of 20 steps here; the state saved meanwhile must not be the broken one."""
    model = Counter(lambda step: math.nan if step >= 45 else 1.0)
    weights = model.loss

    def loss(batch):  # the weights break, too
        value, numbers = weights(batch)
        return value * (math.nan if model.step >= 45 else 1.0), numbers

    model.loss = loss
    with pytest.raises(UserError, match="keeps the last good state"):
        train(model, DATA, briefly(2000, save_every=0.0), tmp_path, quiet=True)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["model"]["weight"].isfinite().all() and 0 < state["step"] < 45


def test_ctrl_c_saves_and_the_next_run_goes_on(tmp_path):
    def presses_at_6(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(Counter(presses_at_6), DATA, briefly(20, save_every=9e9), tmp_path, quiet=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 6
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 6
    resumed, whole = Counter(), Counter()
    log = train(resumed, DATA, briefly(20), tmp_path, resume=True, quiet=True)
    train(whole, DATA, briefly(20), quiet=True)
    assert resumed.step == 14 and len(log) == 20 and torch.equal(resumed.weight, whole.weight)


def test_a_crash_between_the_two_files_of_a_state_loses_nothing(tmp_path, monkeypatch):
    replace, moved = os.replace, []

    def dies_after_the_first(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        train(Counter(), DATA, briefly(10, save_every=0.0), tmp_path, quiet=True)
    monkeypatch.undo()
    resumed, whole = Counter(), Counter()
    train(resumed, DATA, briefly(10), tmp_path, resume=True, quiet=True)
    train(whole, DATA, briefly(10), quiet=True)
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("fault", ["torch.save", "os.replace"])
def test_a_full_disk_is_a_sentence_and_the_old_state_stays(fault, tmp_path, monkeypatch):
    train(Counter(), DATA, briefly(10), tmp_path, quiet=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"state.pt", "log.jsonl"}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch if fault == "torch.save" else os, fault.split(".")[1], full)
    with pytest.raises(UserError, match="is the disk full"):
        train(Counter(), DATA, briefly(20), tmp_path, resume=True, quiet=True)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("damage", ["cut", "other network", "not torch"])
def test_a_damaged_state_is_a_sentence(damage, tmp_path):
    train(Counter(), DATA, briefly(10), tmp_path, quiet=True)
    path = tmp_path / "state.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "not torch":
        path.write_text("hello")
    model = nn.Module() if damage == "other network" else Counter()
    if damage == "other network":
        model.weight, model.loss = nn.Parameter(torch.zeros(3)), None
    with pytest.raises(UserError, match="damaged or belongs to another network.*delete it"):
        train(model, DATA, briefly(20), tmp_path, resume=True, quiet=True)


def test_torch_compile_that_does_not_work_is_said_once_and_training_goes_on(monkeypatch, capsys):
    def no_compiler(function, **_):
        def broken(batch):
            raise RuntimeError("no C++ compiler")
        return broken

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = Counter()
    train(model, DATA, briefly(5, compile=True), quiet=True)
    assert model.step == 5 and capsys.readouterr().out.count("goes on without") == 1


# --- Runs

TINY = {
    "judge": dict(widths=(16, 16, 16)), "tokenizer": dict(codes=32, widths=(16, 16), blocks=1, channels=4),
    "token_ar": dict(width=32, depth=1, heads=2), "maskgit": dict(width=32, depth=1, heads=2),
    "pixel_ar": dict(width=32, depth=1, heads=2, size=4), "flow": dict(widths=(16, 32), attention_at=1, width=32),
    "dit": dict(network="dit", width=32, depth=1, heads=2),
}
QUICK = dict(steps=3, batch_size=16, compile=False)


def tiny_run(chapter, data, folder, **overrides):
    return train_run("flow" if chapter == "dit" else chapter, str(data), TINY[chapter] | QUICK | overrides, folder, quiet=True)


@pytest.fixture(scope="module")
def finished(own_pictures, tmp_path_factory):
    """A folder of tiny runs on one's own pictures, tokenizers, judge and eye beneath: {chapter: Run}."""
    folder = tmp_path_factory.mktemp("runs")
    found = {"judge": tiny_run("judge", own_pictures, folder / "judge-fruit"), "eye": tiny_run("judge", own_pictures, folder / "eye-fruit")}
    for bottleneck in ("vq", "kl"):
        name = "tokenizer-fruit" if bottleneck == "vq" else "tokenizer-kl-fruit"
        found[name] = tiny_run("tokenizer", own_pictures, folder / name, bottleneck=bottleneck)
    for chapter in ("token_ar", "maskgit", "pixel_ar", "flow", "dit"):
        found[chapter] = tiny_run(chapter, own_pictures, folder / f"{chapter}-fruit")
    return found


def copy_of(run, tmp_path) -> Path:
    """All runs again, to be damaged; the folder of this one."""
    shutil.copytree(run.folder.parent, tmp_path / "runs")
    return tmp_path / "runs" / run.folder.name


@pytest.mark.parametrize("chapter", ["token_ar", "maskgit", "pixel_ar", "flow", "dit"])
def test_a_run_that_is_loaded_again_draws_the_same_pictures(chapter, finished):
    run = finished[chapter]
    assert {path.name for path in run.folder.iterdir()} >= {"config.json", "model.safetensors", "state.pt", "log.jsonl"}
    again = load_run(run.folder)
    labels, steps = torch.tensor([0, 1]), 4 if chapter in ("maskgit", "flow", "dit") else None
    drawn = [model.sample(labels, steps=steps, seed=1) for model in (run.model, again.model)]
    assert torch.allclose(*drawn, atol=1e-4)  # not equal: in another memory layout, convolutions round differently
    assert again.class_names == ["apple", "plum"] and again.chapter == run.chapter and again.config["parameters"] > 0


@pytest.mark.parametrize("chapter", ["token_ar", "maskgit", "pixel_ar", "flow", "dit"])
def test_samples_are_written_as_promised(chapter, finished, tmp_path):
    run = finished[chapter]
    size = run.model.config.size
    drawn = sample(run, 6, out=tmp_path / "samples", guidance=2.0, steps=5 if chapter in ("maskgit", "flow", "dit") else None)
    with np.load(tmp_path / "samples/samples.npz") as file:
        assert set(file.files) == {"images", "labels"}
        assert file["images"].shape == (6, size, size, 3) and file["images"].dtype == np.uint8
        assert file["labels"].tolist() == [0, 0, 0, 1, 1, 1] and file["labels"].dtype == np.int64
        assert np.array_equal(file["images"], drawn["images"])
    with Image.open(tmp_path / "samples/process.gif") as film, Image.open(tmp_path / "samples/grid.png") as sheet:
        assert film.is_animated and sheet.width >= 6 * size
    assert not list((tmp_path / "samples").glob("*.partial"))


def test_samples_of_some_classes_and_with_frames(finished):
    run = finished["flow"]
    assert sample(run, 5, ["Plum"], steps=2)["labels"].tolist() == [1] * 5
    assert sample(run, 4, ["1", "apple"], steps=2)["labels"].tolist() == [1, 1, 0, 0]
    drawn = sample(run, 5, frames=True, steps=3, batch_size=2)
    assert drawn["frames"].shape == (4, 5, 32, 32, 3) and np.array_equal(drawn["frames"][-1], drawn["images"])
    assert not np.array_equal(sample(run, 4, steps=3, seed=1)["images"], sample(run, 4, steps=3, seed=2)["images"])


@pytest.mark.parametrize(("arguments", "words"), [
    (dict(n=0), "at least 1"), (dict(labels=["pear"]), "no class 'pear'.*apple, plum"), (dict(labels=["2"]), "no class"),
    (dict(labels=["-1"]), "no class"), (dict(steps=-3), "steps must be"), (dict(colour="red"), "colour")])
def test_what_cannot_be_sampled_is_a_sentence(arguments, words, finished):
    with pytest.raises(UserError, match=words):
        sample(finished["flow"], **({"n": 2} | arguments))


@pytest.mark.parametrize("name", ["judge", "tokenizer-fruit"])
def test_judges_and_tokenizers_have_nothing_to_sample(name, finished):
    with pytest.raises(UserError, match="nothing to sample"):
        sample(finished[name], 2)
    with pytest.raises(UserError, match="nothing to sample, and no use for guidance"):
        evaluate(finished[name], steps=None, guidance=2.0)


@pytest.mark.parametrize("name", ["judge", "tokenizer-fruit", "tokenizer-kl-fruit", "maskgit", "pixel_ar", "flow"])
def test_evaluation_writes_the_metrics_of_the_chapter(name, finished, tmp_path):
    run = load_run(copy_of(finished[name], tmp_path))
    settings = {"guidance": None} | ({"steps": 2} if name in ("maskgit", "flow") else {})
    numbers = evaluate(run, n=6, quiet=True, **settings)
    assert run.read_json("metrics.json") == numbers and numbers["parameters"] > 0 and "machine" in numbers
    expected = {
        "judge": {"test_accuracy"}, "tokenizer-fruit": {"psnr", "ssim", "fd_nano", "codebook_usage", "perplexity", "vocabulary"},
        "tokenizer-kl-fruit": {"psnr", "ssim", "fd_nano", "class_accuracy"}, "pixel_ar": {"bits_per_dim", "bits_per_dim_png", "fd_nano"},
    }.get(name, {"fd_nano", "fd_nano_floor", "fd_nano_ceiling", "class_accuracy", "precision", "recall", "seconds_per_picture"})
    assert expected <= set(numbers) and all(math.isfinite(numbers[key]) for key in expected)
    if name in ("maskgit", "flow"):
        assert numbers["steps"] == 2 and numbers["guidance"] == run.config["sampling"]["guidance"]  # what was really used
        assert (run.folder / "samples/grid.png").exists()
    if name == "tokenizer-fruit":
        assert 0 < numbers["codebook_usage"] <= 1


@pytest.mark.parametrize("count", [2, 6, 13, 25])
def test_originals_and_reconstructions_have_rows_of_their_own_and_the_size_of_the_tokenizer(count, own_pictures, tmp_path, monkeypatch):
    source, shown = load(str(own_pictures)), []
    source.test_images, source.test_labels = source.train_images[:count], source.train_labels[:count]
    run = SimpleNamespace(model=tiny_tokenizer(grid=8), folder=tmp_path)  # of 16 x 16 pixels, from 32 x 32
    monkeypatch.setattr(run.model, "reconstruct", lambda images: -images)
    monkeypatch.setattr(evaluation, "grid", lambda pairs, columns: shown.append((pairs, columns)) or Image.new("RGB", (1, 1)))
    evaluation.evaluate_tokenizer(run, source, judges.Judge(judges.Config(widths=(16, 16, 16), classes=2)).eval(), count)
    pairs, columns = shown[0]
    rows = np.split(pairs, len(pairs) // columns)
    assert columns == min(10, count) and len(rows) == (4 if count > 20 else 2) and pairs.shape[1:] == (16, 16, 3)
    assert all((abs(255.0 - top - bottom) <= 1).all() for top, bottom in zip(rows[::2], rows[1::2], strict=True))


def test_what_could_not_be_measured_is_left_out():
    assert rounded({"a": 0.123456, "b": math.nan, "c": {"d": math.nan, "e": 1}}) == {"a": 0.12346, "c": {"e": 1}}


def test_the_report_takes_every_kind_of_run(finished, tmp_path):
    page = write([run.folder for run in finished.values()], tmp_path / "report.html").read_text()
    assert page.count("<svg") + page.count("data:image/png") >= len(finished) and "maskgit on fruit" in page


def test_a_finished_run_is_loaded_and_not_trained_again(finished, monkeypatch):
    monkeypatch.setattr(runs, "train", None)
    run = finished["maskgit"]
    again = train_run("maskgit", run.data, {}, run.folder, resume=True, quiet=True)
    assert torch.equal(again.model.head.free.weight, run.model.head.free.weight)
    with pytest.raises(UserError, match="exists already: --resume"):
        train_run("maskgit", run.data, {}, run.folder, quiet=True)


def test_a_finished_run_goes_on_with_a_larger_budget(finished, tmp_path):
    folder = copy_of(finished["token_ar"], tmp_path)
    run = train_run("token_ar", finished["token_ar"].data, {"steps": 6}, folder, resume=True, quiet=True)
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert run.model.config.width == 32  # what the run was trained with, not the recipe


def test_a_folder_of_pictures_is_the_same_data_however_it_is_spelled(finished, monkeypatch):
    monkeypatch.setattr(runs, "train", None)
    run = finished["flow"]
    for place, names in ((Path(run.data).parent, ("fruit", "fruit/", "./fruit")), (Path(run.data), (".", "../fruit"))):
        monkeypatch.chdir(place)
        for name in names:
            assert train_run("flow", name, {}, run.folder, resume=True, quiet=True).data == run.data
    asked = []
    monkeypatch.setattr(compare, "compare", lambda *arguments: asked.append(arguments[2]))
    assert main(["compare", "--data", "."]) == 0 and asked == [Path("runs/compare-fruit")]
    assert datasets.resolved("scenes") == "scenes" and datasets.resolved("nowhere") == "nowhere"


def test_what_is_said_on_resume_counts_or_is_refused(finished, tmp_path):
    data, folder = finished["flow"].data, copy_of(finished["flow"], tmp_path)
    for field in (dict(width=64), dict(widths=(16, 64)), dict(optimizer="adamw"), dict(seed=1)):
        with pytest.raises(UserError, match=f"begun with {next(iter(field))} .*, not "):
            train_run("flow", data, TINY["flow"] | field, folder, resume=True, quiet=True)
    (folder / "model.safetensors").unlink()
    run = train_run("flow", data, TINY["flow"] | {"lr": 1e-4, "steps": 4}, folder, resume=True, quiet=True)
    assert run.config["training"]["lr"] == 1e-4 and run.read_json("config.json")["training"] == run.config["training"]
    (folder / "state.pt").unlink()
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="without its state.pt"):
        train_run("flow", data, {"steps": 6}, folder, resume=True, quiet=True)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_tokenizer_that_has_changed_is_noticed(finished, tmp_path):
    folder = copy_of(finished["maskgit"], tmp_path)
    assert load_run(folder).config["base"]["path"] == "../tokenizer-fruit"
    weights = folder.parent / "tokenizer-fruit/model.safetensors"
    values = load_file(weights)
    values["quantizer.book.vectors"][0, 0] += 0.1
    save_file(values, weights)
    with pytest.raises(UserError, match="tokenizer-fruit has changed since the run that stands on it was trained"):
        load_run(folder)
    shutil.rmtree(folder.parent / "tokenizer-fruit")
    with pytest.raises(UserError, match="tokenizer-fruit is not a run"):
        load_run(folder)


def test_a_tokenizer_of_the_wrong_kind_is_noticed(finished, tmp_path):
    folder = copy_of(finished["maskgit"], tmp_path).parent
    shutil.rmtree(folder / "tokenizer-fruit")
    (folder / "tokenizer-kl-fruit").rename(folder / "tokenizer-fruit")
    with pytest.raises(UserError, match="tokenizer-fruit"):
        tiny_run("maskgit", finished["maskgit"].data, folder / "new")


def test_pictures_of_another_size_than_the_tokenizers_are_a_sentence(finished, tmp_path):
    folder = copy_of(finished["maskgit"], tmp_path).parent
    with pytest.raises(UserError, match="size"):
        tiny_run("maskgit", finished["maskgit"].data, folder / "new", size=16)


def test_what_is_trained_beneath_is_for_the_same_size(finished, tmp_path):
    folder = copy_of(finished["eye"], tmp_path).parent
    shutil.rmtree(folder / "tokenizer-fruit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "find_recipe", lambda chapter, *_: {"training": dict(QUICK), "config": dict(TINY[chapter])})
        run = tiny_run("maskgit", finished["maskgit"].data, folder / "new", size=16)
    assert run.model.grid == 4 and load_run(folder / "tokenizer-fruit").config["config"]["size"] == 16


@pytest.mark.parametrize("bottleneck", ["kl", "multiscale", "none"])
def test_a_bottleneck_without_words_in_a_grid_is_refused_before_it_is_trained(bottleneck, own_pictures, tmp_path):
    with pytest.raises(UserError, match="bottleneck must be vq or fsq"):
        tiny_run("maskgit", own_pictures, tmp_path / "new", bottleneck=bottleneck)
    assert not list(tmp_path.iterdir())


def test_a_reflow_draws_as_many_pairs_as_it_is_told_of_all_labels(finished):
    source = load_data(finished["flow"].data)
    model = SimpleNamespace(to=lambda device: None, prepare=lambda images, labels: {"labels": labels})
    drawn = prepare(model, source, SimpleNamespace(size=32, reflow_pairs=200), base=finished["flow"])["labels"]
    assert len(drawn) == 200 > len(source.train_labels) and set(drawn.tolist()) == set(source.train_labels.tolist())


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other network"])
def test_damaged_weights_are_a_sentence(damage, finished, tmp_path):
    folder = copy_of(finished["flow"], tmp_path)
    path = folder / "model.safetensors"
    if damage == "other network":
        shutil.copy(folder.parent / "judge-fruit/model.safetensors", path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:1000], "empty": b"", "text": b"<html>404</html>"}[damage])
    with pytest.raises(UserError, match="model.safetensors is damaged or of another network"):
        load_run(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"chapter": "opera"}', "\x00\xff", "no chapter of ours", "a new field"])
def test_a_damaged_config_is_a_sentence(text, finished, tmp_path):
    folder = copy_of(finished["flow"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"no chapter of ours": {"chapter": "opera"}, "a new field": {"config": {"sparkle": 3}}}.get(text, {})
    known = text in ("no chapter of ours", "a new field")
    (folder / "config.json").write_text(json.dumps(config) if known else text, encoding="latin-1")
    with pytest.raises(UserError):
        load_run(folder)


def test_what_is_no_run_is_a_sentence(tmp_path, finished):
    for place in (tmp_path, tmp_path / "nothing", finished["flow"].folder / "config.json"):
        with pytest.raises(UserError, match="is not a run"):
            load_run(place)
    folder = copy_of(finished["flow"], tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is not finished"):
        load_run(folder)


@pytest.mark.parametrize("overrides", [
    dict(sparkle=3), dict(widths=5), dict(widths="64"), dict(width=2.5), dict(network=3), dict(lr="fast"), dict(compile="yes")])
def test_unknown_and_mistyped_values_are_refused_by_name(overrides, own_pictures, tmp_path):
    with pytest.raises(UserError, match=next(iter(overrides))):
        train_run("flow", str(own_pictures), overrides, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides", [
    dict(optimizer="sgd"), dict(batch_size=0), dict(batch_size=-4), dict(minutes=0, steps=0), dict(hold=1.0), dict(lr=-1.0), dict(ema=1.5)])
def test_budgets_and_rates_that_make_no_sense_are_a_sentence_and_leave_no_folder(overrides, own_pictures, tmp_path):
    with pytest.raises(UserError, match="|".join(overrides)):
        train_run("judge", str(own_pictures), TINY["judge"] | QUICK | overrides, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_negative_budget_is_a_sentence_and_not_an_endless_run():
    def enough(step):
        assert step < 20, "the loop goes on and on"
        return 1.0

    for options in (briefly(-1), Training(minutes=-1.0, compile=False)):
        with pytest.raises(UserError, match="steps|minutes"):
            train(Counter(enough), DATA, options, quiet=True)


@pytest.mark.parametrize(("chapter", "overrides"), [
    ("flow", dict(network="mlp")), ("flow", dict(widths=(8, 8))), ("flow", dict(size=10)), ("pixel_ar", dict(heads=5)),
    ("pixel_ar", dict(heads=0)), ("tokenizer", dict(bottleneck="fsq", levels=(1, 1))), ("tokenizer", dict(widths=(8, 8))),
    ("tokenizer", dict(size=6)), ("tokenizer", dict(widths=()))])
def test_networks_that_cannot_be_are_a_sentence(chapter, overrides, own_pictures, tmp_path):
    perceptual = {"perceptual": 0.0} if chapter == "tokenizer" else {}
    with pytest.raises(UserError):
        train_run(chapter, str(own_pictures), TINY[chapter] | QUICK | perceptual | overrides, tmp_path / "run", quiet=True)


def test_drawn_scenes_may_be_kept_in_the_repository_where_the_data_folder_is_read_only(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_scenes", lambda folders, count: asked.append(folders) or load_nothing())
    preparation.remembered.cache_clear()
    runs.load_data("scenes")
    preparation.remembered.cache_clear()
    assert asked == [[datasets.data_folder(), datasets.REPOSITORY_DATA]]


def load_nothing():
    none = np.zeros((0, 32, 32, 3), np.uint8)
    return datasets.Images("none", none, np.zeros(0, np.int64), none, np.zeros(0, np.int64), [])


@pytest.mark.parametrize("chapter", list(runs.CHAPTERS))
def test_every_recipe_fits_its_chapter(chapter, own_pictures):
    for data, by_name in recipes(chapter).items():
        for name, recipe in by_name.items():
            config, training = make_config(chapter, recipe, {}, load(str(own_pictures)))
            assert training.minutes > 0, (data, name)
            wanted = recipe["config"] | recipe["training"]
            assert all((getattr(config, key, None) or getattr(training, key, None)) in (value, tuple(value) if isinstance(value, list) else 0)
                       for key, value in wanted.items() if value)


def test_pixel_ar_trains_at_the_size_that_its_config_names(own_pictures):
    config, _ = make_config("pixel_ar", recipes("pixel_ar")["cifar10"]["first look"], {}, load(str(own_pictures)))
    assert config.size == 16  # a chain of 32 x 32 is too long for a laptop


def test_minutes_from_the_user_replace_steps_of_the_recipe(own_pictures):
    settings = {"config": {}, "training": {"steps": 100}}
    assert make_config("judge", settings, {"minutes": 2.0}, load(str(own_pictures)))[1].steps == 0
    assert make_config("judge", settings, {"steps": 7}, load(str(own_pictures)))[1].steps == 7
    with pytest.raises(UserError, match="either minutes or steps"):
        make_config("judge", settings, {"minutes": 2.0, "steps": 7}, load(str(own_pictures)))
    assert typed(Training, {"lr": 1}, "training").lr == 1  # a whole number is a number


def test_tokens_are_encoded_once_with_their_mirror_images(own_pictures):
    source = load(str(own_pictures))
    model = tiny("maskgit", grid=16)
    tensors = prepare(model, source, model.config)
    images = to_tensor(source.train_images, 32).float() / 127.5 - 1
    half = len(images)
    assert tensors["tokens"].shape == (2 * half, 256) and torch.equal(tensors["labels"][:half], tensors["labels"][half:])
    assert torch.equal(tensors["tokens"][half:], model.tokenizer[0].encode(images.flip(-1)))


def test_flip_false_means_that_no_token_is_of_a_mirrored_picture(finished, tmp_path, monkeypatch):
    lengths = []
    monkeypatch.setattr(runs, "train", lambda model, data, *_: lengths.append(len(data["tokens"])) or [{"minutes": 0}])
    folder = copy_of(finished["maskgit"], tmp_path).parent
    for name, flip in (("mirrored", True), ("as they are", False)):
        tiny_run("maskgit", finished["maskgit"].data, folder / name, flip=flip)
    assert lengths[0] == 2 * lengths[1]


def test_what_a_tokenizer_has_encoded_is_found_again_unless_pictures_or_tokenizer_change(finished, tmp_path, monkeypatch):
    run = finished["maskgit"]
    folder = copy_of(run, tmp_path).parent
    base, source = load_run(folder / "tokenizer-fruit"), load(run.data)
    encoded = []
    monkeypatch.setattr(preparation, "prepare", lambda *arguments: encoded.append(1) or prepare(*arguments))

    def prepared():
        return preparation.prepared(run.model, source, run.model.config, True, base)

    first, again = prepared(), prepared()
    assert len(encoded) <= 1 and torch.equal(first["tokens"], again["tokens"]) and torch.equal(first["labels"], again["labels"])
    before = len(encoded)
    source.train_images = 255 - source.train_images
    assert not torch.equal(prepared()["tokens"], first["tokens"]) and len(encoded) == before + 1
    (base.folder / "model.safetensors").write_bytes((base.folder / "model.safetensors").read_bytes() + b" ")
    prepared()
    assert len(encoded) == before + 2
    for path in base.folder.glob("encoded-*"):
        path.write_bytes(b"damaged")
    assert torch.equal(prepared()["tokens"], prepared()["tokens"]) and len(encoded) == before + 3


def test_the_latents_of_a_dit_are_measured_and_kept(finished):
    run = finished["dit"]
    source = load(run.data)
    images = to_tensor(source.train_images, 32).float() / 127.5 - 1
    latents = run.model.tokenizer[0].encode(torch.cat([images, images.flip(-1)]))
    assert torch.allclose(load_run(run.folder).model.latent_std[:, 0, 0], latents.std((0, 2, 3)), rtol=1e-3)
    assert torch.allclose(run.model.latent_mean[:, 0, 0], latents.mean((0, 2, 3)), atol=1e-4)


def test_pictures_are_made_smaller_by_the_mean_of_an_area():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, :2, :2] = [[[0, 0, 8], [0, 0, 8]], [[100, 0, 8], [100, 0, 8]]]
    assert to_tensor(images, 2)[0, :, 0, 0].tolist() == [50, 0, 8] and to_tensor(images, 4).shape == (2, 3, 4, 4)


def test_the_tokenizer_and_the_eye_beneath_are_trained_first_and_said_so(own_pictures, tmp_path, monkeypatch, capsys):
    def quick(chapter):
        return {"cifar10": {name: {"training": dict(QUICK), "config": dict(TINY[chapter])} for name in ("first look", "eye")}}

    monkeypatch.setattr(runs, "recipes", quick)
    run = train_run("maskgit", str(own_pictures), {}, tmp_path / "maskgit")
    said = capsys.readouterr().out
    assert "stands on a tokenizer" in said and "needs an eye" in said
    assert {path.name for path in tmp_path.iterdir()} == {"maskgit", "tokenizer-fruit", "eye-fruit"}
    assert run.config["base"] == {"path": "../tokenizer-fruit", "hash": content_hash(tmp_path / "tokenizer-fruit")}
    assert "perceptual" in (tmp_path / "tokenizer-fruit/log.jsonl").read_text()
    assert not any("eye" in name for name in load_file(tmp_path / "tokenizer-fruit/model.safetensors"))


def test_an_unfinished_tokenizer_beneath_is_finished_first(finished, tmp_path):
    folder = copy_of(finished["maskgit"], tmp_path).parent
    (folder / "tokenizer-fruit/model.safetensors").unlink()
    run = tiny_run("maskgit", finished["maskgit"].data, folder / "new")
    assert run.config["base"]["hash"] == finished["maskgit"].config["base"]["hash"]  # the same, bit for bit


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("torch"), SafetensorError("IoError")])
def test_what_cannot_be_written_is_a_sentence_and_leaves_what_was_there(error, tmp_path):
    def full(path):
        path.write_bytes(b"half")
        raise error

    (tmp_path / "weights").write_bytes(b"whole")
    with pytest.raises(UserError, match="is the disk full"):
        write_atomically(tmp_path / "weights", full)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_a_full_disk_at_the_end_is_a_sentence_and_the_training_is_not_lost(own_pictures, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: IoError(No space left on device)")

    monkeypatch.setattr(runs, "save_file", full)
    with pytest.raises(UserError, match="is the disk full"):
        tiny_run("judge", own_pictures, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(runs.judges.Judge, "loss", None)  # no step is left to do
    run = train_run("judge", str(own_pictures), {}, tmp_path / "run", resume=True, quiet=True)
    assert run.config["minutes"] >= 0 and (run.folder / "model.safetensors").exists()


def train_run_as_one_of_two(rank: int, folder: str, data: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=200))
    if rank:
        time.sleep(1)  # the other one is ahead
    tiny_run("judge", data, Path(folder) / "run")
    dist.destroy_process_group()


def test_two_processes_write_one_run(own_pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    mp.spawn(train_run_as_one_of_two, (str(tmp_path), str(own_pictures)), nprocs=2)
    assert load_run(tmp_path / "run").config["training"]["steps"] == 3


# --- The machine


def test_precision_can_be_said_and_everything_is_described(monkeypatch):
    for name in ("float32", "bfloat16"):
        monkeypatch.setenv("NANOGEN_PRECISION", name)
        machine.precision.cache_clear()
        assert machine.precision() is getattr(torch, name) and name in machine.describe()
        with machine.autocast():
            assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype is (machine.precision() if machine.device().type == "cpu" else torch.float32)
    monkeypatch.setenv("NANOGEN_PRECISION", "float8")
    machine.precision.cache_clear()
    with pytest.raises(UserError, match="float32 or bfloat16, got float8"):
        machine.precision()
    monkeypatch.setenv("NANOGEN_PRECISION", "float32")
    machine.precision.cache_clear()


def test_the_device_that_computes_is_the_one_that_is_named_and_waited_for(monkeypatch):
    monkeypatch.setattr(machine, "device", lambda: torch.device("mps"))
    assert "MPS" in machine.describe() and "CPU" not in machine.describe()
    second, asked = torch.device("cuda:1"), []
    monkeypatch.setattr(machine, "device", lambda: second)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: asked.append(device))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: asked.append(device) or "GPU")
    machine.synchronize()
    assert machine.describe().startswith("GPU") and asked == [second, second]


@pytest.mark.parametrize("chapter", ["pixel_ar", "token_ar", "maskgit", "flow", "dit"])
def test_every_chapter_trains_and_draws_in_bfloat16(chapter, monkeypatch):
    monkeypatch.setattr(machine, "precision", lambda: torch.bfloat16)
    model = awake(tiny(chapter))
    log = train(model, tiny_data(chapter), briefly(1), quiet=True)
    steps = 16 if chapter in ("pixel_ar", "token_ar") else 2
    with machine.autocast():
        pictures = [model.sample(torch.tensor([0, 1]), steps=steps, seed=1) for _ in range(2)]
    assert math.isfinite(log[-1]["loss"]) and torch.equal(*pictures) and pictures[0].isfinite().all()
    assert all(p.dtype == torch.float32 for p in model.parameters())
