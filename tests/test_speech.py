"""Speech: the truth about recordings, the listener that judges, and the sampler's promises."""

import numpy as np
import pytest
import torch
from conftest import awake, learn
from torch.nn.utils.rnn import pad_sequence

from nanogen import UserError, listener
from nanogen.audio import codec, speech
from nanogen.blocks.text import encode_text
from nanogen.data import phonemes, utterances
from nanogen.data.voices import RATE
from nanogen.lab import speech_metrics


@pytest.fixture(scope="module")
def recordings():
    return utterances.make(12, speakers=3)


def tiny_codec():
    torch.manual_seed(0)
    small = dict(widths=(4, 16, 16), dim=8, codebook_size=16, adversarial=0.0)
    return codec.Codec(codec.Config(**small)).eval()


def tiny_speech(asleep=False, **fields):
    torch.manual_seed(1)
    small = dict(width=32, depth=1, heads=2, duration_width=16, duration_depth=1, window=32)
    model = speech.Speech(speech.Config(**small | fields), tiny_codec())
    return model if asleep else awake(model)


def batch_of(model, recordings):
    waveforms = pad_sequence([torch.tensor(clip) for clip in recordings["waveforms"]], True)
    columns = {name: torch.tensor(recordings[name]) for name in model.columns}
    return model.prepare({"waveforms": waveforms, **columns})


def say(model, texts=("314", "2"), languages=(0, 1), voices=None, **settings):
    voices = torch.zeros(len(texts), 1) if voices is None else voices
    return model.sample({"prompts": encode_text(list(texts)), "voices": voices,
                         "languages": torch.tensor(languages)}, **dict(steps=2) | settings)


# ---- recordings of two parts


def test_a_recording_played_faster_is_higher_and_its_phonemes_move_with_it(recordings):
    sounds = pad_sequence([torch.tensor(clip) for clip in recordings["waveforms"]], True)
    frames, begin = (torch.tensor(recordings[name]) for name in ("frames", "begin"))
    torch.manual_seed(0)
    changed, moved, new_begin = speech.other_voices(sounds, frames, begin, 0.15)
    for i in range(len(sounds)):
        start, first = int(new_begin[i]), frames[i, begin[i]]
        assert first in moved[i, start : start + 2] and not moved[i, start - 3 : start].any()
        assert changed[i, (moved[i] >= 0).sum() * utterances.HOP + 200 :].abs().max() < 0.01
    tone = torch.sin(torch.arange(sounds.shape[1]) * 2 * torch.pi * 200 / RATE).expand_as(sounds)
    torch.manual_seed(0)
    higher = speech.other_voices(tone, frames, begin, 0.15)[0][:, :RATE]  # a second of each
    hertz = ((higher[:, 1:] >= 0) & (higher[:, :-1] < 0)).sum(1)
    factors = (frames >= 0).sum(1) / (moved >= 0).sum(1)
    assert torch.allclose(hertz / 200, factors, rtol=0.03) and factors.max() - factors.min() > 0.1
    same = speech.other_voices(sounds, frames, begin, 0.0)
    assert torch.allclose(same[0][:, : sounds.shape[1]], sounds, atol=1e-4)
    assert torch.equal(same[2], begin)


def test_the_truth_about_a_recording_fits_its_sound(recordings):
    for i, clip in enumerate(recordings["waveforms"]):
        frames, begin = recordings["frames"][i], recordings["begin"][i]
        sounding = frames[frames >= 0]
        assert len(sounding) == -(-len(clip) // utterances.HOP)
        pause = sounding[:begin][::-1]
        quiet = int(np.argmax(pause != 0))  # frames without a phoneme before the second part
        assert 4 <= quiet <= 17 and sounding[begin] != 0
        silent = clip[(begin - quiet + 1) * utterances.HOP : begin * utterances.HOP]
        assert np.abs(silent).max() < 1e-3 < np.abs(clip[begin * utterances.HOP :]).max()
        symbols, counts = recordings["durations"][i].T
        language = utterances.LANGUAGES[recordings["language"][i, 1]]
        spelled = utterances.spell(recordings["prompts"][i], language)
        assert symbols[symbols >= 0].tolist() == spelled
        assert abs(counts[counts >= 0].sum() - (len(sounding) - begin)) <= 1
        words = recordings["words"][i]
        digits = "".join(str(word % 10) for word in words[words >= 0])
        assert digits.endswith(recordings["prompts"][i])


def test_one_voice_says_both_parts_and_clips_do_not_depend_on_their_number(recordings):
    again = utterances.make(2, speakers=3)
    assert np.array_equal(again["waveforms"][1], recordings["waveforms"][1])
    assert (recordings["speaker"] == np.arange(12) % 3).all()
    other = utterances.make(3, seed=1, speakers=3)
    assert not np.isin(other["voice"][:, 0], recordings["voice"][:, 0]).any()


@pytest.mark.parametrize("text", ["314", "3 1 4", "three one four", "Drei eins vier", "tres, 1 4"])
def test_digits_are_read_as_numbers_and_as_words(text):
    assert utterances.digits_of(text) == "314"


@pytest.mark.parametrize("text", ["", "hello", "three hello", "3.5", "²"])
def test_what_is_no_digit_is_named(text):
    with pytest.raises(UserError, match="Only digits"):
        utterances.digits_of(text)


def test_a_word_for_each_digit_in_each_language():
    for language, words in utterances.WORDS.items():
        assert len(words.split()) == len(phonemes.DIGITS[language]) == 10


# ---- the model


def test_a_batch_of_recordings_is_learned(recordings):
    model = tiny_speech(asleep=True)
    batch = batch_of(model, recordings)
    model.measure(batch)
    losses = [step["loss"] for step in learn(model, batch, 3e-3)]
    assert losses[-1] < 0.6 * losses[0]


def test_frames_that_do_not_exist_change_nothing():
    model = tiny_speech()
    x, known = torch.randn(2, 20, 8), torch.full((2, 20, 8), torch.nan)
    known[:, 4:9] = torch.randn(2, 5, 8)
    seen = torch.randint(1, 40, (2, 20))
    seen[:, :4], seen[:, 4:9], seen[:, 16:] = -1, speech.HIDDEN, -1
    other = torch.where((seen < 0)[..., None], x + 1, x)
    before, after = (model.velocity(z, torch.tensor([0.3, 0.6]), seen, known) for z in (x, other))
    there = seen >= 0
    assert torch.allclose(before[there], after[there], atol=1e-5)
    other = torch.where(known.isnan(), x, x + 1)  # known frames have no noise
    after = model.velocity(other, torch.tensor([0.3, 0.6]), seen, known)
    assert torch.equal(before[there], after[there])
    known[0, 5] += 1
    changed = model.velocity(x, torch.tensor([0.3, 0.6]), seen, known) - before
    assert changed[0, 9:16].abs().max() > 1e-5 and changed[1][there[1]].abs().max() < 1e-6


def test_the_loss_is_of_the_second_part_and_hides_the_prompts_phonemes(recordings, monkeypatch):
    model, seen = tiny_speech(window=128, voice_dropout=0.0, text_dropout=0.0), []
    batch = batch_of(model, recordings)
    velocity = model.velocity
    monkeypatch.setattr(model, "velocity", lambda x, t, phonemes, known: (
        seen.append((phonemes, known)), velocity(x, t, phonemes, known))[1])
    model.loss(batch)
    (phonemes, known), = seen
    prompt, drawn = phonemes == speech.HIDDEN, (phonemes >= 0) & (phonemes != speech.HIDDEN)
    assert torch.equal(prompt, ~known[..., 0].isnan())
    assert prompt.any(1).sum() > 6
    for row, frames, begin in zip(drawn, batch["frames"], batch["begin"], strict=True):
        total = int((frames >= 0).sum())
        assert int(row.sum()) == min(total - int(begin), model.config.window)


def test_half_of_the_prompts_are_whole_first_parts_as_in_the_sampler(recordings, monkeypatch):
    model, known = tiny_speech(window=256, voice_dropout=0.0), []
    batch = batch_of(model, recordings)
    monkeypatch.setattr(model, "velocity", lambda x, t, phonemes, frames: (
        known.append(frames), torch.zeros_like(x))[1])
    for _ in range(30):
        model.loss(batch)
    lengths = torch.stack([(~frames[..., 0].isnan()).sum(1) for frames in known])
    whole = (lengths == batch["begin"]).float().mean()
    assert 0.4 < whole < 0.6, whole  # uniform lengths would be whole in one of 30


def test_a_voice_prompt_is_made_of_first_parts_of_one_voice():
    seconds, rate = speech_metrics.PROMPT, RATE
    first = [np.full(n, value, dtype=np.float32) for n, value in
             ((rate, 0.1), (rate // 4, 0.2), (rate, 0.3), (3 * rate, 0.4), (rate // 2, 0.5))]
    test = {"speakers": np.array([0, 1, 0, 2, 0])}
    three, alone, long = speech_metrics.voice_prompts(test, first, [2, 1, 3])
    assert len(three) == len(long) == seconds * rate and len(alone) < seconds * rate
    assert set(np.unique(three)) == {np.float32(x) for x in (0, 0.1, 0.3, 0.5)}
    assert (three[-rate:] == np.float32(0.3)).all()  # its own is the last
    assert set(np.unique(alone)) == {np.float32(x) for x in (0, 0.2)}


@pytest.mark.parametrize("seconds", [0.7, 1.3, 2.6])
def test_speech_is_as_long_as_asked(seconds):
    lengths = say(tiny_speech(), seconds=seconds)["lengths"]
    assert (lengths / RATE - seconds).abs().max() <= 0.008


def test_tempo_divides_the_length():
    slow, fast = (say(tiny_speech(), tempo=tempo)["lengths"].float() for tempo in (0.5, 1.0))
    assert torch.allclose(slow, 2 * fast, atol=130)


def test_too_short_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="phonemes need at least"):
        say(tiny_speech(), seconds=0.05)


def test_durations_add_up_and_leave_no_phoneme_out():
    durations = tiny_speech().durations
    symbols = torch.tensor([[3, 9, 20, 41], [5, 7, -1, -1]])
    for total in (4.0, 7.0, 60.0):
        counts = durations.frames(symbols, torch.tensor([0, 2]), total, 1.0)
        assert counts.sum(1).tolist() == [total, total]
        assert (counts[symbols >= 0] >= 1).all() and (counts[symbols < 0] == 0).all()


def test_a_voice_changes_what_is_said_and_silence_is_no_voice():
    model, torch_rng = tiny_speech(), torch.Generator().manual_seed(0)
    voice = 0.3 * torch.randn(2, 4000, generator=torch_rng)
    none, again, some = say(model), say(model, voices=torch.zeros(2, 900)), say(model, voices=voice)
    assert torch.equal(none["waveforms"], again["waveforms"])
    assert torch.equal(none["lengths"], some["lengths"])
    assert (none["waveforms"] - some["waveforms"]).abs().max() > 1e-4


def test_guidances_of_one_are_the_plain_model(monkeypatch):
    model = tiny_speech()
    voice = 0.3 * torch.randn(2, 4000)
    before = say(model, voices=voice, guidance=1.0, voice_guidance=1.0)["waveforms"]
    velocity = model.velocity

    def plain(x, t, seen, known):  # the answers without text or voice are replaced by noise
        v = velocity(x, t, seen, known)
        third = len(v) // 3
        return torch.cat([v[:third], torch.randn_like(v[third:])])

    monkeypatch.setattr(model, "velocity", plain)
    after = say(model, voices=voice, guidance=1.0, voice_guidance=1.0)["waveforms"]
    assert torch.allclose(before, after, atol=1e-4)


# ---- the listener


def test_edits_are_insertions_deletions_and_replacements():
    assert listener.edits([1, 2, 3], [1, 2, 3]) == 0
    assert listener.edits([1, 2, 3], [1, 3]) == listener.edits([1, 2, 3], [1, 9, 3]) == 1
    assert listener.edits([], [4, 4]) == listener.edits([4, 4], []) == 2


def test_the_equal_error_rate_of_separate_equal_and_swapped_similarities():
    high, low = np.linspace(0.6, 1, 50), np.linspace(-1, 0.4, 50)
    assert listener.equal_error_rate(high, low) == 0
    assert listener.equal_error_rate(high, high) == pytest.approx(0.5, abs=0.02)
    assert listener.equal_error_rate(low, high) > 0.95


def test_the_listener_hears_the_same_in_any_padding(recordings):
    model = awake(listener.Listener(listener.Config(width=16, depth=2, speakers=3)))
    clips = [torch.tensor(clip) for clip in recordings["waveforms"][:3]]
    lengths = torch.tensor([len(clip) for clip in clips])
    together = pad_sequence(clips, True)
    words, voices = model.listen(torch.nn.functional.pad(together, (0, 4000)), lengths)
    again, same = model.listen(together, lengths)
    assert words == again and torch.allclose(voices, same, atol=1e-4)


def test_the_listener_learns_words_and_voices(recordings):
    torch.manual_seed(0)
    model = listener.Listener(listener.Config(width=32, depth=3, speakers=3)).train()
    waveforms = pad_sequence([torch.tensor(clip) for clip in recordings["waveforms"]], True)
    batch = {"waveforms": waveforms, "words": torch.tensor(recordings["words"]),
             "lengths": torch.tensor([len(clip) for clip in recordings["waveforms"]]),
             "speakers": torch.tensor(recordings["speaker"])}
    optimizer, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    for _ in range(60):
        loss, metrics = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((metrics["words"], metrics["voice"]))
    assert losses[-1][0] < 0.1 * losses[0][0] and losses[-1][1] < 0.5 * losses[0][1], losses[-1]


# ---- recordings of people


def test_recorded_digits_are_joined_by_one_speaker_with_the_truth_about_them():
    rng = np.random.default_rng(0)
    clips = [np.concatenate([np.zeros(300), rng.uniform(-1, 1, 2000 + 100 * i), np.zeros(500)])
             .astype(np.float32) for i in range(20)]
    digits, speakers = np.arange(20) % 10, np.arange(20) // 10
    rows = utterances.join(clips, digits, speakers, 8)
    for i, sound in enumerate(rows["waveforms"]):
        frames, begin = rows["frames"][i], rows["begin"][i]
        assert (frames >= 0).sum() == len(sound) / utterances.HOP and frames[begin] > 0
        assert not sound[(begin - 4) * utterances.HOP : begin * utterances.HOP].any()
        counts = rows["durations"][i, :, 1]
        assert counts[counts >= 0].sum() <= (frames >= 0).sum() - begin
        symbols = rows["durations"][i, :, 0]
        spelled = utterances.spell(rows["prompts"][i], "english")
        assert symbols[symbols >= 0].tolist() == spelled
        words = rows["words"][i]
        assert "".join(map(str, words[words >= 0])).endswith(rows["prompts"][i])
