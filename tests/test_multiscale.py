"""VAR and its tokenizer: scales that add up, and a chain whose unit is a scale."""

import pytest
import torch
import torch.nn.functional as F
from conftest import awake, tiny, tiny_tokenizer

from nanogen.blocks.multiscale import MultiScaleVQ, shrink
from nanogen.image import var

LABELS = torch.tensor([0, 1, 2, 3])  # the last one: the null class
IMAGES = torch.linspace(-1, 1, 5 * 3 * 16 * 16).view(5, 3, 16, 16).sin()


def learned(steps: int = 60) -> tuple[MultiScaleVQ, torch.Tensor]:
    """A quantizer that has seen smooth features (64, 8, 8, 6) for some steps, and such features."""
    torch.manual_seed(0)
    coarse = torch.randn(steps + 1, 64, 6, 3, 3)
    features = F.interpolate(coarse.flatten(0, 1), 8, mode="bilinear")
    features = features + 0.1 * torch.randn(64 * (steps + 1), 6, 8, 8)
    features = features.permute(0, 2, 3, 1).unflatten(0, (-1, 64))
    quantizer = MultiScaleVQ(6, 64, (1, 2, 3, 4, 6, 8), code_dim=6, decay=0.9).train()
    for batch in features[:-1]:
        quantizer(batch)
    return quantizer, features[-1]


def error_by_scale(quantizer: MultiScaleVQ, features: torch.Tensor) -> list[float]:
    z = F.normalize(quantizer.project_in(features), dim=-1) * 6**0.5
    sums = quantizer.sums(quantizer(features).indices)
    return [(total.permute(0, 2, 3, 1) - z).square().mean().item() for total in sums]


def test_every_scale_brings_the_sum_nearer_to_the_features():
    errors = error_by_scale(*learned())
    assert all(a > b for a, b in zip(errors[:-1], errors[1:], strict=True))


def test_tokens_alone_give_what_the_quantizer_gave():
    quantizer, features = learned()
    quantizer.eval()
    codes, indices, _ = quantizer(features)
    assert indices.shape == (64, 1 + 4 + 9 + 16 + 36 + 64)
    assert torch.allclose(quantizer.decode(indices).view_as(codes), codes, atol=1e-5)
    assert [part.shape[1] for part in quantizer.split(indices[:, :30])] == [1, 4, 9, 16]


def test_the_codebook_sees_every_scale_at_the_same_size():
    """The residuals of fine scales are small: unscaled, all would get the same few codes."""
    quantizer, features = learned()
    assert quantizer.std[-1].mean() < 0.8 * quantizer.std[1].mean()
    quantizer.decay = 0.0  # measure this batch alone
    before = quantizer.std.clone()
    quantizer(features)
    assert ((quantizer.std / before).mean(1) - 1).abs().max() < 0.3


def test_the_gradient_of_the_decoder_reaches_the_features_once():
    quantizer, features = learned()
    quantizer.eval()
    z = quantizer.project_in(features).detach().requires_grad_()
    arrived = torch.autograd.grad(quantizer.quantize(z)[0].pow(2).sum(), z)[0]
    codes = quantizer.quantize(z)[0].detach()
    expected = torch.autograd.grad((F.normalize(z, dim=-1) * 6**0.5 * 2 * codes).sum(), z)[0]
    assert torch.allclose(arrived, expected, atol=1e-4)


@pytest.mark.parametrize("scales", [(2, 1), (), (0, 1)])
def test_scales_that_do_not_rise_are_refused(scales):
    with pytest.raises(ValueError, match="must"):
        MultiScaleVQ(6, 8, scales)


# --- The chain of scales


def passes(model) -> list[torch.Tensor]:
    """The tokens of each pass."""
    return list(model.order.split(model.pass_sizes))


@torch.no_grad()
def test_cached_passes_equal_the_masked_pass_over_all_of_them():
    model = tiny("var")
    tokens, condition = torch.randint(32, (4, 30)), model.label(LABELS)
    whole, cache, end = model.logits(tokens, LABELS), var.Cache(model.transformer, 4, 30), 0
    for i, cells in enumerate(passes(model)):
        angles, end = model.angles[end : end + len(cells)], end + len(cells)
        h = model.transformer(model.input(tokens, i, []), angles, condition=condition, cache=cache)
        assert torch.allclose(h @ model.head().mT, whole[:, cells], atol=1e-4)


def test_sampling_with_the_cache_draws_the_same_tokens():
    model = tiny("var")
    for settings in (dict(), dict(guidance=3.0), dict(guidance=3.0, hide_scale=False)):
        first = model.draw_tokens(LABELS[:3], seed=4, **settings)
        assert torch.equal(first, model.draw_tokens(LABELS[:3], seed=4, cached=False, **settings))


def test_coarse_scales_that_are_given_are_kept_and_what_follows_depends_on_them():
    model = tiny("var")
    first = model.draw_tokens(LABELS[:3], seed=2)
    for end in (0, 1, 5, 14, 30):
        again = model.draw_tokens(LABELS[:3], guidance=2.0, seed=3, prefix=first[:, :end])
        assert torch.equal(again[:, :end], first[:, :end])
        assert torch.equal(again, first) == (end == 30)
    prefix, settings = first[:, :14], dict(seed=3, temperature=0)
    given = model.draw_tokens(LABELS[:3], prefix=prefix, **settings)
    other = model.draw_tokens(LABELS[:3], prefix=(prefix + 7) % 32, **settings)
    assert not torch.equal(given[:, 14:], other[:, 14:])
    again = model.draw_tokens(LABELS[:3], prefix=prefix, cached=False, **settings)
    assert torch.equal(given, again)
    with pytest.raises(ValueError, match="prefix must be whole scales"):
        model.draw_tokens(LABELS[:3], prefix=first[:, :6])


def test_what_training_feeds_in_is_what_sampling_feeds_in():
    """The likeliest tokens, drawn pass after pass, are the likeliest for one pass over all."""
    model = tiny("var")
    tokens = model.draw_tokens(LABELS[:3], temperature=0)
    assert torch.equal(model.logits(tokens, LABELS[:3]).argmax(-1), tokens)


@torch.no_grad()
def test_a_pass_starts_from_the_scales_before_and_the_cells_so_far_of_its_own():
    """By hand: the third of four scales in two passes. Cells that are still to come are at the mean
    of the scale's residual."""
    model = tiny("var", passes=(1, 1, 2, 1))
    quantizer, tokens = model.tokenizer.quantizer, torch.randint(32, (4, 30))
    quantizer.mean.normal_()
    codes = quantizer.codebook.vectors[tokens[:, 5:14]]
    first = var.spread(3, 2) == 0
    total = quantizer.sums(tokens[:, :5])[-1] + quantizer.enlarge(codes * first[:, None], 2)
    x = model.embed(shrink(total, 3)).flatten(2).transpose(1, 2)
    expected = x[:, ~first] + model.pass_embedding.weight[3]
    assert torch.allclose(model.input(tokens, 3, []), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("hide_scale", [True, False])
def test_guidance_leads_away_from_a_prediction_that_lacks(hide_scale, monkeypatch):
    """By hand: the second pass of two for the last scale, predicted without the label and, with
    hide_scale, as if the first pass did not exist."""
    model, null = tiny("var", passes=(2,)), torch.full_like(LABELS, 3)
    seen_by_draw = []
    monkeypatch.setattr(
        var, "draw", lambda logits, *_: seen_by_draw.append(logits) or logits.argmax(-1))
    tokens = model.draw_tokens(LABELS, guidance=4.0, hide_scale=hide_scale)
    *coarse, _, cells = passes(model)
    strong, weak = (model.logits(tokens, labels)[:, cells] for labels in (LABELS, null))
    if hide_scale:
        other = tokens.clone()
        other[:, 14:] = (tokens[:, 14:] + 7) % 32  # all of the last scale
        blind = model.input(other, 4, [], blind=True)
        assert torch.equal(blind, model.input(tokens, 4, [], blind=True))
        assert not torch.equal(model.input(other, 4, []), model.input(tokens, 4, []))
        x = torch.cat([*(model.input(tokens, i, []) for i in range(3)), blind], dim=1)
        i = torch.repeat_interleave(torch.tensor([1, 4, 9, len(cells)]))
        angles = torch.cat([model.angles[:14], model.angles[-len(cells) :]])
        mask = i[:, None] >= i
        h = model.transformer(x, angles, mask=mask, condition=model.label(null))
        lacking = h[:, -len(cells) :] @ model.head().mT
        assert not torch.allclose(lacking, weak, atol=1e-2)
        weak = lacking
    assert torch.allclose(seen_by_draw[-1], weak + 4 * (strong - weak), atol=1e-4)
    assert not torch.allclose(strong, weak, atol=1e-2)


def test_with_one_pass_for_each_scale_it_is_the_papers_var():
    model = tiny("var", passes=(1,))
    assert model.pass_sizes == [1, 4, 9, 16] and torch.equal(model.order, torch.arange(30))
    scale = torch.repeat_interleave(torch.tensor(model.pass_sizes))
    assert torch.equal(model.mask, scale[:, None] >= scale)  # block-causal
    hidden, plain = (model.draw_tokens(LABELS, 3.0, hide_scale=hide) for hide in (True, False))
    assert torch.equal(hidden, plain)  # nothing but the label is there to hide


@pytest.mark.parametrize("passes", [(1, 1, 1, 1), (1, 1, 2, 2), (1, 1, 1, 4)])
def test_a_pass_never_changes_an_earlier_one_or_itself(passes):
    model, tokens = tiny("var", passes=passes), torch.randint(32, (4, 30))
    before = model.logits(tokens, LABELS)
    for i in range(sum(passes)):
        mine, later = model.pass_of == i, model.pass_of > i
        other = torch.where(mine, (tokens + 7) % 32, tokens)
        changed = (model.logits(other, LABELS) != before).any(-1).any(0)
        assert mine.any() and not changed[~later].any()
        assert i == sum(passes) - 1 or changed[later].float().mean() > 0.8


@pytest.mark.parametrize(("passes", "why"), [
    ((1, 1, 1, 1, 1), "at most 4 scales"), ((), "must be numbers"), ((1, 0, 1, 1), "at least 1"),
    ((2, 1, 1, 1), "more than the cells"), ((1, 1, 1, 9), "more")])
def test_passes_that_do_not_fit_the_scales_are_refused(passes, why):
    with pytest.raises(ValueError, match=why):
        tiny("var", passes=passes)


def test_scales_before_those_named_take_one_pass_and_a_single_scale_has_all_the_guidance():
    assert var.plan((1, 2, 3, 4), (2,))[1] == [0, 1, 2, 3, 3] and var.plan((4,), (2,))[1] == [0, 0]
    codebook = tiny_tokenizer("multiscale", code_dim=4, scales=(4,))
    config = var.Config(width=32, depth=1, heads=2, classes=3, size=8, passes=(2,))
    model = awake(var.VAR(config, codebook))
    plain, guided = (model.draw_tokens(LABELS[:3], guidance) for guidance in (1.0, 8.0))
    assert not torch.equal(plain, guided)


def test_the_frames_are_the_image_so_far_after_each_pass():
    model = tiny("var")
    drawn = model.sample({"labels": LABELS}, seed=3, frames=True)
    tokens, frames = model.draw_tokens(LABELS, seed=3), drawn["frames"]
    assert len(frames) == 6 and torch.equal(frames[-1], drawn["images"])
    for frame, end in ((0, 1), (1, 5), (3, 14)):  # after these passes, whole scales are there
        assert torch.equal(frames[frame], model.tokenizer.decode(tokens[:, :end]))
    assert not torch.equal(frames[1], frames[2]) and not torch.equal(frames[2], frames[3])


def test_each_pass_doubles_what_is_known_and_spreads_it_evenly():
    passes = var.spread(8, 4).view(8, 8)
    assert passes.flatten().bincount().tolist() == [8, 8, 16, 32]
    chessboard = torch.arange(8)[:, None] % 2 != torch.arange(8) % 2
    assert torch.equal(passes == 3, chessboard)
    for last in (0, 1, 2):  # whatever is known, each 4x4 quarter has a fourth of it
        assert (passes <= last).view(2, 4, 2, 4).sum((1, 3)).unique().numel() == 1
    assert not var.spread(5, 1).any() and var.spread(3, 2).bincount().tolist() == [4, 5]


def test_a_cell_is_the_mean_of_its_area():
    square = torch.arange(16.0).view(1, 1, 4, 4)
    assert shrink(square, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert shrink(IMAGES, 16) is IMAGES


def test_the_multiscale_tokenizer_rises_to_the_grid_that_it_has():
    assert tiny_tokenizer("multiscale", grid=4, code_dim=4).quantizer.scales == (1, 2, 4)
    assert tiny_tokenizer("multiscale", grid=8, code_dim=4).quantizer.scales == (1, 2, 4, 8)
