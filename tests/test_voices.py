"""The voices say what they are asked to, when, and at which pitch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanogen.data import datasets
from nanogen.data.made import recorded
from nanogen.data.phonemes import DIGITS, LANGUAGES, PHONEMES, SYLLABLES
from nanogen.data.voices import (
    RATE,
    Speaker,
    make,
    midi_to_hertz,
    phones_of,
    pluck,
    say,
    sing,
)


def pitch_of(waveform):
    """Hz, of a steady sound: the highest peak of its autocorrelation between 60 and 1,000 Hz."""
    size, window = 16 * len(waveform), np.hanning(len(waveform))

    def autocorrelation(x):
        return np.fft.irfft(np.abs(np.fft.rfft(x, size)) ** 2)[: RATE // 60]

    # The window makes longer lags weaker. Without this division, every peak would lean to the left.
    curve = autocorrelation((waveform - waveform.mean()) * window) / autocorrelation(window)
    peaks = [i for i in range(RATE // 1000, len(curve) - 1)
             if curve[i - 1] <= curve[i] >= curve[i + 1]]
    best = next(i for i in peaks if curve[i] > 0.9 * max(curve[peaks]))  # not an octave below
    left, middle, right = curve[best - 1 : best + 2]
    return RATE / (best + 0.5 * (left - right) / (left - 2 * middle + right))


def cents(hertz, other):
    return abs(1200 * np.log2(hertz / other))


def is_sound(waveform):
    assert waveform.dtype == np.float32 and waveform.ndim == 1 and np.isfinite(waveform).all()
    assert 0.5 < np.abs(waveform).max() <= 1
    assert abs(waveform[0]) < 0.05 and abs(waveform[-1]) < 0.05, "no click at either end"
    return True


# ---- speech


def test_every_digit_and_syllable_is_made_of_known_phonemes():
    assert set(DIGITS) == set(LANGUAGES)
    assert all(len(digits) == len(set(digits)) == 10 for digits in DIGITS.values())
    spelled = [word for digits in DIGITS.values() for word in digits] + list(SYLLABLES.values())
    assert {symbol for word in spelled for symbol in word.split()} <= set(PHONEMES)
    for symbol, phones in PHONEMES.items():
        for phone in phones:
            for first, second, third in (phone.formants, phone.end or phone.formants):
                assert 150 < first < second < third < 3500, symbol


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_digit_sounds(language):
    for digit in range(10):
        waveform = say([digit], language, seed=digit)
        assert is_sound(waveform) and 0.15 < len(waveform) / RATE < 1
        assert np.array_equal(waveform, say(str(digit), language, seed=digit)), "an equal seed"
        assert not np.array_equal(waveform, say([digit], language, seed=digit + 1)[: len(waveform)])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 9), min_size=1, max_size=4),
       st.sampled_from(LANGUAGES))
def test_any_voice_can_say_anything_in_the_time_it_is_given(seed, digits, language):
    rng = np.random.default_rng(seed)
    seconds = float(rng.uniform(0.15, 0.8)) * len(digits)
    waveform = say(digits, language, Speaker.random(rng), seed, seconds)
    assert len(waveform) == round(seconds * RATE) and is_sound(waveform)


def test_voiced_sounds_do_not_click():
    """A vowel below 1 kHz does not jump from one sample to the next, and no join shows in it."""
    jumps = np.abs(np.diff(sing(["o", "u"], [50, 52], [0.6, 0.6], seed=1)))
    assert jumps.max() < 0.5 and jumps.max() < 12 * np.sqrt((jumps**2).mean())


def test_vowels_have_their_formants():
    """An /a/ is loudest near 640 and 1,350 Hz; a tract shorter by a fifth raises both."""
    for tract in (17.5, 14.0):
        waveform = sing(["a"], [45], [1.0], Speaker(tract, breath=0.0))[RATE // 4 : -RATE // 4]
        spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)))) ** 2
        f = np.fft.rfftfreq(len(waveform), 1 / RATE)
        smooth = np.array([spectrum[abs(f - at) < 90].sum() * at**2 for at in range(400, 2400, 10)])
        peaks = [400 + 10 * i for i in range(1, 199) if smooth[i - 1] < smooth[i] >= smooth[i + 1]]
        expected = np.array([640, 1350]) * 17.5 / tract
        assert all(min(abs(np.array(peaks) / at - 1)) < 0.15 for at in expected), (tract, peaks)


def test_a_closure_is_silent_and_an_s_is_high():
    song = ["s ɪ k s"], [45], [1.0]
    waveform, (*_, phonemes) = sing(*song), phones_of(*song)
    (_, s_start, s_end), _, (_, k_start, _), _ = phonemes
    hiss = waveform[round(RATE * (s_start + 0.03)) : round(RATE * (s_end - 0.03))]
    spectrum = np.abs(np.fft.rfft(hiss)) ** 2
    low, high = spectrum[: len(spectrum) // 2].sum(), spectrum[len(spectrum) // 2 :].sum()
    assert high > 5 * low, "above 2 kHz"
    closure = waveform[round(RATE * (k_start + 0.04)) : round(RATE * (k_start + 0.07))]
    assert np.abs(closure).max() < 0.05 * np.abs(waveform).max()


def test_pitch_is_the_speakers_and_falls():
    waveform = say("9", speaker=Speaker(pitch=140.0, breath=0.0), seconds=1.2)
    first, last = pitch_of(waveform[2400:3600]), pitch_of(waveform[5400:6600])
    assert 120 < last < first < 160


# ---- song


@pytest.mark.parametrize("note", [45, 52, 57, 64, 69])
@pytest.mark.parametrize("syllable", ["la", "do", "mi"])
def test_a_sung_note_is_in_tune(note, syllable):
    waveform = sing([syllable], [note], [1.2], Speaker(15.5), seed=note)
    assert is_sound(waveform) and len(waveform) == 1.2 * RATE
    steady = waveform[4000:8364]  # three periods of the vibrato
    assert cents(pitch_of(steady), midi_to_hertz(note)) < 20


def test_a_song_keeps_time():
    song = ["moon", "la"], [57, 60], [0.5, 0.6]
    waveform, (*_, phonemes) = sing(*song), phones_of(*song)
    symbols, starts, ends = zip(*phonemes, strict=True)
    assert len(waveform) == 1.1 * RATE and symbols == ("m", "u", "n", "l", "a")
    assert np.allclose([starts[0], ends[2], ends[4]], [0, 0.5, 1.1])
    assert starts[1:] == ends[:-1] and all(np.subtract(ends, starts) > 0)
    vowel = phonemes[1]
    assert vowel[2] - vowel[1] > 0.25, "the vowel carries the note"


@pytest.mark.parametrize("note", [36, 45, 57, 64, 72, 79])
def test_a_plucked_string_is_in_tune_and_dies_away(note):
    waveform = pluck([note], [1.0])
    assert waveform.dtype == np.float32 and len(waveform) == RATE
    assert 0.5 < np.abs(waveform).max() <= 1
    assert cents(pitch_of(waveform[800:4800]), midi_to_hertz(note)) < 20
    assert np.square(waveform[4000:7600]).mean() < 0.5 * np.square(waveform[:3600]).mean()


# ---- the data set


@pytest.fixture(scope="module")
def clips():
    few = {"speakers": 20, "languages": ["english"]}
    return make(200, seed=0, **few), make(60, seed=1, **few)


def test_a_small_set_is_the_beginning_of_a_larger_one(clips):
    few = make(5, seed=0, speakers=20, languages=["english"])
    for key, values in few.items():
        same = [np.array_equal(a, b) for a, b in zip(values, clips[0][key][:5], strict=True)]
        assert len(values) == 5 and all(same), key
    assert clips[0]["labels"].dtype == np.int64 and set(clips[0]["labels"]) == set(range(10))
    assert set(make(40, seed=0)["language"]) == {0, 1, 2}


def test_voices_of_the_test_are_unseen(clips):
    train, test = (np.unique(part["voice"], axis=0) for part in clips)
    assert train.shape == test.shape == (20, 4) and train.dtype == np.float32
    assert np.abs((train[:, None] - test) / train.std(axis=0)).max(axis=-1).min() > 0.02
    assert (train.std(axis=0) > [1, 20, 0.15, 0.1]).all(), "and they differ among themselves"


def loudness(waveform):
    """An image of the sound, for a classifier: level in 20 bands at 20 moments, (400,)."""
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(waveform, 128), 256)[::40]
    frames = frames * np.hanning(256)
    power = np.abs(np.fft.rfft(frames))[:, :120].reshape(len(frames), 20, 6).sum(axis=2)
    level = np.log(power + 0.01 * power.max())
    moments = np.linspace(0, len(level) - 1, 20).astype(int)
    return (level[moments] - level.mean()).ravel()


def test_a_classifier_learns_the_digits_of_unseen_voices(clips):
    x, test_x = (torch.tensor(np.stack([loudness(clip) for clip in part["waveforms"]])).float()
                 for part in clips)
    y, test_y = (torch.tensor(part["labels"]) for part in clips)
    model = nn.Linear(400, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(200):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(test_x).argmax(dim=1) == test_y).float().mean() > 0.8


def test_voices_are_a_data_set_like_the_others(tmp_path, monkeypatch):
    data = datasets.load("voices", tmp_path, count=30)
    assert len(data) == data.count == 30 and len(data.test["waveforms"]) == 3
    assert not any(tmp_path.iterdir()), "a small set is not kept"
    assert data.sample_rate == RATE and data.names["labels"] == list("0123456789")
    assert data.names["languages"] == list(LANGUAGES) and len(data.names["speakers"]) == 23
    assert not set(data.train["speakers"]) & set(data.test["speakers"])
    assert data.classes("speakers") == 20, "those of the test part are not learned"
    assert not data.train["language"].any(), "a small set has 20 voices and English only"
    assert data.train["language"].shape == (30,) and data.test["voice"].shape == (3, 4)
    again = make(30, 0, 20, ["english"])["waveforms"]
    for stored, made in zip(data.train["waveforms"], again, strict=True):
        assert np.abs(stored - made).max() < 1e-4
    asked = []

    def make_few(count, seed, speakers):
        asked.append(count)
        return make(count // 400, seed, speakers)

    known = datasets.MADE["voices"]
    monkeypatch.setitem(datasets.MADE, "voices", (recorded(make_few, 200), *known[1:]))
    first, again = datasets.load("voices", tmp_path), datasets.load("voices", tmp_path)
    assert asked == [8000, 800], "the second time from the cache"
    assert first.fingerprint == again.fingerprint and len(again) == 20
