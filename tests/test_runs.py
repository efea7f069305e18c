"""Runs: a folder becomes a model again; what is interrupted goes on; what is broken says so."""

import errno
import fcntl
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import QUICK, TINY, tiny_run
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanogen import UserError, judge
from nanogen.__main__ import main
from nanogen.data import datasets
from nanogen.files import content_hash, write_atomically
from nanogen.lab import recipes, runs
from nanogen.lab.runs import load_run, train_run
from nanogen.lab.sample import encode, sample

LABELS = {"labels": torch.tensor([0, 1])}
METHODS = ["token_ar", "maskgit", "pixel_ar", "flow", "dit"]


def settings(method: str, steps: int) -> dict:
    """Of the samplers, only these have a number of steps."""
    return {"steps": steps} if method in ("maskgit", "flow", "dit") else {}


def origin(run) -> str:
    return run.record["data"]["origin"]


def resumed(method: str, run, folder: Path, **fields):
    return train_run(method, origin(run), fields, folder, resume=True, quiet=True)


def edit_record(folder: Path, **changes) -> None:
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | changes))


# ---- a folder becomes a model again


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_loaded_again_draws_the_same_images(method, finished):
    run = finished[method]
    files = {"config.json", "model.safetensors", "state.pt", "log.jsonl"}
    assert {path.name for path in run.folder.iterdir()} >= files
    again = load_run(run.folder)
    drawn = [model.sample(LABELS, seed=1, **settings(method, 4))["images"]
             for model in (run.model, again.model)]
    # Not equal: in another memory layout, convolutions round differently.
    assert torch.allclose(*drawn, atol=1e-4)
    assert again.names["labels"] == ["apple", "plum"] and again.method == run.method
    assert again.record["parameters"] > 0


def test_a_run_does_not_depend_on_the_tokenizer_beside_it(finished, copied, tmp_path):
    """It has a copy of its own: the other one may be retrained, deleted or left behind."""
    folder = copied("maskgit")
    before, shared = sample(load_run(folder), 4, steps=2), folder.parent / "tokenizer-fruit"
    required = load_run(folder).record["requires"]
    assert required["name"] == "tokenizer-fruit" and required["method"] == "tokenizer"
    assert required["hash"] == content_hash(shared / "model.safetensors")
    values = load_file(shared / "model.safetensors")
    values["quantizer.codebook.vectors"] += 1
    save_file(values, shared / "model.safetensors")
    assert np.array_equal(sample(load_run(folder), 4, steps=2)["images"], before["images"])
    shutil.rmtree(shared)
    moved = folder.rename(tmp_path / "alone")
    assert np.array_equal(sample(load_run(moved), 4, steps=2)["images"], before["images"])
    (moved / "model.safetensors").unlink()  # as if it had been interrupted
    assert resumed("maskgit", finished["maskgit"], moved, steps=4).record["steps"] == 4
    shutil.rmtree(moved / "base")
    with pytest.raises(UserError, match="base is not a run"):
        load_run(moved)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other network"])
def test_damaged_weights_are_a_sentence(damage, copied):
    folder = copied("flow")
    path = folder / "model.safetensors"
    content = {"cut": path.read_bytes()[:1000], "empty": b"", "text": b"<html>404</html>"}
    other = (folder.parent / "judge-fruit/model.safetensors").read_bytes()
    path.write_bytes(content.get(damage, other))
    with pytest.raises(UserError, match="model.safetensors is damaged or of another network"):
        load_run(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"method": "opera"}', "\x00\xff"])
def test_a_damaged_record_is_a_sentence(text, copied):
    folder = copied("flow")
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="config.json is damaged or of an older version"):
        load_run(folder)


@pytest.mark.parametrize(("change", "words"), [
    ({"method": "opera"}, "damaged or of an older version"),
    ({"config": {"sparkle": 3}}, "no setting 'sparkle'")])
def test_a_record_of_another_version_is_a_sentence(change, words, copied):
    folder = copied("flow")
    edit_record(folder, **change)
    with pytest.raises(UserError, match=words):
        load_run(folder)


def test_what_is_no_run_is_a_sentence(copied, tmp_path, finished):
    for place in (tmp_path, tmp_path / "nothing", finished["flow"].folder / "config.json"):
        with pytest.raises(UserError, match="is not a run"):
            load_run(place)


def test_an_unfinished_run_has_the_ema_of_its_saved_state(copied):
    folder = copied("tokenizer")
    finished, images = load_run(folder), torch.rand(2, 3, 32, 32)
    file = folder.parent / "image.png"
    shutil.copy(Path(origin(finished)) / "apple/0.png", file)
    encode(finished, file, folder.parent / "tokens.npz")
    (folder / "model.safetensors").unlink()
    again = load_run(folder)
    assert torch.equal(again.model.encode(images), finished.model.encode(images))
    with pytest.raises(UserError, match="is not finished: train it with --resume"):
        encode(again, file, folder.parent / "more.npz")  # another state has other tokens
    (folder / "state.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="state.pt is damaged or belongs to another network"):
        load_run(folder)
    (folder / "state.pt").unlink()
    with pytest.raises(UserError, match="has no weights yet: train it with --resume"):
        load_run(folder)


# ---- going on


def test_a_finished_run_is_loaded_and_not_trained_again(finished, monkeypatch):
    monkeypatch.setattr(runs, "train", None)
    run = finished["maskgit"]
    again = resumed("maskgit", run, run.folder)
    assert torch.equal(again.model.head.free.weight, run.model.head.free.weight)
    with pytest.raises(UserError, match="exists already: --resume"):
        train_run("maskgit", origin(run), {}, run.folder, quiet=True)


def test_a_finished_run_stays_what_it_is(finished, copied, monkeypatch):
    monkeypatch.setattr(runs, "train", None)
    run, folder = finished["flow"], copied("flow")
    for fields in (dict(lr=0.1), dict(steps=6), dict(minutes=2.0)):
        with pytest.raises(UserError, match=f"is finished with {next(iter(fields))} .*: --out new"):
            resumed("flow", run, folder, **fields)
    again = resumed("flow", run, folder, steps=3, compile=True)
    assert again.record["training"] == run.record["training"]


def test_a_damaged_state_is_refused_before_a_file_is_replaced(finished, copied):
    folder = copied("flow")
    (folder / "model.safetensors").unlink()
    (folder / "state.pt").write_bytes(b"damaged")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="state.pt is damaged or belongs to another"):
        resumed("flow", finished["flow"], folder, steps=6)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_folder_of_images_is_the_same_data_however_it_is_spelled(finished, monkeypatch):
    monkeypatch.setattr(runs, "train", None)
    run = finished["flow"]
    own = Path(origin(run))
    for place, names in ((own.parent, ("fruit", "fruit/", "./fruit")), (own, (".", "../fruit"))):
        monkeypatch.chdir(place)
        for name in names:
            again = train_run("flow", name, {}, run.folder, resume=True, quiet=True)
            assert origin(again) == origin(run)
    asked = []
    monkeypatch.setattr("nanogen.lab.tour.compare", lambda *arguments: asked.append(arguments[2]))
    assert main(["compare", "--data", "."]) == 0 and asked == [Path("runs/compare-fruit")]
    assert [datasets.resolved(name) for name in ("scenes", "nowhere")] == ["scenes", "nowhere"]


def test_what_is_said_on_resume_counts_or_is_refused(finished, copied):
    run, folder = finished["flow"], copied("flow")
    (folder / "model.safetensors").unlink()
    for field in (dict(width=64), dict(widths=(16, 64)), dict(optimizer="adamw"), dict(seed=1)):
        with pytest.raises(UserError, match=f"begun with {next(iter(field))} .*, not "):
            resumed("flow", run, folder, **TINY["flow"] | field)
    again = resumed("flow", run, folder, **TINY["flow"], lr=1e-4, weight_decay=0.5, steps=4)
    assert again.record["training"]["lr"] == 1e-4
    saved = torch.load(folder / "state.pt", weights_only=True)["optimizers"]
    assert [part["param_groups"][0]["weight_decay"] for part in saved] == [0.5, 0.5]  # in use
    assert runs.read_record(folder)["training"] == again.record["training"]


def test_a_finished_run_from_before_a_setting_existed_is_loaded(finished, copied):
    folder = copied("flow")
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del record["training"]["precision"]
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    assert resumed("flow", finished["flow"], folder).record["steps"] == 3


def test_a_run_goes_on_only_with_the_method_and_the_data_that_it_has(
        finished, copied, own_images, tmp_path):
    folder, other = copied("judge"), tmp_path / "fruit"
    with pytest.raises(UserError, match="is a judge on fruit, not a flow on fruit"):
        resumed("flow", finished["flow"], folder)
    with pytest.raises(UserError, match="trained on other data than plum is now"):
        train_run("judge", own_images / "plum", {}, folder, resume=True, quiet=True)
    shutil.copytree(own_images, other)
    (folder / "model.safetensors").unlink()
    again = train_run("judge", other, {"steps": 4}, folder, resume=True, quiet=True)
    assert again.record["steps"] == 4  # the same content is the same data
    (other / "plum/0.png").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="trained on other data than fruit is now"):
        train_run("judge", other, {"steps": 6}, folder, resume=True, quiet=True)
    with pytest.raises(UserError, match="trained on other data than fruit is now"):
        tiny_run("maskgit", other, folder.parent / "new")  # nor is a tokenizer used
    assert not (folder.parent / "new").exists()
    with pytest.raises(UserError, match="trained on other data than fruit is now"):
        again.dataset()  # nor is a run evaluated


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("at", [1, 2])
def test_too_little_memory_is_a_sentence(error, at, own_images, tmp_path, monkeypatch):
    loss, calls = judge.Judge.loss, []

    def fail(gradient):
        raise error

    def full(self, batch):
        calls.append(len(batch["images"]))
        value, metrics = loss(self, batch)
        if len(calls) == at:
            value.register_hook(fail)
        return value, metrics

    monkeypatch.setattr(judge.Judge, "loss", full)
    with pytest.raises(UserError, match="not enough memory: try --batch-size 8, or"):
        tiny_run("judge", own_images, tmp_path / "run")
    assert calls == [16] * at  # first a whole step for trial, before the folder is made
    assert (tmp_path / "run").exists() == (at > 1)


def test_a_cache_of_torch_that_cannot_be_made_is_a_sentence(own_images, tmp_path, monkeypatch):
    def unwritable(name):
        raise FileNotFoundError("/proc/nowhere")

    monkeypatch.setattr(importlib, "import_module", unwritable)
    with pytest.raises(UserError, match="/proc/nowhere.*: set TORCHINDUCTOR_CACHE_DIR"):
        runs.try_step(None, {}, None)


def test_a_second_ctrl_c_while_the_state_is_saved_stops_at_once(finished, copied, monkeypatch):
    folder, model, pressed = copied("flow"), type(finished["flow"].model), []

    def press_before(function, count):
        def call(*arguments):
            if len(pressed) == count:
                pressed.append(function)
                signal.raise_signal(signal.SIGINT)
            return function(*arguments)
        return call

    before = (folder / "state.pt").read_bytes()
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(model, "loss", press_before(model.loss, 0))
    monkeypatch.setattr(torch, "save", press_before(torch.save, 1))
    with pytest.raises(KeyboardInterrupt):
        resumed("flow", finished["flow"], folder, steps=8)
    assert len(pressed) == 2 and (folder / "state.pt").read_bytes() == before
    assert not [path for path in folder.iterdir() if "partial" in path.name or path.name == "lock"]


# ---- several programs at once

HOLD_LOCK = """import sys; from pathlib import Path; from nanogen.files import locked
with locked(Path(sys.argv[1]), wait=False):
    print("ready", flush=True)
    input()"""


def test_a_run_that_another_process_trains_is_refused_until_that_has_ended(own_images, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD_LOCK, folder], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"Process {other.pid} on .* works in {folder}"):
            tiny_run("flow", own_images, folder)
        other.kill()  # it cannot tidy up
    assert tiny_run("flow", own_images, folder).record["steps"] == 3
    assert not (folder / "lock").exists()


def test_a_tokenizer_that_another_process_trains_is_waited_for(
        finished, copied, monkeypatch, capsys):
    folder = copied("maskgit").parent
    base, weights = folder / "tokenizer-fruit", folder / "tokenizer-fruit/model.safetensors"
    hidden = weights.rename(folder / "hidden")

    with subprocess.Popen([sys.executable, "-c", HOLD_LOCK, base], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        flock = fcntl.flock

        def other_finishes(file, how):
            if not how & fcntl.LOCK_NB:  # we wait
                hidden.rename(weights)
                other.communicate(b"\n")
            return flock(file, how)

        monkeypatch.setattr(fcntl, "flock", other_finishes)
        run = tiny_run("maskgit", origin(finished["maskgit"]), folder / "new")
    said = capsys.readouterr().out
    assert f"Waiting for {base}, which process {other.pid} on {platform.node()} trains." in said
    assert not (base / "lock").exists()
    assert "trained first" not in said
    assert run.record["requires"]["hash"] == content_hash(weights)


# ---- what a run requires


def test_a_tokenizer_of_the_wrong_kind_is_noticed(finished, copied):
    folder = copied("tokenizer").parent
    shutil.rmtree(folder / "tokenizer-fruit")
    (folder / "tokenizer-kl-fruit").rename(folder / "tokenizer-fruit")
    with pytest.raises(UserError, match="is finished with bottleneck 'kl', not 'vq'"):
        tiny_run("maskgit", origin(finished["maskgit"]), folder / "new")


def test_images_of_another_size_than_the_tokenizers_are_a_sentence(finished, copied):
    with pytest.raises(UserError, match="is finished with size 32, not 16"):
        tiny_run("maskgit", origin(finished["maskgit"]), copied("maskgit").parent / "new", size=16)


def test_what_is_required_is_trained_for_the_same_size(finished, copied, monkeypatch):
    folder = copied("maskgit").parent
    shutil.rmtree(folder / "tokenizer-fruit")
    for module in (recipes, runs):
        monkeypatch.setattr(module, "find_recipe", lambda method, *_: {
            "training": QUICK, "config": TINY[method], "sampling": {}})
    run = tiny_run("maskgit", origin(finished["maskgit"]), folder / "new", size=16)
    assert run.model.grid == 4
    assert load_run(folder / "tokenizer-fruit").record["config"]["size"] == 16
    assert load_run(folder / "perceptual-fruit").record["config"]["size"] == 32  # fits any size


def test_what_is_required_is_trained_first_and_said_so(own_images, tmp_path, monkeypatch, capsys):
    def quick(method):
        recipe = {"training": QUICK, "config": TINY[method]}
        return {"cifar10": {"default": recipe, "perceptual": recipe}}

    monkeypatch.setattr(recipes, "recipes", quick)
    run, tokenizer = train_run("maskgit", own_images, {}, tmp_path / "new"), "tokenizer-fruit"
    said = capsys.readouterr().out
    assert f"maskgit requires {tmp_path / tokenizer}, which is trained first" in said
    assert f"tokenizer requires {tmp_path / 'perceptual-fruit'}, which is trained first" in said
    assert {path.name for path in tmp_path.iterdir()} == {"new", tokenizer, "perceptual-fruit"}
    weights = tmp_path / tokenizer / "model.safetensors"
    assert run.record["requires"]["hash"] == content_hash(weights)
    assert content_hash(tmp_path / "new/base/model.safetensors") == content_hash(weights)
    # The perceptual network is required for training only.
    assert "perceptual" in (tmp_path / tokenizer / "log.jsonl").read_text()
    assert not any("perceptual" in name for name in load_file(weights))
    assert not (tmp_path / tokenizer / "base").exists()


def test_an_unfinished_tokenizer_is_finished_first(finished, copied):
    folder = copied("maskgit").parent
    (folder / "tokenizer-fruit/model.safetensors").unlink()
    run, before = (tiny_run("maskgit", origin(finished["maskgit"]), folder / "new").record,
                   finished["maskgit"].record)
    assert run["requires"]["hash"] == before["requires"]["hash"]  # the same, bit for bit


def test_a_run_whose_copy_of_the_tokenizer_failed_can_be_trained_again(
        finished, copied, monkeypatch):
    data, folder, copyfile = origin(finished["maskgit"]), copied("maskgit").parent, shutil.copyfile

    def full(source, target):
        copyfile(source, target)
        os.truncate(target, 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="Cannot copy .*No space left"):
        tiny_run("maskgit", data, folder / "new {1}")  # braces are no field of the sentence
    monkeypatch.undo()
    assert tiny_run("maskgit", data, folder / "new {1}").record["steps"] == 3


# ---- files


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("torch"), SafetensorError("IoError")])
def test_what_cannot_be_written_is_a_sentence_and_leaves_what_was_there(error, tmp_path):
    def full(path):
        path.write_bytes(b"half")
        raise error

    (tmp_path / "weights").write_bytes(b"whole")
    with pytest.raises(UserError, match="is the disk full"):
        write_atomically(tmp_path / "weights", full)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_a_full_disk_at_the_end_is_a_sentence_and_the_training_is_not_lost(
        own_images, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: IoError(No space left on device)")

    monkeypatch.setattr(runs, "save_file", full)
    with pytest.raises(UserError, match="is the disk full"):
        tiny_run("judge", own_images, tmp_path / "run")
    assert runs.read_record(tmp_path / "run")["steps"] == 3  # says what the state's weights are
    monkeypatch.undo()
    monkeypatch.setattr(judge.Judge, "loss", None)  # no step is left to do
    run = train_run("judge", own_images, {}, tmp_path / "run", resume=True, quiet=True)
    assert run.record["minutes"] >= 0 and (run.folder / "model.safetensors").exists()


def train_run_as_one_of_two(rank: int, folder: str, data: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                            timeout=timedelta(seconds=200))
    if rank:
        time.sleep(1)  # the other one is ahead
    tiny_run("judge", data, Path(folder) / "run")
    dist.destroy_process_group()


def test_two_processes_write_one_run(own_images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    mp.spawn(train_run_as_one_of_two, (str(tmp_path), str(own_images)), nprocs=2)
    assert load_run(tmp_path / "run").record["training"]["steps"] == 3
