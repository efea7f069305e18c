"""Wave AR: samples as words, a network that never sees the future, and rings that remember exactly what is needed."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import awake
from hypothesis import given
from hypothesis import strategies as st

from nanogen.audio import wave_ar

LABELS, SPEAKERS = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 2])  # the last ones: none


def tiny_wave(asleep=False, **fields):
    """3 digits, 2 voices, 16 samples seen."""
    torch.manual_seed(1)
    model = wave_ar.WaveAR(wave_ar.Config(**(dict(width=16, layers=4, crop=32, classes=3, speakers=2) | fields)))
    return model if asleep else awake(model)


def clips(count=4, length=48):
    return torch.randint(1, 256, (count, length)).byte()


# --- Samples as words


@given(st.floats(-1, 1))
def test_a_sample_and_its_code_differ_by_half_a_step_of_the_scale(value):
    x = torch.tensor(value, dtype=torch.float32)
    code = wave_ar.mu_law_encode(x)
    bound = (x.abs() + 1 / 255) * (256 ** (1 / 254) - 1)
    assert (wave_ar.mu_law_decode(code) - x).abs() <= bound + 1e-6
    assert code.dtype == torch.uint8 and code == 256 - wave_ar.mu_law_encode(-x).long()


def test_silence_is_the_middle_and_codes_come_back_as_they_are():
    assert wave_ar.mu_law_encode(torch.zeros(3)).tolist() == [128] * 3 and not wave_ar.mu_law_decode(torch.tensor([128])).any()
    codes = torch.arange(1, 256)
    samples = wave_ar.mu_law_decode(codes)
    assert torch.equal(wave_ar.mu_law_encode(samples).long(), codes) and (samples.diff() > 0).all()
    assert samples[[0, -1]].tolist() == [-1, 1]
    assert wave_ar.mu_law_encode(torch.tensor([-3.0, 3.0])).tolist() == [1, 255]


# --- The network


@pytest.mark.parametrize("place", [0, 1, 17, 40, 47])
def test_a_future_sample_never_changes_the_past_and_the_past_is_seen_as_far_as_promised(place):
    model, words = tiny_wave(), clips().long()
    other = words.clone()
    other[:, place] = (words[:, place] + 99) % 256
    changed = (model.logits(words, LABELS, SPEAKERS) != model.logits(other, LABELS, SPEAKERS)).flatten(2).any(2).any(0)
    assert changed.tolist() == [place <= later < place + model.receptive_field for later in range(48)]


def test_cached_logits_equal_uncached():
    model, words = tiny_wave(), clips().long()
    whole, rings = model.logits(words, LABELS, SPEAKERS), model.rings(4)
    biases, tables = model.biases(LABELS, SPEAKERS), (model.embedding(), model.head())
    for place in range(48):
        assert torch.allclose(model.step(words[:, place], place, rings, biases, tables), whole[:, place], atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cached_sampling_equals_uncached(guidance):
    model = tiny_wave()
    (a, lengths), (b, others) = (model.sample(LABELS, SPEAKERS, 40, guidance, seed=5, cached=c) for c in (True, False))
    assert torch.equal(a, b) and torch.equal(lengths, others)


def test_guidance_1_is_conditional_and_another_one_hides_digit_and_speaker_together(monkeypatch):
    model, asked = tiny_wave(), []
    biases = model.biases
    monkeypatch.setattr(model, "biases", lambda labels, speakers: asked.append((labels, speakers)) or biases(labels, speakers))
    plain, _ = model.sample(LABELS[:3], SPEAKERS[:3], 30)
    guided, _ = model.sample(LABELS[:3], SPEAKERS[:3], 30, guidance=1 + 1e-6)
    assert torch.equal(plain, guided) and len(asked[0][0]) == 3
    assert asked[1][0].tolist() == [0, 1, 2, 3, 3, 3] and asked[1][1].tolist() == [0, 1, 1, 2, 2, 2]
    assert not torch.equal(plain, model.sample(LABELS[:3], SPEAKERS[:3], 30, guidance=9.0)[0])
    asked.clear()
    model.loss({"codes": clips(400), "lengths": torch.full((400,), 40), "labels": torch.zeros(400).long(), "speakers": torch.ones(400).long()})
    labels, speakers = asked[0]
    assert torch.equal(labels == 3, speakers == 2) and 10 < (labels == 3).sum() < 90


# --- Likelihood


def test_before_training_a_sample_costs_eight_bits():
    model = tiny_wave(asleep=True)
    batch = model.prepare(torch.rand(8, 100) * 2 - 1, torch.full((8,), 80), torch.arange(8) % 3, torch.arange(8) % 2)
    loss, numbers = model.loss(batch)
    assert loss.item() == pytest.approx(math.log(257), rel=1e-5) and numbers["bits_per_sample"].item() == pytest.approx(8.006, abs=0.01)


def test_what_is_beyond_the_end_costs_nothing_and_the_end_costs_once():
    model, codes, lengths = tiny_wave(), clips(), torch.tensor([10, 48, 47, 30])
    likelihood = model.log_likelihood(codes, lengths, LABELS, SPEAKERS)
    other = codes.clone()
    other[0, 10:], other[3, 30:] = 7, 9
    assert torch.allclose(model.log_likelihood(other, lengths, LABELS, SPEAKERS), likelihood, atol=1e-4)
    before = F.pad(codes.long(), (1, 0), value=wave_ar.BOUNDARY)
    logs = model.logits(before, LABELS, SPEAKERS).log_softmax(-1)
    for clip, length in enumerate(lengths.tolist()):
        wanted = logs[clip, torch.arange(length), codes[clip, :length].long()].sum()
        wanted = wanted + (logs[clip, length, wave_ar.BOUNDARY] if length < 48 else 0)  # a full row may have been cut
        assert likelihood[clip].item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("start", [0, 5, 20])
def test_a_window_says_of_each_place_what_the_whole_clip_says(start):
    model, codes, lengths = tiny_wave(), clips(), torch.tensor([44, 48, 25, 30])
    starts = torch.full((4,), start)
    before, words, scored = model.window(codes, lengths, starts, 28)
    whole = model.logits(F.pad(codes.long(), (1, 0), value=wave_ar.BOUNDARY), LABELS, SPEAKERS)[:, start : start + 28]
    part = model.logits(before, LABELS, SPEAKERS)
    assert torch.allclose(part[scored], whole[scored], atol=1e-4) and scored.any(1).tolist() == [True, True, start <= 10, start <= 15]
    assert (words[2][scored[2]][-1:] == wave_ar.BOUNDARY).all()


def test_windows_are_drawn_up_to_the_end_and_not_beyond(monkeypatch):
    model, drawn = tiny_wave(), []
    window = model.window
    monkeypatch.setattr(model, "window", lambda *arguments: drawn.append((arguments[2], *window(*arguments))) or drawn[0][1:])
    lengths = torch.tensor([20, 31, 32, 35]).repeat(200)
    model.loss({"codes": clips(800), "lengths": lengths, "labels": LABELS.repeat(200), "speakers": SPEAKERS.repeat(200)})
    start, _, words, scored = drawn[0]
    assert [set(start[i::4].tolist()) for i in range(4)] == [{0}, {0}, {0, 1}, {0, 1, 2, 3, 4}]  # crop is 32
    ends = scored & (words == wave_ar.BOUNDARY)
    assert torch.equal(ends.sum(1), (start + 32 > lengths).long())  # in the last window of each clip, and in no other
    assert not (scored & (start[:, None] + torch.arange(32) > lengths[:, None])).any()


def test_counting_costs_what_chance_and_certainty_say():
    torch.manual_seed(0)
    noise = [torch.randint(1, 256, (4000,)).byte() for _ in range(60)]
    bits = wave_ar.entropy_baselines(noise[:50], noise[50:])
    assert all(7.98 < value < 8.5 for value in bits.values())  # log2(255), and what the counts cost
    phase = 6.28 * torch.rand(60, 1)
    tones = [code for code in wave_ar.mu_law_encode(0.8 * torch.sin(phase + torch.arange(2000) * 0.3))]
    bits = wave_ar.entropy_baselines(tones[:50], tones[50:])
    assert bits["order_0"] > bits["order_1"] > bits["linear_prediction"]
    unseen = wave_ar.entropy_baselines([torch.full((100,), 128).byte()], [torch.full((100,), 9).byte()])
    assert all(math.isfinite(value) for value in unseen.values())


# --- Sampling


def test_a_clip_stops_at_its_end_and_lengths_are_right(monkeypatch):
    model, ends = tiny_wave(), [5, 0, 20, 999]

    def fake(logits, *arguments):
        fake.place += 1
        return torch.tensor([wave_ar.BOUNDARY if fake.place == end else 200 for end in ends])

    fake.place = -1
    monkeypatch.setattr(wave_ar, "draw", fake)
    waveforms, lengths = model.sample(LABELS, SPEAKERS, seconds=0.005)
    assert lengths.tolist() == [5, 0, 20, 40] and waveforms.shape == (4, 40)
    assert torch.equal(waveforms != 0, torch.arange(40) < lengths[:, None])
    fake.place, model.config.seconds = -1, 0.01
    assert model.sample(LABELS, SPEAKERS)[1].tolist() == [5, 0, 20, 80]  # unless told, as long as it has learned
    with pytest.raises(ValueError, match="at least 1"):
        model.sample(LABELS, SPEAKERS, seconds=0.0)


def test_a_seed_gives_the_same_clips_and_another_seed_others():
    model = tiny_wave()
    a, b, c = (model.sample(LABELS, SPEAKERS, 20, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_it_learns_one_batch_by_heart_and_says_it():
    model = tiny_wave(asleep=True, width=48, label_dropout=0.0, crop=40)
    lengths = torch.tensor([20, 36, 28])
    codes = clips(3, 40)
    batch = {"codes": codes, "lengths": lengths, "labels": LABELS[:3], "speakers": SPEAKERS[:3]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 250)
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    waveforms, said = model.sample(LABELS[:3], SPEAKERS[:3], 40, temperature=0.0)
    assert torch.equal(said, lengths)
    for clip, length in enumerate(lengths):
        assert torch.equal(wave_ar.mu_law_encode(waveforms[clip, :length]), codes[clip, :length])


def test_a_crop_that_no_place_has_its_whole_past_in_is_refused():
    with pytest.raises(ValueError, match="crop must be at least the 2\\^layers = 16"):
        tiny_wave(crop=15)
