"""Wave AR: samples as codes, a network that never sees the future, and ring buffers that remember
exactly what is needed."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import awake
from hypothesis import given
from hypothesis import strategies as st

from nanogen.audio import wave_ar

LABELS, SPEAKERS = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 2])  # last: the null classes
CONDITIONS = {"labels": LABELS, "speakers": SPEAKERS}
SOME = {"labels": LABELS[:3], "speakers": SPEAKERS[:3]}


def tiny_wave(asleep=False, **fields):
    """3 digits, 2 voices, 47 samples seen: two frames, and the last samples."""
    torch.manual_seed(1)
    fields = dict(width=16, layers=1, sample_width=16, crop=64, classes=3, speakers=2) | fields
    model = wave_ar.WaveAR(wave_ar.Config(**fields))
    return model if asleep else awake(model)


def clips(count=4, length=96):
    return torch.randint(1, 256, (count, length)).byte()


def draw(model, count, conditions=CONDITIONS, **settings):
    return model.sample(conditions, seconds=count / wave_ar.RATE, **settings)


# ---- samples as codes


@given(st.floats(-1, 1, allow_subnormal=False))
def test_a_sample_and_its_code_differ_by_half_a_step_of_the_scale(value):
    x = torch.tensor(value, dtype=torch.float32)
    code = wave_ar.mu_law_encode(x)
    half = 256 ** (1 / 254) - 1  # 2.2%
    assert (wave_ar.mu_law_decode(code) - x).abs() <= half * (x.abs() + 1 / 255) + 1e-6
    assert code.dtype == torch.uint8 and code == 256 - wave_ar.mu_law_encode(-x).long()


def test_silence_is_the_middle_and_codes_come_back_as_they_are():
    assert wave_ar.mu_law_encode(torch.zeros(3)).tolist() == [128] * 3
    assert wave_ar.mu_law_decode(torch.tensor([128])) == 0
    codes = torch.arange(1, 256)
    samples = wave_ar.mu_law_decode(codes)
    assert torch.equal(wave_ar.mu_law_encode(samples).long(), codes) and (samples.diff() > 0).all()
    assert samples[[0, -1]].tolist() == [-1, 1]
    assert wave_ar.mu_law_encode(torch.tensor([-3.0, 3.0])).tolist() == [1, 255]


# ---- the network


@pytest.mark.parametrize("position", [0, 1, 16, 17, 40, 95])
def test_a_future_sample_never_changes_the_past_and_the_field_is_as_wide_as_promised(position):
    model, codes = tiny_wave(), clips().long()
    other = codes.clone()
    other[:, position] = (codes[:, position] + 99) % 256
    a, b = (model.logits(x, LABELS, SPEAKERS) for x in (codes, other))
    changed = (a != b).flatten(2).any(2).any(0).tolist()
    # seen by the 16 samples after it, and by two frames: the next one that begins after it, and
    # the one behind that
    frame = -(-position // wave_ar.FRAME) * wave_ar.FRAME
    seen = [position <= later < max(position + 16, frame + 32) for later in range(96)]
    assert changed == seen and sum(seen) <= model.receptive_field
    assert position != 1 or sum(seen) == model.receptive_field


def test_cached_logits_equal_uncached():
    model, codes = tiny_wave(), clips().long()
    whole, biases = model.logits(codes, LABELS, SPEAKERS), model.biases(LABELS, SPEAKERS)
    rings = [torch.zeros(layer.dilation, 4, 16) for layer in model.layers]
    above, start = torch.zeros(4, 16, 16), F.pad(codes, (15, 0), value=wave_ar.BOUNDARY)
    for i in range(96):
        step = model.step(start[:, i : i + 16], i, rings, above, biases, model.head())
        assert torch.allclose(step, whole[:, i], atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cached_sampling_equals_uncached(guidance):
    model = tiny_wave()
    a, b = (draw(model, 40, guidance=guidance, seed=5, cached=c) for c in (True, False))
    assert a["waveforms"].shape == (4, 40) and all(torch.equal(a[name], b[name]) for name in a)


def test_guidance_1_is_conditional_and_another_hides_label_and_speaker_together(monkeypatch):
    model, asked = tiny_wave(), []
    biases = model.biases
    monkeypatch.setattr(model, "biases", lambda *pair: asked.append(pair) or biases(*pair))
    plain, guided, strong = (draw(model, 30, SOME, guidance=guidance)["waveforms"]
                             for guidance in (1.0, 1 + 1e-6, 9.0))
    assert torch.equal(plain, guided) and not torch.equal(plain, strong)
    assert len(asked[0][0]) == 3 and asked[1][0].tolist() == [0, 1, 2, 3, 3, 3]
    assert asked[1][1].tolist() == [0, 1, 1, 2, 2, 2]
    asked.clear()
    model.loss({"codes": clips(400), "lengths": torch.full((400,), 40),
                "labels": torch.zeros(400).long(), "speakers": torch.ones(400).long()})
    labels, speakers = asked[0]
    assert torch.equal(labels == 3, speakers == 2) and 10 < (labels == 3).sum() < 90


# ---- likelihood


def test_before_training_a_sample_costs_eight_bits():
    model = tiny_wave(asleep=True)
    batch = model.prepare({"waveforms": torch.rand(8, 100) * 2 - 1, "lengths": torch.full((8,), 80),
                           "labels": torch.arange(8) % 3, "speakers": torch.arange(8) % 2})
    loss, metrics = model.loss(batch)
    assert loss.item() == pytest.approx(math.log(257), rel=1e-5)
    assert metrics["bits_per_sample"].item() == pytest.approx(8.006, abs=0.01)


def test_what_is_beyond_the_end_costs_nothing_and_the_end_costs_once():
    model, codes, lengths = tiny_wave(), clips(length=48), torch.tensor([10, 48, 47, 30])
    likelihood = model.log_likelihood({"codes": codes, "lengths": lengths} | CONDITIONS)
    other = codes.clone()
    other[0, 10:], other[3, 30:] = 7, 9
    again = model.log_likelihood({"codes": other, "lengths": lengths} | CONDITIONS)
    assert torch.allclose(again, likelihood, atol=1e-4)
    previous = F.pad(codes.long(), (1, 0), value=wave_ar.BOUNDARY)
    logs = model.logits(previous, LABELS, SPEAKERS).log_softmax(-1)
    for clip, length in enumerate(lengths.tolist()):
        expected = logs[clip, torch.arange(length), codes[clip, :length].long()].sum()
        if length < 48:  # a full row may have been cut
            expected = expected + logs[clip, length, wave_ar.BOUNDARY]
        assert likelihood[clip].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("start", [0, 16, 32])
def test_a_window_gives_each_position_the_logits_of_the_whole_clip(start):
    model, codes, lengths = tiny_wave(), clips(), torch.tensor([92, 96, 40, 30])
    previous, symbols, scored = model.window(codes, lengths, torch.full((4,), start), 64)
    padded = F.pad(codes.long(), (1, 0), value=wave_ar.BOUNDARY)
    whole = model.logits(padded, LABELS, SPEAKERS)[:, start : start + 64]
    part = model.logits(previous, LABELS, SPEAKERS)
    assert torch.allclose(part[scored], whole[scored], atol=1e-4)
    assert scored.any(1).tolist() == [True, True, start == 0, start == 0]
    assert (symbols[2][scored[2]][-1:] == wave_ar.BOUNDARY).all()


def test_windows_are_drawn_up_to_the_end_and_not_beyond(monkeypatch):
    model, drawn, lengths = tiny_wave(), [], torch.tensor([20, 63, 64, 90]).repeat(200)
    window = model.window

    def spy(codes, lengths, start, count):
        drawn.extend([start, *window(codes, lengths, start, count)])
        return drawn[1:]

    monkeypatch.setattr(model, "window", spy)
    model.loss({"codes": clips(800), "lengths": lengths, "labels": LABELS.repeat(200),
                "speakers": SPEAKERS.repeat(200)})
    start, _, symbols, scored = drawn
    starts = [set(start[i::4].tolist()) for i in range(4)]
    assert starts == [{0}, {0}, {0, 16}, {0, 16, 32}]  # crop is 64
    ends = scored & (symbols == wave_ar.BOUNDARY)
    assert torch.equal(ends.sum(1), (start + 64 > lengths).long())  # only in each clip's last one
    assert ends[3::4].sum() > 60, "the end of a long clip is hardly ever trained"
    assert not (scored & (start[:, None] + torch.arange(64) > lengths[:, None])).any()


def test_counting_costs_what_chance_and_certainty_cost():
    torch.manual_seed(0)
    noise = [torch.randint(1, 256, (4000,)).byte() for _ in range(60)]
    bits = wave_ar.entropy_baselines(noise[:50], noise[50:])
    assert all(7.98 < value < 8.5 for value in bits.values())  # log2(255), and what the counts cost
    phase = 6.28 * torch.rand(60, 1)
    tones = list(wave_ar.mu_law_encode(0.8 * torch.sin(phase + torch.arange(2000) * 0.3)))
    bits = wave_ar.entropy_baselines(tones[:50], tones[50:])
    assert bits["order_0"] > bits["order_1"] > bits["linear_prediction"]
    seen, unseen = ([torch.full((100,), code).byte()] for code in (128, 9))
    assert all(map(math.isfinite, wave_ar.entropy_baselines(seen, unseen).values()))


# ---- sampling


def test_a_clip_stops_at_its_end_and_lengths_are_right(monkeypatch):
    model, ends, position = tiny_wave(seconds=0.01), [5, 0, 20, 999], [-1]

    def fake(logits, *arguments):
        position[0] += 1
        return torch.tensor([wave_ar.BOUNDARY if position[0] == end else 200 for end in ends])

    monkeypatch.setattr(wave_ar, "draw", fake)
    drawn = model.sample(CONDITIONS, seconds=0.005)
    waveforms, lengths = drawn["waveforms"], drawn["lengths"]
    assert lengths.tolist() == [5, 0, 20, 40] and waveforms.shape == (4, 40)
    assert torch.equal(waveforms != 0, torch.arange(40) < lengths[:, None])
    position[0] = -1
    assert model.sample(CONDITIONS)["lengths"].tolist() == [5, 0, 20, 80]  # `seconds` of the Config
    with pytest.raises(ValueError, match="at least one sample"):
        model.sample(CONDITIONS, seconds=0.0)


def test_a_seed_gives_the_same_clips_and_another_seed_others():
    model = tiny_wave()
    a, b, c = (draw(model, 20, seed=seed)["waveforms"] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_it_overfits_one_batch_and_samples_it():
    model = tiny_wave(asleep=True, width=48, sample_width=48, label_dropout=0.0)
    codes, lengths = clips(3, 40), torch.tensor([20, 36, 28])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 250)
        loss, _ = model.loss({"codes": codes, "lengths": lengths} | SOME)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    drawn = draw(model, 40, SOME, temperature=0.0)
    assert torch.equal(drawn["lengths"], lengths)
    for clip, length in enumerate(lengths):
        again = wave_ar.mu_law_encode(drawn["waveforms"][clip, :length])
        assert torch.equal(again, codes[clip, :length])


@pytest.mark.parametrize(("fields", "message"), [
    (dict(crop=62), "crop must be at least 63"), (dict(layers=0), "layers must"),
    (dict(width=0), "width must"), (dict(seconds=0.0), "seconds must")])
def test_bad_settings_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_wave(**fields)
