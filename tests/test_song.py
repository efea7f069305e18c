"""Songs: a score keeps its grammar, what is typed is sung, and the frames know what sounds."""

import numpy as np
import pytest
import torch
from conftest import awake, learn
from torch.nn.utils.rnn import pad_sequence

from nanogen import UserError
from nanogen.audio import codec, song
from nanogen.blocks.text import encode_text
from nanogen.data import songs
from nanogen.data.utterances import HOP, SYMBOLS
from nanogen.data.voices import RATE, Speaker

MELODY = "0:2 2:2 4:4 7:1 5:1 4:2 0:4"


def tiny_song(asleep=False):
    torch.manual_seed(0)
    small = dict(widths=(4, 16, 16), dim=8, codebook_size=16, adversarial=0.0)
    base = codec.Codec(codec.Config(**small)).eval()
    config = song.Config(width=32, depth=1, heads=2, window=32, chain_width=16, chain_depth=1)
    model = song.Song(config, base)
    return model if asleep else awake(model)


def draw(model, prompt="a sad slow song about night", lyrics="", melody="", **settings):
    conditions = {"prompts": prompt, "lyrics": lyrics, "tunes": melody}
    conditions = {name: encode_text([text]) for name, text in conditions.items()}
    drawn = model.sample(conditions, **dict(steps=2) | settings)
    return songs.from_text(drawn["thoughts"][0]), drawn


# ---- the data


def test_a_song_keeps_its_key_its_metre_and_ends_on_the_root():
    rng = np.random.default_rng(0)
    for _ in range(50):
        score = songs.compose(rng)
        assert all(sum(length for *_, length in bar) == 4 for bar in score.bars)
        tones = [tone for _, tone, _ in score.notes]
        assert {tone % 12 for tone in tones} <= set(songs.MOODS[score.mood])
        assert tones[-1] % 12 == 0
        words = [word for word, *_ in score.notes]
        assert set(words) <= set(songs.THEMES[score.theme])
        for chord, bar in zip(score.chords, score.bars, strict=True):
            notes = {note % 12 for note in songs.chord_notes(chord, score.mood, 60)}
            assert bar is score.bars[-1] or bar[0][1] % 12 in notes


def test_the_frames_of_a_song_say_what_sounds():
    score = songs.compose(np.random.default_rng(1))
    clip, frames = songs.perform(score, 52, Speaker()), songs.to_frames(score, 52)
    assert abs(len(frames) - len(clip) / HOP) <= 1
    _, tones, *strings, since = frames.T
    first = score.notes[0]
    held = round(first[2] * score.eighth * RATE / HOP)
    assert (tones[: held - 1] == 52 + first[1]).all()
    middles = [round((4 * bar + 2.5) * score.eighth * RATE / HOP) for bar in range(4)]
    assert [tuple(part[middle] for part in strings) for middle in middles] == [
        songs.chord_notes(chord, score.mood, 52) for chord in score.chords]
    assert (since == 0).sum() == 8 and since[0] == 0  # a beat: two eighths
    sung = [SYMBOLS[number] for number in frames[: held - 1, 0]]
    assert list(dict.fromkeys(sung)) == songs.SYLLABLES[first[0]].split()


def test_scores_as_text_and_as_symbols_come_back():
    rng = np.random.default_rng(0)
    for _ in range(50):
        score = songs.compose(rng)
        chain = songs.to_symbols(score)
        assert songs.from_text(songs.to_text(score)) == score == songs.from_symbols(chain)
        assert all(songs.possible(chain[:i])[chain[i]] for i in range(3, len(chain)))
        assert not songs.possible(chain).any() and len(chain) <= songs.LONGEST


# ---- the model


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_whatever_the_chain_draws_is_a_score_in_metre(temperature):
    for seed in range(5):
        score, drawn = draw(tiny_song(), temperature=temperature, seed=seed)
        assert (score.theme, score.mood, score.tempo) == ("night", "sad", "slow")
        assert [sum(length for *_, length in bar) for bar in score.bars] == [4] * 4
        seconds = 16 * score.eighth
        assert abs(drawn["lengths"][0] / RATE - seconds) <= 0.016


def test_typed_words_and_notes_are_kept():
    score, _ = draw(tiny_song(), lyrics="sun moon", melody=MELODY)
    assert [f"{tone}:{length}" for _, tone, length in score.notes] == MELODY.split()
    assert [word for word, *_ in score.notes] == ["sun", "moon"] * 3 + ["sun"]


def test_the_chord_of_a_bar_has_the_tone_that_was_typed_first():
    for seed in range(4):
        score, _ = draw(tiny_song(), prompt="a happy song", melody=MELODY, seed=seed)
        for chord, bar in zip(score.chords, score.bars, strict=True):
            assert bar[0][1] % 12 in {note % 12 for note in songs.chord_notes(chord, "happy", 0)}
    score, _ = draw(tiny_song(), prompt="a happy song", melody="1:4 1:4 1:4 1:4")
    assert [tone for _, tone, _ in score.notes] == [1] * 4  # outside the scale: any chord


def test_what_a_prompt_does_not_say_is_drawn():
    found = {draw(tiny_song(), prompt="a song", seed=seed)[0].theme for seed in range(8)}
    assert len(found) > 1


@pytest.mark.parametrize("settings, message", [
    (dict(prompt="a song about cars"), "'cars'"), (dict(lyrics="hello"), "'hello'"),
    (dict(prompt="a sad happy song"), "choose one"), (dict(melody="0:2"), "4 bars"),
    (dict(melody="0:3 2:3 4:2 5:4 0:4"), "crosses"),
    (dict(melody="0-2"), "semitones"), (dict(melody="40:4 0:4 0:4 0:4"), "0 to 16"),
    (dict(key=20), "key must be")])
def test_what_cannot_be_sung_is_named(settings, message):
    with pytest.raises((UserError, ValueError), match=message):
        draw(tiny_song(), **settings)


def test_the_chain_never_sees_the_future():
    chain = tiny_song().chain.eval()
    symbols = torch.randint(len(songs.VOCABULARY), (2, 12))
    other = symbols.clone()
    other[:, 7:] = (symbols[:, 7:] + 5) % len(songs.VOCABULARY)
    assert torch.allclose(chain(symbols)[:, :7], chain(other)[:, :7], atol=1e-6)
    assert (chain(symbols)[:, 7:] - chain(other)[:, 7:]).abs().max() > 1e-4


def test_the_chain_learns_in_the_first_part_of_the_training_only():
    model, score = tiny_song(), songs.compose(np.random.default_rng(0))
    frames, symbols = songs.to_frames(score, songs.KEY), songs.to_symbols(score)
    batch = {"latents": torch.randn(1, len(frames), 8), "frames": torch.tensor(frames)[None],
             "symbols": torch.tensor(symbols)[None]}
    for progress, learns in ((0.0, True), (0.39, True), (0.41, False)):
        model.zero_grad()
        model.progress.fill_(progress)
        loss, metrics = model.loss(batch)
        loss.backward()
        assert metrics["compose"] > 0 and model.notes.weight.grad is not None
        assert all((p.grad is not None) == learns for p in model.chain.parameters())


def test_each_part_of_the_score_changes_the_velocity():
    model, x = tiny_song(), torch.randn(1, 10, 8)
    frames = torch.tensor([5, 60, 48, 52, 55, 10]).expand(1, 10, 6)
    before = model.velocity(x, torch.tensor([0.5]), frames)
    for part in range(6):
        other = frames.clone()
        other[0, 4, part] += 1
        assert (model.velocity(x, torch.tensor([0.5]), other) - before).abs().max() > 1e-5


def test_a_batch_of_songs_is_learned():
    model, made = tiny_song(asleep=True), songs.make(4)
    waveforms = pad_sequence([torch.tensor(clip) for clip in made["waveforms"]], True)
    batch = model.prepare({"waveforms": waveforms} | {
        name: torch.tensor(made[name]) for name in model.columns})
    model.measure(batch)
    losses = [(step["sing"], step["compose"]) for step in learn(model, batch, 5e-3)]
    assert losses[-1][0] < 0.8 * losses[0][0] and losses[-1][1] < 0.5 * losses[0][1]
