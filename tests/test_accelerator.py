"""Every chapter on the accelerator, where this machine has one: nothing may be left behind on the CPU."""

import math

import pytest
import torch

from nanogen import UserError
from nanogen.lab import machine
from nanogen.lab.evaluate import evaluate
from nanogen.lab.runs import AUDIO, load_run, train_run
from nanogen.lab.sampling import sample
from nanogen.lab.train import Training, draw_batch

SMALL = dict(width=32, depth=1, heads=2)
UNET = dict(widths=(16, 32), width=32)
CODEC = dict(widths=(4, 4, 4), crop=1024)
RUNS = {  # name of the run -> chapter, data, fields: each after what it stands on
    "eye-scenes": ("judge", "scenes", dict(widths=(16, 16, 16))), "judge-scenes": ("judge", "scenes", dict(widths=(16, 16, 16))),
    "tokenizer-scenes": ("tokenizer", "scenes", dict(widths=(16, 16), blocks=1)),
    "tokenizer-kl-scenes": ("tokenizer", "scenes", dict(bottleneck="kl", widths=(16, 16), blocks=1)),
    "tokenizer-multiscale-scenes": ("tokenizer", "scenes", dict(bottleneck="multiscale", codes=184, widths=(16, 16), blocks=1)),
    "pixel_ar-scenes": ("pixel_ar", "scenes", SMALL), "token_ar-scenes": ("token_ar", "scenes", SMALL),
    "maskgit-scenes": ("maskgit", "scenes", SMALL), "var-scenes": ("var", "scenes", SMALL), "mar-scenes": ("mar", "scenes", SMALL),
    "flow-scenes": ("flow", "scenes", UNET), "meanflow-scenes": ("meanflow", "scenes", UNET),
    "flow-dit-scenes": ("flow", "scenes", SMALL | dict(network="dit")),
    "flow-reflow-scenes": ("flow", "scenes", UNET | dict(objective="reflow", reflow_pairs=16, reflow_steps=2)),
    "judge-voices": ("judge", "voices", dict(widths=(16, 16, 16))), "codec-voices": ("codec", "voices", CODEC),
    "wave_ar-voices": ("wave_ar", "voices", {}), "audio_lm-voices": ("audio_lm", "voices", SMALL),
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
def runs(accelerator, tmp_path_factory):
    """All of RUNS, trained for two steps."""
    folder, quick = tmp_path_factory.mktemp("accelerator"), dict(steps=2, batch_size=16, compile=False)
    return {name: train_run(chapter, data, quick | fields, folder / name, count=200, quiet=True)
            for name, (chapter, data, fields) in RUNS.items()}


@pytest.fixture
def chosen(monkeypatch):
    """Chooses a device by name, as a user would."""
    yield lambda name: (forget(), monkeypatch.setenv("NANOGEN_DEVICE", name))
    forget()


def test_a_batch_goes_to_the_device_that_was_chosen(chosen):
    chosen("meta")  # computes nothing, but every torch has it
    data = {"images": torch.zeros(8, 3, 4, 4, dtype=torch.uint8), "labels": torch.zeros(8, dtype=torch.long)}
    assert {tensor.device.type for tensor in draw_batch(data, 0, Training(batch_size=4)).values()} == {"meta"}


def test_a_device_that_is_not_there_is_a_sentence(chosen):
    chosen("abacus")
    with pytest.raises(UserError, match="NANOGEN_DEVICE=abacus"):
        machine.device()


@pytest.mark.parametrize("name", RUNS)
def test_every_chapter_trains_draws_and_is_judged_there(name, runs, accelerator):
    run = runs[name]
    assert next(run.model.parameters()).device.type == accelerator.type
    numbers = evaluate(run, n=20, count=200, quiet=True)
    assert all(math.isfinite(value) for value in numbers.values() if isinstance(value, float))
    again = load_run(run.folder)
    assert next(again.model.parameters()).device.type == accelerator.type
    if hasattr(again.model, "sample"):
        drawn = sample(again, 3, frames=run.chapter not in AUDIO)
        assert len(drawn["labels"]) == 3
