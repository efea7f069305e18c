"""Before a training: settings are checked by name, and a data set becomes tensors."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUICK, TINY, tiny, tiny_run
from PIL import Image

from nanogen import UserError
from nanogen.data.datasets import load
from nanogen.lab import prepare as preparation
from nanogen.lab import runs
from nanogen.lab.prepare import columns, encode, prepare, remarks, to_tensor
from nanogen.lab.recipes import (
    facts,
    find_recipe,
    make_config,
    recipes,
    required_recipe,
    typed,
)
from nanogen.lab.runs import load_run, train_run
from nanogen.lab.train import Training, train
from nanogen.method import METHODS, find

# ---- settings


def refused(method, data, folder, fields, words):
    """The training stops with these words, before it writes anything."""
    with pytest.raises(UserError, match=words):
        train_run(method, data, TINY[method] | QUICK | fields, folder / "run", quiet=True)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("fields", [
    dict(sparkle=3), dict(widths=5), dict(widths="64"), dict(width=2.5), dict(network=3),
    dict(lr="fast"), dict(compile="yes")])
def test_unknown_and_mistyped_values_are_refused_by_name(fields, own_images, tmp_path):
    refused("flow", own_images, tmp_path, fields, next(iter(fields)))


@pytest.mark.parametrize("fields", [
    dict(optimizer="sgd"), dict(batch_size=0), dict(batch_size=-4), dict(steps=0),
    dict(decay_start=1.0), dict(lr=-1.0), dict(ema=1.5), dict(steps=-1)])
def test_budgets_and_rates_that_make_no_sense_are_refused(fields, own_images, tmp_path):
    refused("judge", own_images, tmp_path, fields, f"{next(iter(fields))} must be")


@pytest.mark.parametrize(("method", "fields", "name"), [
    ("flow", dict(network="mlp"), "network"), ("flow", dict(widths=(8, 8)), "widths"),
    ("flow", dict(size=10), "size"), ("pixel_ar", dict(heads=5), "heads"),
    ("pixel_ar", dict(heads=0), "heads"), ("tokenizer", dict(widths=(8, 8)), "widths"),
    ("tokenizer", dict(bottleneck="fsq", codebook_size=1024, levels=(1, 1)), "levels"),
    ("tokenizer", dict(size=6), "size"), ("tokenizer", dict(widths=()), "widths")])
def test_networks_that_cannot_be_are_refused_before_anything_is_trained(
        method, fields, name, own_images, tmp_path):
    refused(method, own_images, tmp_path, fields, name)


@pytest.mark.parametrize("bottleneck", ["kl", "multiscale", "none"])
def test_a_bottleneck_without_codes_in_a_grid_is_refused(bottleneck, own_images, tmp_path):
    refused("maskgit", own_images, tmp_path, dict(bottleneck=bottleneck),
            "bottleneck must be one of vq, fsq")


@pytest.mark.parametrize(("method", "fields", "name"), [
    ("flow", dict(depth=3), "depth"), ("flow", dict(reflow_steps=2), "reflow_steps"),
    ("flow", dict(network="dit"), "widths"), ("tokenizer", dict(kl=1.0), "kl"),
    ("tokenizer", dict(bottleneck="kl"), "codebook_size")])
def test_a_field_without_an_effect_is_refused(method, fields, name, own_images, tmp_path):
    refused(method, own_images, tmp_path, fields, f"{name} has no effect")


# ---- recipes


@pytest.fixture(scope="module")
def fruit(own_images):
    return load(own_images)


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_fits_its_method(method, fruit):
    for data, by_name in recipes(method).items():
        for name, recipe in by_name.items():
            recipe = {"config": {}, "training": {}} | recipe
            config, training = make_config(method, recipe, {}, facts(fruit))
            assert training.steps > 1 and not training.minutes, (data, name)
            for key, value in (recipe["config"] | recipe["training"]).items():
                value = tuple(value) if isinstance(value, list) else value
                assert value in (getattr(config, key, None), getattr(training, key, None))


@pytest.mark.parametrize("method", [
    method for method in METHODS if "gpu" in set().union(*recipes(method).values())])
def test_the_networks_of_recipes_for_a_gpu_fit_and_learn(method):
    """Three steps on a CPU, on an untrained tokenizer, codec or judge of its recipe."""
    kind = find(method).Model.data
    made, name = {"sounds": ("voices", "fsdd"), "images": ("scenes", "cifar10")}[kind]
    if method == "omni":
        made = name = "numbers"
    dataset = load(made, count=8)

    def build(method, settings, overrides):
        config, training = make_config(method, settings, overrides, facts(dataset))
        need = find(method).Model.requires(config)
        if need:
            there = find(need.method).Model.data
            recipe = required_recipe(need, need.data or name, there, "gpu")
            size = {"size": config.size} if there == "images" else {}
            base = build(need.method, find_recipe(need.method, need.data or name, there, recipe),
                         need.config | size)[0]
        return find(method).Model(config, base if need else None), training

    brief = {"batch_size": 2, "steps": 3, "compile": False}
    model, training = build(method, find_recipe(method, name, kind, "gpu"), brief)
    log = train(model, prepare(model, dataset, flip=False), training, quiet=True)
    assert np.isfinite(log[-1]["loss"])


def test_pixel_ar_trains_at_the_size_that_its_config_names(fruit):
    config, _ = make_config("pixel_ar", recipes("pixel_ar")["cifar10"]["default"], {}, facts(fruit))
    assert config.size == 16  # a chain of 32x32 is too long for a laptop


def test_a_budget_from_the_user_replaces_that_of_the_recipe():
    settings = {"config": {}, "training": {"steps": 100}}
    assert make_config("judge", settings, {"minutes": 2.0}, {})[1].minutes == 2
    assert make_config("judge", settings, {"steps": 7}, {})[1].steps == 7
    begun = {"config": {}, "training": {"steps": 100, "minutes": 2.0}}  # of a run that goes on
    assert make_config("judge", begun, {"steps": 7}, {})[1].minutes == 0
    with pytest.raises(UserError, match="either minutes or steps"):
        make_config("judge", settings, {"minutes": 2.0, "steps": 7}, {})
    assert typed(Training, {"lr": 1}, "training").lr == 1  # a whole number is a number


# ---- tensors


def floats(dataset) -> torch.Tensor:
    return to_tensor(dataset.train["images"], 32).float() / 127.5 - 1


def sees(size: int) -> SimpleNamespace:
    """A model of which only the size of its images matters."""
    config = SimpleNamespace(size=size)
    return SimpleNamespace(config=config, columns=(), concatenated=False)


def test_a_size_of_64_sees_the_64_pixels_of_a_file(tmp_path, fruit):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, ::2] = 255
    (tmp_path / "stripes").mkdir()
    for i in range(3):
        Image.fromarray(pixels).save(tmp_path / f"stripes/{i}.png")
    data = load(tmp_path)
    seen = columns(sees(64), data)["images"]
    assert seen.shape == (2, 3, 64, 64) and seen[0, 0, 0, :4].tolist() == [255, 0, 255, 0]
    assert columns(sees(48), data, "test")["images"].shape == (1, 3, 48, 48)
    assert abs(columns(sees(16), data)["images"].float() - 128).max() < 9
    assert facts(data)["size"] == 32  # of a judge, whatever a flow sees: one judge for all sizes
    assert remarks(sees(65), data, True) == [
        "2 of 2 images are smaller than 65x65 and are enlarged: --size S.",
        "Images are mirrored at random: --no-flip if left and right matter."]


def test_images_without_files_are_not_enlarged(tmp_path):
    with pytest.raises(UserError, match="scenes has images of 32x32 pixels: size must be at most"):
        tiny_run("flow", load("scenes", count=20), tmp_path / "run", size=64)
    assert not list(tmp_path.iterdir())


def test_a_training_says_how_many_clips_it_cuts(fruit):
    clips = [np.zeros(count, np.float32) for count in (8000, 6400, 6401, 40_000)]
    sounds = dataclasses.replace(fruit, kind="sounds", train={"waveforms": clips})
    model = SimpleNamespace(config=SimpleNamespace(seconds=0.8), concatenated=False)
    said = ["3 of 4 clips are longer than 0.8 s and are cut there: --seconds S."]
    assert remarks(model, sounds, True) == said
    model.config.seconds = 5.0
    assert remarks(model, sounds, True) == []


def test_images_are_made_smaller_by_the_mean_of_an_area():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, :2, :2] = [[[0, 0, 8], [0, 0, 8]], [[100, 0, 8], [100, 0, 8]]]
    assert to_tensor(images, 2)[0, :, 0, 0].tolist() == [50, 0, 8]
    assert to_tensor(images, 4).shape == (2, 3, 4, 4)


def test_tokens_are_encoded_once_with_their_mirror_images(fruit):
    model = tiny("maskgit", grid=16)
    tensors, half = prepare(model, fruit, flip=True), len(fruit)
    assert tensors["tokens"].shape == (2 * half, 256)
    assert torch.equal(tensors["labels"][:half], tensors["labels"][half:])
    mirrored = model.tokenizer.encode(floats(fruit).flip(-1))
    assert torch.equal(tensors["tokens"][half:], mirrored)


def test_flip_false_means_that_no_token_is_of_a_mirrored_image(finished, copied, monkeypatch):
    def count(model, data, *_):
        lengths.append(len(data["tokens"]))
        return [{"minutes": 0, "step": 0}]

    lengths, folder = [], copied("maskgit").parent
    monkeypatch.setattr(runs, "train", count)
    for name, flip in (("mirrored", True), ("as they are", False)):
        tiny_run("maskgit", finished["maskgit"].record["data"]["origin"], folder / name, flip=flip)
    assert lengths[0] == 2 * lengths[1]


def test_reflow_draws_as_many_pairs_as_it_is_told_of_all_labels(fruit):
    model = SimpleNamespace(to=lambda device: None, prepare=lambda batch: batch, examples=200)
    labels = torch.from_numpy(fruit.train["labels"])
    drawn = encode(model, {"labels": labels}, flip=True)["labels"]
    assert len(drawn) == 200 > len(labels) and set(drawn.tolist()) == set(labels.tolist())


def test_what_was_encoded_is_found_again_unless_images_settings_or_tokenizer_change(
        copied, fruit, monkeypatch):
    folder, encoded = copied("maskgit"), []
    model, base = load_run(folder).model, folder.parent / "tokenizer-fruit"
    monkeypatch.setattr(preparation, "encode",
                        lambda *arguments: encoded.append(1) or encode(*arguments))

    def prepared(dataset=fruit, flip=True):
        return prepare(model, dataset, flip, base)

    first, again = prepared(), prepared()
    assert len(encoded) <= 1 and all(torch.equal(first[name], again[name]) for name in first)
    before = len(encoded)
    negative = fruit.train | {"images": 255 - fruit.train["images"], "hashes": ["other"] * 54}
    changed = prepared(dataclasses.replace(fruit, train=negative))
    assert not torch.equal(changed["tokens"], first["tokens"]) and len(encoded) == before + 1
    relabeled = fruit.train | {"labels": fruit.train["labels"][::-1].copy()}
    relabeled = prepared(dataclasses.replace(fruit, train=relabeled))
    assert torch.equal(relabeled["labels"][: len(fruit)], first["labels"][: len(fruit)].flip(0))
    before += 1
    assert len(prepared(flip=False)["tokens"]) == len(fruit) and len(encoded) == before + 2
    model.encoding_fields = ("width",)
    prepared()
    assert len(encoded) == before + 3
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    prepared()
    assert len(encoded) == before + 4
    for path in base.glob("encoded-*"):
        path.write_bytes(b"damaged")
    assert torch.equal(prepared()["tokens"], prepared()["tokens"]) and len(encoded) == before + 5


def test_the_latents_of_a_dit_are_measured_and_kept(finished, fruit):
    model, images = finished["dit"].model, floats(fruit)
    latents = model.tokenizer.encode(torch.cat([images, images.flip(-1)]))
    kept = load_run(finished["dit"].folder).model.latents
    assert torch.allclose(kept.std.flatten(), latents.std((0, 2, 3)), rtol=1e-3)
    assert torch.allclose(model.latents.mean.flatten(), latents.mean((0, 2, 3)), atol=1e-4)
