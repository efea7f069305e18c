"""The contract of a method: a new one needs no line in the lab, and each keeps its promises."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import tiny, tiny_tokenizer

from nanogen import UserError, load
from nanogen.__main__ import main
from nanogen.blocks.standardize import Standardizer
from nanogen.blocks.transformer import CodeEmbedding
from nanogen.data.datasets import Dataset
from nanogen.lab.evaluate import evaluate
from nanogen.lab.recipes import make_config
from nanogen.lab.report import write
from nanogen.lab.runs import load_run, train_run
from nanogen.lab.sample import sample
from nanogen.lab.train import Training
from nanogen.method import METHODS, Method, check, check_settings, choose, find, unused


def clips(count: int) -> dict:
    """Videos of one colour, and texts that name it."""
    bright = np.arange(count) % 2
    videos = np.full((count, 4, 8, 8, 3), 40, np.uint8) + (150 * bright).astype(
        np.uint8)[:, None, None, None, None]
    return {"videos": videos, "prompts": [("dark", "a bright one")[i] for i in bright]}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A tiny run of tests/fake_method.py."""
    monkeypatch.setitem(METHODS, "fake", "fake_method")
    dataset = Dataset("clips", "clips", "videos", clips(64), clips(16), names={})
    fields = dict(steps=300, batch_size=16, compile=False, lr=0.03, width=16)
    run = train_run("fake", dataset, fields, tmp_path / "fake-clips", quiet=True)
    return run, dataset


def test_a_new_method_trains_samples_is_judged_and_reported_without_a_line_in_the_lab(
        run, tmp_path):
    run, dataset = run
    again = load(run.folder)
    videos = again.sample(2, prompt=["dark", "a bright one"])
    assert videos.shape == (2, 4, 8, 8, 3) and videos.dtype == np.uint8
    assert abs(videos[0].mean() - 40) < 20 and abs(videos[1].mean() - 190) < 20  # it has learned
    folder = tmp_path / "out"
    assert main(["sample", "--prompt", "dark", str(run.folder), "--n", "3", "--brightness", "0.5",
                 "--out", str(folder)]) == 0
    with np.load(folder / "samples.npz") as file:
        assert file["videos"].shape == (3, 4, 8, 8, 3) and file["prompts"].tolist() == ["dark"] * 3
    assert (folder / "videos.gif").exists()
    metrics = evaluate(again, n=4, dataset=dataset, quiet=True)
    assert metrics["parameters"] > 0 and (run.folder / "metrics.json").exists()
    page = write([run.folder], tmp_path / "page.html").read_text()
    assert "image/gif" in page and "fake" in page


def test_a_sampler_setting_that_does_not_exist_is_a_sentence(run):
    with pytest.raises(UserError, match="no sampler setting 'sparkle': choose from brightness"):
        run[0].sample(2, sparkle=1)
    with pytest.raises(UserError, match="has no condition 'labels'"):
        sample(run[0], 2, {"labels": ["3"]})


def test_a_run_is_a_folder_that_can_be_moved(run, tmp_path):
    run[0].folder.rename(tmp_path / "elsewhere")
    assert load_run(tmp_path / "elsewhere").method == "fake"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(name):
    module = find(name)
    assert issubclass(module.Model, Method) and dataclasses.is_dataclass(module.Config)
    assert module.Model.kind in ("generator", "tokenizer", "judge")
    assert module.Model.data in ("images", "sounds", "videos", "any")
    need = module.Model.requires(module.Config())
    assert need is None or find(need.method).Config(**need.config)


def test_a_frozen_module_moves_with_the_model_but_is_neither_trained_nor_saved():
    tokenizer = tiny_tokenizer()
    model = tiny("maskgit")
    names = list(model.state_dict())
    assert not [name for name in names if name.startswith("tokenizer")]
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in tokenizer.parameters())
    model.to(torch.float64)
    assert next(model.tokenizer.parameters()).dtype == torch.float64
    assert not any(p.requires_grad for p in model.tokenizer.parameters())


def test_a_config_names_what_it_refuses():
    @dataclasses.dataclass
    class Config:
        width: int = 8
        head: str = "flow"
        steps: int = 4

        def __post_init__(self):
            check(self, width=(self.width > 0, "at least 1"))
            choose(self, head=("mse", "flow"))
            if self.head == "mse":
                unused(self, "steps", when="with an MSE head")

    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        Config(width=0)
    with pytest.raises(ValueError, match="head must be one of mse, flow, got 'gan'"):
        Config(head="gan")
    with pytest.raises(ValueError, match="steps has no effect with an MSE head"):
        Config(head="mse", steps=5)
    Config(head="mse")


@pytest.mark.parametrize("config", [*(find(name).Config for name in METHODS), Training])
def test_every_number_of_a_config_has_a_range(config):
    bad = {int: [-8], float: [float("nan"), float("inf"), -1.0]}
    for field in dataclasses.fields(config):
        for value in bad.get(field.type, []) + [1.5] * field.name.endswith("dropout"):
            if (field.name, value) != ("time_mean", -1.0):
                with pytest.raises(ValueError, match=field.name):
                    config(**{field.name: value})


@pytest.mark.parametrize("settings", [
    dict(guidance=float("inf")), dict(temperature=float("nan")), dict(temperature=-1.0),
    dict(steps=0), dict(head_steps=-1), dict(seconds=-1.0), dict(top_k=-1), dict(top_p=0.0),
    dict(top_p=1.5)])
def test_every_number_of_a_sampler_has_a_range(settings):
    kinds = dict(guidance=float, temperature=float, seconds=float, top_p=float, top_k=int,
                 steps=int, head_steps=int, order=str)
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        check_settings(settings, kinds)
    check_settings(dict(guidance=0, top_k=0, top_p=1, order="halton"), kinds)


def test_numbers_that_are_none_are_refused_before_anything_is_drawn(run, monkeypatch):
    monkeypatch.setattr(type(run[0].model), "sample", lambda self, conditions, brightness: 1 / 0)
    monkeypatch.setattr("nanogen.lab.sample.sampler_settings", lambda _: {"brightness": float})
    for settings, words in ((dict(brightness=float("nan")), "brightness must be a finite number"),
                            (dict(seed=-1), "seed from 0"), (dict(seed=2**64), "seed from 0"),
                            (dict(n=0), "number of samples must be at least 1")):
        with pytest.raises(UserError, match=words):
            run[0].sample(**dict(n=2) | settings)


def test_a_setting_of_the_recipe_that_the_users_makes_useless_is_dropped():
    recipe = {"config": {"widths": [16, 16], "width": 64}, "training": {}}
    config, _ = make_config("flow", recipe, {"network": "dit"}, {})
    assert config.width == 64 and config.widths == find("flow").Config().widths
    with pytest.raises(UserError, match="widths has no effect with network dit"):
        make_config("flow", recipe, {"network": "dit", "widths": (16, 32)}, {})


def test_codes_or_channels_that_are_all_alike_give_finite_numbers():
    assert CodeEmbedding(torch.full((8, 3), 0.1), 16)().isfinite().all()
    standardize = Standardizer(3)
    standardize.measure(torch.full((50, 3), 0.1))
    assert standardize(torch.full((2, 3), 0.1)).abs().max() < 1


def test_settings_are_refused_before_anything_is_loaded_or_trained(monkeypatch, tmp_path, capsys):
    def slow(*_, **__):
        raise AssertionError("too late")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanogen.lab.runs.load", slow)
    for arguments in (["--optimizer", "sgd"], ["--minutes", "-3"], ["--width", "190"],
                      ["--order", "random"], ["--warmup", "-2"], ["--bottleneck", "kl"]):
        assert main(["train", "maskgit", *arguments]) == 1
        assert arguments[0].removeprefix("--") in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_loaded_run_is_not_trained_on_other_data(run, tmp_path):
    run, dataset = run
    other = dataclasses.replace(dataset, train=clips(32))
    (run.folder / "model.safetensors").unlink()  # as if it had been interrupted
    with pytest.raises(UserError, match="trained on other data than clips is now"):
        train_run("fake", other, {"steps": 400}, run.folder, resume=True, quiet=True)
    record = json.loads((run.folder / "config.json").read_text())
    assert record["data"]["fingerprint"] == dataset.fingerprint
