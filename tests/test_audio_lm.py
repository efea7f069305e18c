"""Audio LM: patterns that round-trip, a future that is never seen, clips that stop at their end."""

import math

import pytest
import torch
from conftest import awake
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanogen.audio import audio_lm
from nanogen.audio.audio_lm import Config, from_pattern, pattern_steps, to_pattern
from nanogen.blocks.quantize import nearest

LABELS, SPEAKERS = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 2])  # last: null classes
DISCRETE = ("flat", "parallel", "delay")
PATTERNS = audio_lm.PATTERNS


class TinyCodec(nn.Module):
    """A frame is 4 samples, its latent the samples themselves; each of 3 codebooks has 8 codes for
    what the ones before left over."""

    hop, frame_rate, codebooks, codebook_size = 4, 2000.0, 3, 8

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.tables = [torch.randn(8, 4, generator=generator) * 0.3 / 2**k for k in range(3)]

    def code_vectors(self):
        return self.tables

    def latents(self, waveforms):
        return nn.functional.pad(waveforms, (0, -waveforms.shape[1] % 4)).unflatten(1, (-1, 4))

    def decode_latents(self, z):
        return z.flatten(1)

    def encode(self, waveforms, codebooks=None):
        rest, codes = self.latents(waveforms), []
        for table in self.tables[:codebooks]:
            codes.append(nearest(rest.flatten(0, 1), table).view(rest.shape[:2]))
            rest = rest - table[codes[-1]]
        return torch.stack(codes, dim=-1)

    def decode(self, codes):
        return self.decode_latents(sum(self.tables[k][codes[..., k]]
                                       for k in range(codes.shape[2])))


def tiny_lm(pattern, asleep=False, **fields):
    """6 frames of 3 codebooks of 8 codes, 3 labels, 2 speakers."""
    torch.manual_seed(1)
    special = dict(head_width=32) if pattern == "latents" else dict(codebooks=3)
    small = dict(width=32, depth=2, heads=2, seconds=6 / 2000, dropout=0.0, classes=3, speakers=2)
    model = audio_lm.AudioLM(Config(pattern=pattern, **(small | special | fields)), TinyCodec())
    if pattern == "latents":
        nn.init.constant_(model.end.bias, -2.0)  # clips of some length, also before training
    return model if asleep else awake(model, 0.2)


def clips(count=4, total=24):
    """A batch of clips of 3, 5, 6 and 2 frames, the last frame of each not full."""
    lengths = torch.tensor([10, 19, 24, 7])[:count]
    waveforms = torch.randn(count, 24) * 0.3
    waveforms = waveforms.masked_fill(torch.arange(24) >= lengths[:, None], 0.0)
    waveforms = nn.functional.pad(waveforms, (0, total - 24))
    return {"waveforms": waveforms, "lengths": lengths, "labels": LABELS[:count] % 3,
            "speakers": SPEAKERS[:count] % 2}


def close(a, b, atol=1e-3):
    return torch.allclose(a.float(), b.float(), atol=atol, equal_nan=True)


# ---- patterns


@given(st.sampled_from(DISCRETE), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3))
def test_a_pattern_round_trips_and_gives_each_token_its_own_step(pattern, frames, codebooks, batch):
    tokens = torch.randint(100, (batch, frames, codebooks))
    grid = to_pattern(tokens, pattern, 100)
    assert torch.equal(from_pattern(grid, pattern, frames), tokens)
    counts = {"flat": frames * codebooks, "parallel": frames, "delay": frames + codebooks - 1}
    assert grid.shape[1] == counts[pattern]
    assert (grid != 100).sum() == tokens.numel() and (grid != 100).any(2).all()  # no idle step
    steps = pattern_steps(pattern, frames, codebooks)
    assert (steps.diff(dim=0) > 0).all() and (steps.diff(dim=1) >= (pattern != "parallel")).all()


def test_delay_shifts_codebook_k_by_k_steps():
    grid = to_pattern(torch.tensor([[[1, 11, 21], [2, 12, 22], [3, 13, 23]]]), "delay", 0)
    assert grid[0].T.tolist() == [[1, 2, 3, 0, 0], [0, 11, 12, 13, 0], [0, 0, 21, 22, 23]]


# ---- who sees what


@pytest.mark.parametrize("pattern", DISCRETE)
def test_a_future_token_never_changes_the_past_and_all_later_steps_know_it(pattern):
    model, tokens = tiny_lm(pattern), torch.randint(8, (4, 6, 3))
    steps, before = pattern_steps(pattern, 6, 3), model.logits(tokens, LABELS, SPEAKERS)
    for frame in range(6):
        for codebook in range(3):
            other = tokens.clone()
            other[:, frame, codebook] = (tokens[:, frame, codebook] + 3) % 8
            changed = (model.logits(other, LABELS, SPEAKERS) != before)[..., :8].any(-1).any(0)
            assert torch.equal(changed, steps > steps[frame, codebook])


def test_a_future_latent_never_changes_the_past():
    model, z = tiny_lm("latents"), torch.randn(4, 6, 4)
    before = model.hidden_states(z, LABELS, SPEAKERS, None)
    for frame in range(6):
        other = z.clone()
        other[:, frame] += 1
        difference = model.hidden_states(other, LABELS, SPEAKERS, None) - before
        changed = difference.abs().amax((0, 2)) > 1e-6
        assert changed.tolist() == [later > frame for later in range(6)]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_sampling_equals_uncached(pattern, guidance):
    model = tiny_lm(pattern)
    (a, ends), (b, others) = (
        model.generate(LABELS, SPEAKERS, guidance, seed=5, head_steps=3, cached=cached)
        for cached in (True, False))
    assert torch.equal(ends, others) and ends.max() > 1 and close(a, b)


@pytest.mark.parametrize("pattern", DISCRETE)
def test_tokens_are_drawn_by_the_probabilities_that_the_loss_scores(pattern, monkeypatch):
    model, drawn, draw = tiny_lm(pattern), [], audio_lm.sampling.draw

    def note(logits, *arguments):
        token = draw(logits, *arguments)
        drawn.append(-logits.log_softmax(-1).gather(-1, token[:, None])[:, 0])
        return token

    monkeypatch.setattr(audio_lm.sampling, "draw", note)
    impossible = torch.tensor([0.0] * 8 + [-1e9]).repeat(3, 1)  # clips of full length
    monkeypatch.setattr(model, "impossible", impossible)
    tokens, frames = model.generate(LABELS, SPEAKERS)
    nats, counts = model.token_nats({"tokens": tokens, "frames": frames, "labels": LABELS,
                                     "speakers": SPEAKERS})
    assert counts.all() and torch.allclose(nats.sum((1, 2)), sum(drawn), atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_guidance_1_is_conditional_and_costs_one_pass(pattern):
    model, rows, who = tiny_lm(pattern), [], (LABELS[:3], SPEAKERS[:3])
    model.transformer.register_forward_pre_hook(lambda module, x: rows.append(len(x[0])))
    plain, ends = model.generate(*who, head_steps=3)
    assert set(rows) == {3}
    rows.clear()
    guided, others = model.generate(*who, 1 + 1e-6, head_steps=3)
    assert set(rows) == {6} and torch.equal(ends, others) and close(plain, guided)
    assert not close(plain, model.generate(*who, 30.0, head_steps=3)[0], atol=1e-2)


def test_label_and_speaker_are_hidden_together(monkeypatch):
    model, seen, ones = tiny_lm("delay"), {}, torch.ones(400, 6, 3)
    monkeypatch.setattr(model, "token_nats", lambda batch: seen.update(batch) or (ones, ones))
    model.loss({"labels": torch.zeros(400).long(), "speakers": torch.ones(400).long()})
    hidden = seen["labels"] == 3
    assert torch.equal(hidden, seen["speakers"] == 2) and 10 < hidden.sum() < 90


# ---- data, loss, end


@pytest.mark.parametrize("total", [24, 28])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_clips_become_units_of_one_shape_and_clips_again(pattern, total):
    model, batch, latents = tiny_lm(pattern), clips(total=total), pattern == "latents"
    data = model.prepare(batch)
    assert data["frames"].tolist() == [3, 5, 6, 2]
    units = data["latents" if latents else "tokens"]
    assert units.shape == (4, 6, 4 if latents else 3)
    missing = units.isnan() if latents else units < 0
    assert torch.equal(missing.all(2), torch.arange(6) >= data["frames"][:, None])
    assert torch.equal(missing.any(2), missing.all(2))
    decoded = model.to_waveforms(units, data["frames"])
    waveforms, ends = decoded["waveforms"], decoded["lengths"]
    assert ends.tolist() == [12, 20, 24, 8] and waveforms.shape == (4, 24)
    lengths = batch["lengths"] if latents else ends
    assert torch.equal(waveforms != 0, torch.arange(24) < lengths[:, None])
    if latents:
        assert torch.allclose(waveforms, batch["waveforms"][:, :24])


def test_before_training_every_token_is_as_likely_as_another():
    model = tiny_lm("delay", asleep=True)
    nats, counts = model.token_nats(model.prepare(clips()))
    first, others = nats[..., 0][counts[..., 0]], nats[..., 1:][counts[..., 1:]]
    assert torch.allclose(first, torch.tensor(math.log(9)))  # it may also end the clip
    assert torch.allclose(others, torch.tensor(math.log(8)))
    assert counts.sum(1).tolist() == [[4, 3, 3], [6, 5, 5], [6, 6, 6], [3, 2, 2]]


def test_latents_reach_the_head_with_mean_0_and_std_1_and_each_frame_once(monkeypatch):
    model, seen, zeros = tiny_lm("latents"), [], torch.zeros(300).long()
    latents = torch.randn(300, 6, 4) * torch.tensor([0.1, 1, 5, 20])
    latents = latents + torch.tensor([3.0, 0, -8, 1])
    frames = torch.randint(1, 4, (300,))
    latents[torch.arange(6) >= frames[:, None]] = math.nan
    model.measure({"latents": latents})
    monkeypatch.setattr(model.head, "loss", lambda x, z: seen.append((x, z)) or x.sum())
    model.loss({"latents": latents, "frames": frames, "labels": zeros, "speakers": zeros})
    x, z = seen[0]
    assert len(x) == len(z) == 900 and x.isfinite().all() and z.isfinite().all()
    once = x[: frames.sum()]
    assert once.mean(0).abs().max() < 1e-3 and (once.std(0) - 1).abs().max() < 1e-3
    wanted = model.latents(latents)[~latents.isnan().any(-1)]
    assert torch.equal(once.sort(0).values, wanted.sort(0).values)
    assert torch.equal(x[frames.sum() :], once[: 900 - frames.sum()])


@pytest.mark.parametrize("pattern", DISCRETE)
def test_each_clip_stops_at_its_own_end(pattern, monkeypatch):
    model, ends, passes = tiny_lm(pattern), torch.tensor([2, 0, 4, 1]), []
    model.transformer.register_forward_pre_hook(lambda module, inputs: passes.append(1))
    steps = pattern_steps(pattern, 6, 3)
    due = iter(sorted((int(steps[frame, codebook]), codebook, frame)
                      for frame in range(6) for codebook in range(3)))

    def fake(logits, *arguments):
        _, codebook, frame = next(due)
        return torch.where((ends == frame) & (codebook == 0), model.blank, 5)

    monkeypatch.setattr(audio_lm.sampling, "draw", fake)
    tokens, frames = model.generate(LABELS, SPEAKERS)
    there = (torch.arange(6) < ends[:, None])[..., None].expand(-1, -1, 3)
    assert torch.equal(frames, ends) and torch.equal(tokens == 5, there)
    # up to the last token, or the blank that ends the last clip
    assert len(passes) == {"flat": 13, "parallel": 5, "delay": 6}[pattern]
    drawn = model.to_waveforms(tokens, frames)
    assert drawn["lengths"].tolist() == [8, 0, 16, 4] and drawn["waveforms"].shape == (4, 16)
    there = torch.arange(16) < drawn["lengths"][:, None]
    assert torch.equal(drawn["waveforms"] != 0, there)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_known_frames_stay_and_what_follows_depends_on_them(pattern):
    model, batch = tiny_lm(pattern), clips()
    whole = model.prepare(batch)
    whole = model.latents(whole["latents"]) if pattern == "latents" else whole["tokens"]
    known = model.known_part(batch["waveforms"], batch["lengths"])
    full = batch["lengths"] // 4  # the last frame of a clip may not be full: it is drawn
    there = torch.arange(6) < full[:, None]
    assert close(known[there], whole[there])
    assert torch.equal(known[..., 0].isnan() if pattern == "latents" else known[..., 0] < 0, ~there)
    (drawn, frames), (again, others) = (
        model.generate(LABELS, SPEAKERS, seed=3, head_steps=2, cached=cached, known=known)
        for cached in (True, False))
    assert (frames >= full).all() and close(drawn[there], known[there])
    assert torch.equal(frames, others) and close(drawn, again)
    other = model.known_part(batch["waveforms"].flip(0)[:, :4], torch.tensor([4] * 4))
    short = model.known_part(batch["waveforms"][:, :4], torch.tensor([4] * 4))
    (a, _), (b, _) = (model.generate(LABELS, SPEAKERS, seed=3, head_steps=2, known=part)
                      for part in (short, other))
    assert not close(a[:, 1:], b[:, 1:])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_memorises_one_batch_and_draws_it(pattern):
    model, batch = tiny_lm(pattern, asleep=True, label_dropout=0.0), clips(3)
    data, steps = model.prepare(batch), 300 if pattern == "latents" else 80
    model.measure(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        loss, metrics = model.loss(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = model.sample({name: batch[name] for name in model.conditions}, temperature=0.0)
    assert drawn["lengths"].tolist() == [12, 20, 24]
    if pattern == "latents":
        error = (drawn["waveforms"] - batch["waveforms"]).square().mean()
        assert metrics["end"] < 0.05 and error < 0.1 * batch["waveforms"].square().mean()
    else:
        copies = model.to_waveforms(data["tokens"], data["frames"])["waveforms"]
        assert loss < 0.05 and torch.allclose(drawn["waveforms"], copies, atol=1e-5)


@pytest.mark.parametrize("head, differ", [("mse", False), ("flow", True)])
def test_squared_error_draws_nothing_and_a_flow_does(head, differ):
    model, conditions = tiny_lm("latents", head=head), {"labels": LABELS, "speakers": SPEAKERS}
    with torch.no_grad():
        model.end.bias.fill_(-1e3)
        model.end.weight.zero_()
    a, b, again = (model.sample(conditions, seed=seed)["waveforms"] for seed in (1, 2, 1))
    assert a.isfinite().all() and a.shape == (4, 24)
    assert torch.equal(a, b) != differ and torch.equal(a, again)


@pytest.mark.parametrize("fields, sentence", [
    (dict(pattern="zigzag"), "pattern must be one of flat, parallel, delay, latents, got 'zigzag'"),
    (dict(pattern="latents", head="gan"), "head must be one of flow, mse, diffusion"),
    (dict(seconds=0.0), "seconds must be more than 0"), (dict(depth=0), "depth must be at least 1"),
    (dict(heads=0), "heads must be at least 1"), (dict(width=100), "width must be a multiple of 6"),
    (dict(dropout=1.0), "dropout must be from 0 to below 1"),
    (dict(label_dropout=2.0), "label_dropout must be from 0 to 1"),
    (dict(pattern="latents", codebooks=3), "codebooks has no effect"),
    (dict(head="mse"), "head has no effect with tokens"),
    (dict(pattern="latents", head="mse", head_depth=3), "head_depth has no effect")])
def test_a_config_refuses_bad_fields_by_name(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**fields)


def test_more_codebooks_than_the_codec_has_are_refused():
    with pytest.raises(ValueError, match="codebooks must be at most the codec's 3, got 4"):
        tiny_lm("delay", codebooks=4)
