"""Omni: caption, image and sound say the same number, and any of them can be asked for."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import awake, learn

from nanogen import UserError, omni
from nanogen.audio import codec
from nanogen.blocks import sampling
from nanogen.blocks.text import encode_text
from nanogen.data import numbers, utterances
from nanogen.data.phonemes import LANGUAGES
from nanogen.lab import omni_metrics


@pytest.fixture(scope="module")
def examples():
    return numbers.make(60, seed=3)


def tiny_omni(asleep=False, **fields):
    torch.manual_seed(0)
    small = dict(widths=(4, 16, 16), dim=8, codebook_size=16, adversarial=0.0)
    base = codec.Codec(codec.Config(**small)).eval()
    tiny = dict(width=32, depth=2, heads=2, head_width=32, head_depth=1)
    model = omni.Omni(omni.Config(**tiny | fields), base)
    return model if asleep else awake(model)


def named(caption):
    return caption.split()[-1] in LANGUAGES


def batch_of(model, examples):
    images = torch.tensor(examples["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    batch = model.prepare({"images": images} | {
        name: torch.tensor(examples[name]) for name in model.columns})
    model.measure(batch)
    return batch


def ask(model, target, prompt="", image=None, sound=None, **settings):
    conditions = {"prompts": encode_text([prompt]),
                  "sources": torch.full((1, 3, 32, 32), -1.0) if image is None else image,
                  "voices": torch.zeros(1, 1) if sound is None else sound}
    return model.sample(conditions, ask=target, **dict(steps=4, head_steps=2) | settings)


# ---- the data


def test_caption_image_and_sound_name_the_same_number(examples):
    for i, caption in enumerate(examples["prompts"]):
        number = examples["labels"][i]
        assert numbers.number_in(caption) == number
        assert numbers.to_caption(examples["tokens"][i].tolist()) == caption
        sign = omni_metrics.read_sign(examples["images"][i])
        assert sign == number or (sign < 0 and 2 <= number <= 4)
        assert not named(caption) or caption.endswith(LANGUAGES[examples["language"][i]])
        assert np.abs(examples["clips"][i]).max() > 3000
    assert len(set(examples["labels"])) == 10 and len(set(examples["language"])) == 3
    told = sum(map(named, examples["prompts"])) / len(examples["prompts"])
    assert 0.6 < told < 0.95 and all(map(named, numbers.make(20, held_out=True)["prompts"]))


@pytest.mark.parametrize("held_out", [False, True])
def test_numbers_with_two_captions_are_trained_twice_as_often_and_tested_equally(held_out):
    rng = np.random.default_rng(0)
    drawn = [numbers.draw(rng, held_out)[0] for _ in range(3000)]
    wanted = np.full(10, 1) if held_out else np.array([1, 1, 2, 2, 2, 1, 1, 1, 1, 1])
    assert np.abs(np.bincount(drawn) / 3000 - wanted / wanted.sum()).max() < 0.02


def test_a_caption_names_one_number_or_none():
    assert numbers.number_in("three red dogs on grass, german") == 3
    assert numbers.number_in("a red dog") == numbers.number_in("a sign that says 7 4") == -1


def test_no_combination_of_the_test_is_in_the_training():
    combinations = []
    for held_out in (False, True):
        rng = np.random.default_rng(0)
        drawn = [numbers.draw(rng, held_out) for _ in range(300)]
        combinations.append({(number, scene.things[0].kind, scene.background)
                             for number, scene in drawn})
    assert not combinations[0] & combinations[1]


# ---- what training asks for


def test_each_two_parts_and_all_three_make_sequences():
    chosen = tiny_omni(separate="", together=0.1).choose_parts(torch.zeros(3000, dtype=torch.long))
    sizes = {subset: len(rows) for subset, rows in chosen}
    assert sizes == {(0, 1): 900, (0, 2): 900, (1, 2): 900, (0, 1, 2): 300}
    assert torch.cat([rows for _, rows in chosen]).equal(torch.arange(3000))


def test_no_image_comes_with_a_sound_of_the_separate_language():
    language, spanish = torch.arange(3000) % 3, LANGUAGES.index("spanish")
    for subset, rows in tiny_omni().choose_parts(language):
        assert (spanish in language[rows]) == ({1, 2} - {*subset} != set())
        assert spanish - 1 in language[rows]


def test_two_parts_can_be_learned_alone():
    language = torch.zeros(100, dtype=torch.long)
    (subset, rows), = tiny_omni(parts="text+sound").choose_parts(language)
    assert subset == (0, 2) and rows.equal(torch.arange(100))
    spanish = torch.full((100,), LANGUAGES.index("spanish"))
    assert not tiny_omni(parts="image+sound").choose_parts(spanish)


def test_training_gives_a_part_whole_or_not_at_all_and_asks_for_each(examples, monkeypatch):
    model, calls = tiny_omni(nothing=0.3), []
    network = model.hidden_states
    monkeypatch.setattr(model, "hidden_states",
                        lambda *inputs: calls.append(inputs) or network(*inputs))
    model.loss(batch_of(model, examples))
    together = set()
    for parts, asked in calls:
        assert {*asked.tolist()} == {*parts}
        for number, part in parts.items():
            hidden, mine = omni.is_hidden(part), asked == number
            assert hidden[mine].any(1).all() and not hidden[mine].all()
            together |= {*hidden[~mine].float().mean(1).tolist()}
    assert together == {0.0, 1.0} and len(calls) == 4


def test_training_shows_as_many_tokens_as_the_passes_of_the_sampler():
    asked = torch.full((20_000,), True)
    shown = (~tiny_omni().hide(omni.IMAGE, 64, asked, asked)).sum(1)
    passes = torch.tensor([0, *sampling.reveal_schedule(64, 16)[:-1]])  # known before each pass
    for most in (3, 16, 40):
        trained, asked_for = ((counts <= most).float().mean() for counts in (shown, passes))
        assert (trained - asked_for).abs() < 0.07


# ---- the sampler


def test_each_part_can_be_asked_for():
    model = tiny_omni()
    assert ask(model, "image", "a sign that says 7")["images"].shape == (1, 3, 32, 32)
    sound = ask(model, "sound", "a sign that says 7, german")
    assert sound["waveforms"].shape == (1, int(sound["lengths"])) == (1, 50 * 128)
    assert isinstance(ask(model, "text", image=GIVEN["image"])["thoughts"][0], str)


GIVEN = {"prompt": "a sign that says 7", "image": torch.linspace(0, 1, 3072).view(1, 3, 32, 32),
         "sound": torch.sin(torch.arange(6400.0))[None]}


@pytest.mark.parametrize("target, key", [("image", "images"), ("sound", "waveforms")])
def test_all_that_is_given_decides(target, key):
    model = tiny_omni()
    given = {name: value for name, value in GIVEN.items() if name != target}
    first = ask(model, target, **given)[key]
    assert torch.equal(ask(model, target, **given)[key], first)
    for name, value in given.items():
        other = given | {name: "a sign that says 3" if name == "prompt" else 0.5 * value.flip(-1)}
        assert (ask(model, target, **other)[key] - first).abs().max() > 1e-4


def test_silence_before_a_sound_changes_nothing():
    model, late = tiny_omni(), F.pad(GIVEN["sound"], (utterances.HOP * 70, 0))
    first, second = (ask(model, "image", sound=sound)["images"] for sound in (GIVEN["sound"], late))
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("target, given, message", [
    ("text", dict(prompt="a dog"), "text cannot be given: it is asked for"),
    ("image", dict(image=GIVEN["image"]), "image cannot be given: it is asked for"),
    ("sound", dict(prompt="a red dog, klingon"), "klingon. It knows 0, 1"),
    ("sound", dict(prompt=" ".join(["a"] * 15)), "at most 14 words, got 15")])
def test_what_cannot_be_given_is_named(target, given, message):
    with pytest.raises((UserError, ValueError), match=message):
        ask(tiny_omni(), target, **given)


def test_a_part_that_was_not_learned_is_refused():
    model = tiny_omni(parts="text+sound")
    with pytest.raises(ValueError, match="ask must be one of text, sound"):
        ask(model, "image", "a dog")
    with pytest.raises(ValueError, match="image cannot be given: the network did not learn it"):
        ask(model, "sound", image=GIVEN["image"])
    assert ask(model, "sound", "a sign that says 7")["waveforms"].any()


def test_a_part_is_given_to_all_samples_of_a_batch_or_to_none():
    mixed = {"prompts": encode_text(["a sign that says 7", ""]),
             "sources": torch.full((2, 3, 32, 32), -1.0), "voices": torch.zeros(2, 1)}
    with pytest.raises(ValueError, match="text must be given to all samples of a batch, or none"):
        tiny_omni().sample(mixed, ask="image", steps=2)


def test_guidance_of_one_is_the_model_without_guidance():
    model = tiny_omni()
    plain = ask(model, "image", "a sign that says 7", guidance=1.0)["images"]
    near = ask(model, "image", "a sign that says 7", guidance=1.0001)["images"]
    assert torch.allclose(plain, near, atol=1e-2)
    strong = ask(model, "image", "a sign that says 7", guidance=3.0)["images"]
    assert (strong - plain).abs().max() > 0.05


def test_what_cannot_be_asked_for_is_named():
    with pytest.raises(ValueError, match="ask must be one of text, image, sound"):
        ask(tiny_omni(), "smell")


def test_patches_come_back_as_the_image(examples):
    model = tiny_omni()
    batch_of(model, examples)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.allclose(model.to_images(model.patches(model.to_patches(image))), image, atol=1e-4)


def test_a_batch_of_all_three_parts_is_learned(examples):
    model = tiny_omni(asleep=True)
    batch = {name: rows[:12] for name, rows in batch_of(model, examples).items()}
    losses = learn(model, batch, 3e-3, steps=80)
    assert losses[0].keys() == {"loss", "text", "image", "sound"}
    assert all(losses[-1][name] < 0.8 * losses[0][name] for name in losses[0])


def test_a_batch_with_fewer_examples_than_parts_has_the_losses_of_some(examples):
    model = tiny_omni()
    loss, metrics = model.loss({name: rows[:2] for name, rows in batch_of(model, examples).items()})
    assert loss.isfinite() and len(metrics) == 2


# ---- the metrics


def test_the_number_of_an_image_is_that_of_its_sign_or_of_its_things(monkeypatch):
    signs = iter([7, -1, -1, -1])
    monkeypatch.setattr(omni_metrics, "read_sign", lambda image: next(signs))
    monkeypatch.setattr(omni_metrics, "read", lambda *_: ([[1], [1, 2, 3], [1], [1] * 9],))
    assert omni_metrics.seen(None, np.zeros((4, 32, 32, 3))) == [7, 3, -1, -1]
