"""Every method on the accelerator, where this machine has one: all of it computes there."""

import math

import pytest
import torch
from conftest import tiny_run

from nanogen import UserError
from nanogen.__main__ import main
from nanogen.data.datasets import load
from nanogen.lab import machine
from nanogen.lab.evaluate import evaluate
from nanogen.lab.runs import load_run, train_run
from nanogen.lab.sample import sample
from nanogen.lab.train import Training, draw_batch

SMALL = dict(width=32, depth=1, heads=2)
UNET = dict(widths=(16, 32), width=32)
JUDGE = dict(widths=(16, 16, 16))
TOKENIZER = dict(widths=(16, 16), blocks=1)
REFLOW = dict(objective="reflow", reflow_pairs=16, reflow_steps=2)
RUNS = {  # name of the run, ending in its data set -> fields; after those that it requires
    "perceptual-scenes": JUDGE, "judge-scenes": JUDGE,
    "tokenizer-scenes": TOKENIZER,
    "tokenizer-kl-scenes": TOKENIZER | dict(bottleneck="kl"),
    "tokenizer-multiscale-scenes": TOKENIZER | dict(bottleneck="multiscale", codebook_size=184),
    "pixel_ar-scenes": SMALL, "token_ar-scenes": SMALL, "maskgit-scenes": SMALL,
    "var-scenes": SMALL, "mar-scenes": SMALL, "flow-scenes": UNET, "meanflow-scenes": UNET,
    "flow-dit-scenes": SMALL | dict(network="dit"), "flow-reflow-scenes": UNET | REFLOW,
    "judge-voices": JUDGE, "codec-voices": dict(widths=(4, 4, 4), crop=1024),
    "wave_ar-voices": {}, "audio_lm-voices": SMALL,
}


@pytest.fixture(scope="module")
def accelerator():
    """The device that nanogen takes where nobody holds it to the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NANOGEN_DEVICE")
        patch.delenv("NANOGEN_PRECISION")
        forget()
        if machine.device().type == "cpu":
            pytest.skip("this machine has no accelerator")
        yield machine.device()
    forget()


def forget():
    for choice in (machine.device, machine.precision):
        choice.cache_clear()


@pytest.fixture(scope="module")
def sets():
    return {name: load(name, count=200) for name in ("scenes", "voices")}


@pytest.fixture(scope="module")
def runs(accelerator, sets, tmp_path_factory):
    """All of RUNS, trained for two steps."""
    folder = tmp_path_factory.mktemp("accelerator")
    quick = dict(steps=2, batch_size=16, compile=False)
    return {name: train_run(
        name.split("-")[0].replace("perceptual", "judge"), sets[name.split("-")[-1]],
        quick | fields, folder / name, quiet=True) for name, fields in RUNS.items()}


@pytest.fixture
def chosen(monkeypatch):
    """Chooses a device by name, as a user would."""
    yield lambda name: (forget(), monkeypatch.setenv("NANOGEN_DEVICE", name))
    forget()


def test_a_batch_goes_to_the_device_that_was_chosen(chosen):
    chosen("meta")  # computes nothing, but every torch has it
    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    data = {"images": images, "labels": torch.zeros(8, dtype=torch.long)}
    batch = draw_batch(data, 0, Training(batch_size=4))
    assert {tensor.device.type for tensor in batch.values()} == {"meta"}


def test_a_device_that_is_not_there_is_a_sentence(chosen):
    chosen("abacus")
    with pytest.raises(UserError, match="NANOGEN_DEVICE=abacus"):
        machine.device()


def test_the_device_is_chosen_before_a_run_is_loaded(chosen, own_images, tmp_path, capsys):
    chosen("cpu")
    run = tiny_run("judge", own_images, tmp_path / "judge-fruit")
    forget()
    assert main(["evaluate", str(run.folder), "--device", "abacus"]) == 1
    assert "NANOGEN_DEVICE=abacus" in capsys.readouterr().err


@pytest.mark.parametrize("name", RUNS)
def test_every_method_trains_draws_and_is_judged_there(name, runs, sets, accelerator):
    run = runs[name]
    assert next(run.model.parameters()).device.type == accelerator.type
    metrics = evaluate(run, 20, sets[name.split("-")[-1]], quiet=True)
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))
    again = load_run(run.folder)
    assert next(again.model.parameters()).device.type == accelerator.type
    if again.model.kind == "generator":
        drawn = sample(again, 3, frames=again.model.output == "images")
        assert len(drawn["labels"]) == 3
