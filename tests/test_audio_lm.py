"""Audio LM: patterns that round-trip, a future that is never seen, clips that stop at their own end."""

import math

import pytest
import torch
from conftest import awake
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanogen.audio import audio_lm
from nanogen.audio.audio_lm import from_pattern, pattern_steps, to_pattern
from nanogen.blocks.quantize import nearest

LABELS, SPEAKERS = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 2])  # the last ones: none
WORDS = ("flat", "parallel", "delay")
PATTERNS = audio_lm.PATTERNS
STEPS = {"flat": 18, "parallel": 6, "delay": 8, "latents": 6}  # of 6 frames of 3 books


class TinyCodec(nn.Module):
    """A frame is 4 samples, its latent the samples themselves, and each book has 8 words for what the ones before left."""

    hop, rate, frame_rate, books, vocabulary = 4, 8000, 2000.0, 3, 8

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.tables = [torch.randn(8, 4, generator=generator) * 0.3 / 2**k for k in range(self.books)]

    def codes(self):
        return self.tables

    def latents(self, waveforms):
        return nn.functional.pad(waveforms, (0, -waveforms.shape[1] % 4)).unflatten(1, (-1, 4))

    def decode_latents(self, z):
        return z.flatten(1)

    def encode(self, waveforms, books=None):
        rest, indices = self.latents(waveforms), []
        for table in self.tables[:books]:
            indices.append(nearest(rest.flatten(0, 1), table).view(rest.shape[:2]))
            rest = rest - table[indices[-1]]
        return torch.stack(indices, dim=-1)

    def decode(self, indices):
        return self.decode_latents(sum(self.tables[k][indices[..., k]] for k in range(indices.shape[2])))


def tiny_lm(pattern, asleep=False, **fields):
    """6 frames of 3 books of 8 words, 3 digits, 2 voices."""
    torch.manual_seed(1)
    fields = dict(width=32, depth=2, heads=2, books=3, head_width=32, seconds=6 / 2000, dropout=0.0, classes=3, speakers=2) | fields
    model = audio_lm.AudioLM(audio_lm.Config(pattern=pattern, **fields), TinyCodec())
    if pattern == "latents":
        nn.init.constant_(model.end.bias, -2.0)  # clips of some length, also before training
    return model if asleep else awake(model, 0.2)


def clips(count=4):
    """Clips of 3, 5, 6 and 2 frames, the last frame of each not full."""
    lengths = torch.tensor([10, 19, 24, 7])[:count]
    waveforms = torch.randn(count, 24) * 0.3
    return waveforms.masked_fill(torch.arange(24) >= lengths[:, None], 0.0), lengths, LABELS[:count] % 3, SPEAKERS[:count] % 2


# --- Patterns


@given(st.sampled_from(WORDS), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3))
def test_a_pattern_round_trips_and_gives_each_word_a_step_of_its_own(pattern, frames, books, batch):
    tokens = torch.randint(100, (batch, frames, books))
    grid = to_pattern(tokens, pattern, 100)
    assert torch.equal(from_pattern(grid, pattern, frames), tokens)
    assert grid.shape[1] == {"flat": frames * books, "parallel": frames, "delay": frames + books - 1}[pattern]
    assert (grid != 100).sum() == tokens.numel() and (grid != 100).any(2).all()  # nothing twice, and no idle step
    steps = pattern_steps(pattern, frames, books)
    assert (steps.diff(dim=0) > 0).all() and (steps.diff(dim=1) >= (pattern != "parallel")).all()


def test_delay_shifts_book_k_by_k_steps():
    grid = to_pattern(torch.tensor([[[1, 11, 21], [2, 12, 22], [3, 13, 23]]]), "delay", 0)
    assert grid[0].T.tolist() == [[1, 2, 3, 0, 0], [0, 11, 12, 13, 0], [0, 0, 21, 22, 23]]


# --- Who sees what


@pytest.mark.parametrize("pattern", WORDS)
def test_a_future_word_never_changes_the_past_and_all_later_steps_know_it(pattern):
    model, tokens = tiny_lm(pattern), torch.randint(8, (4, 6, 3))
    steps, before = pattern_steps(pattern, 6, 3), model.logits(tokens, LABELS, SPEAKERS)
    for frame in range(6):
        for book in range(3):
            other = tokens.clone()
            other[:, frame, book] = (tokens[:, frame, book] + 3) % 8
            changed = (model.logits(other, LABELS, SPEAKERS) != before)[..., :8].any(-1).any(0)
            assert torch.equal(changed, steps > steps[frame, book])


def test_a_future_vector_never_changes_the_past():
    model, z = tiny_lm("latents"), torch.randn(4, 6, 4)
    before = model.directions(z, LABELS, SPEAKERS, None)
    for frame in range(6):
        other = z.clone()
        other[:, frame] += 1
        changed = (model.directions(other, LABELS, SPEAKERS, None) - before).abs().amax((0, 2)) > 1e-6
        assert changed.tolist() == [later > frame for later in range(6)]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_sampling_equals_uncached(pattern, guidance):
    model = tiny_lm(pattern)
    (a, ends), (b, others) = (model.generate(LABELS, SPEAKERS, guidance, seed=5, head_steps=3, cached=c) for c in (True, False))
    assert torch.equal(ends, others) and ends.max() > 1
    assert torch.allclose(a.float(), b.float(), atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("pattern", WORDS)
def test_words_are_drawn_by_the_probabilities_that_the_loss_scores(pattern, monkeypatch):
    model, drawn, draw = tiny_lm(pattern), [], audio_lm.draw

    def note(logits, *arguments):
        word = draw(logits, *arguments)
        drawn.append(-logits.log_softmax(-1).gather(-1, word[:, None])[:, 0])
        return word

    monkeypatch.setattr(audio_lm, "draw", note)
    monkeypatch.setattr(model, "impossible", torch.tensor([0.0] * 8 + [-1e9]).repeat(3, 1))  # clips of full length
    tokens, frames = model.generate(LABELS, SPEAKERS)
    nats, scored = model.token_nats(tokens, frames, LABELS, SPEAKERS)
    assert scored.all() and torch.allclose(nats.sum((1, 2)), sum(drawn), atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_guidance_1_is_conditional_and_costs_one_pass(pattern):
    model, rows = tiny_lm(pattern), []
    model.transformer.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    plain, ends = model.generate(LABELS[:3], SPEAKERS[:3], head_steps=3)
    assert set(rows) == {3}
    rows.clear()
    guided, others = model.generate(LABELS[:3], SPEAKERS[:3], 1 + 1e-6, head_steps=3)
    assert set(rows) == {6} and torch.equal(ends, others) and torch.allclose(plain.float(), guided.float(), atol=1e-3, equal_nan=True)
    other = model.generate(LABELS[:3], SPEAKERS[:3], 30.0, head_steps=3)[0]
    assert not torch.allclose(plain.float(), other.float(), atol=1e-2, equal_nan=True)


def test_digit_and_speaker_are_hidden_together(monkeypatch):
    model, asked = tiny_lm("delay"), []
    monkeypatch.setattr(model, "token_nats", lambda tokens, frames, *who: asked.extend(who) or (torch.ones(400, 6, 3), torch.ones(400, 6, 3)))
    model.loss({"tokens": None, "frames": None, "labels": torch.zeros(400).long(), "speakers": torch.ones(400).long()})
    assert torch.equal(asked[0] == 3, asked[1] == 2) and 10 < (asked[0] == 3).sum() < 90


# --- Data, loss, end


@pytest.mark.parametrize("pattern", PATTERNS)
def test_clips_become_units_of_one_shape_and_clips_again(pattern):
    model, (waveforms, lengths, labels, speakers) = tiny_lm(pattern), clips()
    for width in (24, 28):  # padded to whatever
        data = model.prepare(nn.functional.pad(waveforms, (0, width - 24)), lengths, labels, speakers)
        assert data["frames"].tolist() == [3, 5, 6, 2]
        units = data["latents" if pattern == "latents" else "tokens"]
        assert units.shape == (4, 6, 4 if pattern == "latents" else 3)
        missing = units.isnan() if pattern == "latents" else units < 0
        assert torch.equal(missing.all(2), torch.arange(6) >= data["frames"][:, None]) and torch.equal(missing.any(2), missing.all(2))
    decoded, ends = model.to_waveforms(units, data["frames"])
    assert ends.tolist() == [12, 20, 24, 8] and decoded.shape == (4, 24)
    assert torch.equal(decoded != 0, torch.arange(24) < (lengths if pattern == "latents" else ends)[:, None])
    if pattern == "latents":
        assert torch.allclose(decoded, waveforms)


def test_before_training_every_word_is_as_likely_as_another():
    model = tiny_lm("delay", asleep=True)
    data = model.prepare(*clips())
    nats, scored = model.token_nats(data["tokens"], data["frames"], data["labels"], data["speakers"])
    assert torch.allclose(nats[..., 0][scored[..., 0]], torch.tensor(math.log(9))) and torch.allclose(nats[..., 1:][scored[..., 1:]], torch.tensor(math.log(8)))
    counted = scored.sum(1).tolist()
    assert counted == [[4, 3, 3], [6, 5, 5], [6, 6, 6], [3, 2, 2]]  # book 0 has the end too, if there is room for it


def test_latents_reach_the_head_with_mean_0_and_std_1_and_each_frame_once(monkeypatch):
    model, seen = tiny_lm("latents"), []
    latents = torch.randn(300, 6, 4) * torch.tensor([0.1, 1, 5, 20]) + torch.tensor([3.0, 0, -8, 1])
    frames = torch.randint(1, 4, (300,))
    latents[torch.arange(6) >= frames[:, None]] = math.nan
    model.measure(latents)
    monkeypatch.setattr(model.head, "loss", lambda x, z: seen.append((x, z)) or x.sum())
    model.loss({"latents": latents, "frames": frames, "labels": torch.zeros(300).long(), "speakers": torch.zeros(300).long()})
    x, z = seen[0]
    assert len(x) == len(z) == 900 and x.isfinite().all() and z.isfinite().all()
    once = x[: frames.sum()]
    assert once.mean(0).abs().max() < 1e-3 and (once.std(0) - 1).abs().max() < 1e-3
    wanted = ((latents - model.latent_mean) / model.latent_std)[~latents.isnan().any(-1)]
    assert torch.equal(once.sort(0).values, wanted.sort(0).values) and torch.equal(x[frames.sum() :], once[: 900 - frames.sum()])


@pytest.mark.parametrize("pattern", WORDS)
def test_each_clip_stops_at_its_own_end(pattern, monkeypatch):
    model, ends, passes = tiny_lm(pattern), torch.tensor([2, 0, 4, 1]), []
    model.transformer.register_forward_pre_hook(lambda module, inputs: passes.append(1))
    due = [(int(step), book, frame) for frame, row in enumerate(pattern_steps(pattern, 6, 3)) for book, step in enumerate(row)]
    due = iter(sorted(due))

    def fake(logits, *arguments):
        _, book, frame = next(due)
        return torch.where((ends == frame) & (book == 0), model.nothing, 5)

    monkeypatch.setattr(audio_lm, "draw", fake)
    tokens, frames = model.generate(LABELS, SPEAKERS)
    assert torch.equal(frames, ends) and torch.equal(tokens == 5, (torch.arange(6) < ends[:, None])[..., None].expand(-1, -1, 3))
    assert len(passes) == {"flat": 13, "parallel": 5, "delay": 6}[pattern]  # up to the last word, or the END that says so
    waveforms, lengths = model.to_waveforms(tokens, frames)
    assert lengths.tolist() == [8, 0, 16, 4] and waveforms.shape == (4, 16)
    assert torch.equal(waveforms != 0, torch.arange(16) < lengths[:, None])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_learns_one_batch_by_heart_and_says_it(pattern):
    model, (waveforms, lengths, labels, speakers) = tiny_lm(pattern, asleep=True, label_dropout=0.0), clips(3)
    data = model.prepare(waveforms, lengths, labels, speakers)
    if pattern == "latents":
        model.measure(data["latents"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    steps = 300 if pattern == "latents" else 80
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        loss, numbers = model.loss(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said, ends = model.sample(labels, speakers, STEPS[pattern], temperature=0.0)
    assert ends.tolist() == [12, 20, 24]
    if pattern == "latents":
        assert numbers["end"] < 0.05 and (said - waveforms).square().mean() < 0.1 * waveforms.square().mean()
    else:
        assert loss < 0.05 and torch.allclose(said, model.to_waveforms(data["tokens"], data["frames"])[0], atol=1e-5)


def test_squared_error_draws_nothing_and_a_flow_does():
    for head, differ in (("mse", False), ("flow", True)):
        model = tiny_lm("latents", head=head)
        with torch.no_grad():
            model.end.bias.fill_(-1e3)
            model.end.weight.zero_()
        a, b = (model.sample(LABELS, SPEAKERS, seed=seed)[0] for seed in (1, 2))
        assert a.isfinite().all() and a.shape == (4, 24) and torch.equal(a, b) != differ
        again = model.sample(LABELS, SPEAKERS, seed=1)[0]
        assert torch.equal(a, again)


@pytest.mark.parametrize(("pattern", "fields", "words"), [
    ("zigzag", {}, "pattern must be one of flat, parallel, delay, latents, got 'zigzag'"), ("delay", dict(books=4), "books must be"),
    ("latents", dict(head="gan"), "head must be"), ("flat", dict(seconds=0.0), "seconds must be")])
def test_what_does_not_exist_is_refused_by_name(pattern, fields, words):
    with pytest.raises(ValueError, match=words):
        tiny_lm(pattern, **fields)


def test_numbers_of_steps_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="has 8 steps; steps cannot be 7"):
        tiny_lm("delay").sample(LABELS, SPEAKERS, steps=7)
