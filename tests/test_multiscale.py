"""VAR and its tokenizer: scales that add up, and a chain whose unit is a scale."""

import pytest
import torch
from conftest import awake, tiny, tiny_tokenizer

from nanogen.blocks.multiscale import PARTS, MultiScaleVQ, shrink
from nanogen.image import var

LABELS = torch.tensor([0, 1, 2, 3])  # the last one: no label
PICTURES = torch.linspace(-1, 1, 5 * 3 * 16 * 16).view(5, 3, 16, 16).sin()


def learned(steps: int = 60, **options) -> tuple[MultiScaleVQ, torch.Tensor]:
    """A quantizer that has seen smooth features (64, 8, 8, 6) for some steps, and such features."""
    torch.manual_seed(0)
    coarse = torch.randn(steps + 1, 64, 6, 3, 3)
    features = torch.nn.functional.interpolate(coarse.flatten(0, 1), 8, mode="bilinear") + 0.1 * torch.randn(64 * (steps + 1), 6, 8, 8)
    features = features.permute(0, 2, 3, 1).unflatten(0, (-1, 64))
    quantizer = MultiScaleVQ(6, 64, (1, 2, 3, 4, 6, 8), code_dim=6, decay=0.9, **options).train()
    for batch in features[:-1]:
        quantizer(batch)
    return quantizer, features[-1]


def error_by_scale(quantizer: MultiScaleVQ, features: torch.Tensor) -> list[float]:
    z = torch.nn.functional.normalize(quantizer.project_in(features), dim=-1) * 6**0.5
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
    """The residuals of fine scales are small: without whitening, codes made for large ones would all look alike to them."""
    quantizer, features = learned()
    assert quantizer.std[-1].mean() < 0.8 * quantizer.std[1].mean()
    quantizer.decay = 0.0  # measure this batch alone
    before = quantizer.std.clone()
    quantizer(features)
    assert ((quantizer.std / before).mean(1) - 1).abs().max() < 0.3


def test_the_gradient_of_the_decoder_reaches_the_features_once_if_codes_are_detached():
    for without, once in (("nothing", True), ("detaching", False)):
        quantizer, features = learned(without=without)
        quantizer.eval()
        z = quantizer.project_in(features).detach().requires_grad_()
        arrived = torch.autograd.grad(quantizer.quantize(z)[0].pow(2).sum(), z)[0]
        codes = quantizer.quantize(z)[0].detach()
        expected = torch.autograd.grad((torch.nn.functional.normalize(z, dim=-1) * 6**0.5 * 2 * codes).sum(), z)[0]
        assert torch.allclose(arrived, expected, atol=1e-4) == once


@pytest.mark.parametrize("without", PARTS)
def test_each_part_can_be_taken_away(without):
    quantizer, features = learned(steps=3, without=without)
    codes, _, loss = quantizer(features.requires_grad_())
    (codes.sum() + loss).backward()
    assert codes.shape == features.shape and torch.isfinite(loss) and features.grad.abs().sum() > 0
    assert (quantizer.phi is None) == (without == "phi")


@pytest.mark.parametrize(("scales", "without"), [((2, 1), "nothing"), ((), "nothing"), ((1, 2), "sleep")])
def test_scales_that_do_not_rise_and_unknown_parts_are_refused(scales, without):
    with pytest.raises(ValueError, match="must"):
        MultiScaleVQ(6, 8, scales, without=without)


# --- The chain of scales


@torch.no_grad()
def test_cached_steps_equal_the_masked_pass_over_all_of_them():
    model = tiny("var")
    tokens, condition = torch.randint(32, (4, 30)), model.label(LABELS)
    whole, cache = model.logits(tokens, LABELS), var.Cache(model.transformer, 4, 30)
    for step, cells in enumerate(model.order.split(model.counts)):
        h = model.transformer(model.input(tokens, step), model.angles[cells], condition=condition, cache=cache)
        assert torch.allclose(h @ model.head().mT, whole[:, cells], atol=1e-4)


def test_sampling_with_the_cache_draws_the_same_tokens():
    model = tiny("var")
    for guidance in (1.0, 3.0):
        first, second = (model.draw_tokens(LABELS[:3], guidance, seed=4, cached=cached) for cached in (True, False))
        assert torch.equal(first, second)


def test_coarse_scales_that_are_given_are_kept_and_what_follows_depends_on_them():
    model = tiny("var")
    first = model.draw_tokens(LABELS[:3], seed=2)
    for end in (0, 1, 5, 14, 30):
        again = model.draw_tokens(LABELS[:3], guidance=2.0, seed=3, prefix=first[:, :end])
        assert torch.equal(again[:, :end], first[:, :end]) and torch.equal(again, first) == (end == 30)
    given = model.draw_tokens(LABELS[:3], seed=3, prefix=first[:, :14], temperature=0)
    other = model.draw_tokens(LABELS[:3], seed=3, prefix=(first[:, :14] + 7) % 32, temperature=0)
    assert not torch.equal(given[:, 14:], other[:, 14:])
    assert torch.equal(given, model.draw_tokens(LABELS[:3], prefix=first[:, :14], temperature=0, cached=False))


def test_what_training_feeds_in_is_what_sampling_feeds_in():
    """Drawn one step after another, the likeliest tokens are those that one pass over all of them finds likeliest."""
    model = tiny("var")
    tokens = model.draw_tokens(LABELS[:3], temperature=0)
    assert torch.equal(model.logits(tokens, LABELS[:3]).argmax(-1), tokens)


@torch.no_grad()
def test_a_step_starts_from_the_sum_of_the_scales_before_and_of_its_own_scales_cells_so_far():
    """By hand: the third of four scales in two steps. What is still to come in it counts as the mean of its residual."""
    model = tiny("var", passes=(1, 1, 2, 1))
    quantizer, tokens = model.tokenizer[0].quantizer, torch.randint(32, (4, 30))
    quantizer.mean.normal_()
    codes = quantizer.book.vectors[tokens[:, 5:14]]
    first = var.doubling(3, 2) == 0
    total = quantizer.sums(tokens[:, :5])[-1] + quantizer.enlarge(codes * first[:, None], 2)
    x = model.embed(shrink(total, 3)).flatten(2).transpose(1, 2)
    assert torch.allclose(model.input(tokens, 3), x[:, ~first] + model.step.weight[3], atol=1e-5)


@torch.no_grad()
def test_guidance_leads_away_from_a_guess_without_the_label_and_the_passes_of_its_own_scale(monkeypatch):
    """By hand: the last step of two for the last scale, drawn as if the one before it did not exist."""
    model, null = tiny("var", passes=(2,)), torch.full_like(LABELS, 3)
    assert torch.equal(tiny("var", passes=(1,)).alone, tiny("var", passes=(1,)).mask)  # one step a scale: the label alone
    seen_by_draw = []
    monkeypatch.setattr(var, "draw", lambda logits, *_: seen_by_draw.append(logits) or logits.argmax(-1))
    tokens = model.draw_tokens(LABELS, guidance=4.0)
    *coarse, _, cells = model.order.split(model.counts)
    other = tokens.clone()
    other[:, 14:] = (tokens[:, 14:] + 7) % 32  # all of the last scale
    guess = model.input(other, 4, alone=True)
    assert torch.equal(guess, model.input(tokens, 4, alone=True)) and not torch.equal(model.input(other, 4), model.input(tokens, 4))
    x = torch.cat([*(model.input(tokens, step) for step in range(3)), guess], dim=1)
    seen = torch.cat([*coarse, cells])
    step = torch.repeat_interleave(torch.tensor([1, 4, 9, len(cells)]))
    h = model.transformer(x, model.angles[seen], mask=step[:, None] >= step, condition=model.label(null))
    weak, strong = h[:, -len(cells) :] @ model.head().mT, model.logits(tokens, LABELS)[:, cells]
    assert torch.allclose(seen_by_draw[-1], weak + 4 * (strong - weak), atol=1e-4) and not torch.allclose(strong, weak, atol=1e-2)


@pytest.mark.parametrize("passes", [(1, 1, 1, 1), (1, 1, 2, 2), (1, 1, 1, 4)])
def test_a_step_never_changes_an_earlier_one_and_its_tokens_are_drawn_in_one_go(passes):
    model, tokens = tiny("var", passes=passes), torch.randint(32, (4, 30))
    before = model.logits(tokens, LABELS)
    for step in range(sum(passes)):
        mine, later = model.steps == step, model.steps > step
        changed = (model.logits(torch.where(mine, (tokens + 7) % 32, tokens), LABELS) != before).any(-1).any(0)
        assert mine.any() and not changed[~later].any() and (step == sum(passes) - 1 or changed[later].float().mean() > 0.8)


@pytest.mark.parametrize(("passes", "why"), [((1, 1, 1, 1, 1), "must be 1 to 4 numbers"), ((), "must be"), ((1, 0, 1, 1), "from 1 on"), ((2, 1, 1, 1), "more than the cells"), ((1, 1, 1, 9), "more")])
def test_passes_that_do_not_fit_the_scales_are_refused(passes, why):
    with pytest.raises(ValueError, match=why):
        tiny("var", passes=passes)


def test_scales_before_those_named_take_one_pass_and_a_single_scale_has_all_the_guidance():
    assert var.plan((1, 2, 3, 4), (2,))[1] == [0, 1, 2, 3, 3] and var.plan((4,), (2,))[1] == [0, 0]
    book = tiny_tokenizer("multiscale", code_dim=4, scales=(4,))
    model = awake(var.VAR(var.Config(width=32, depth=1, heads=2, classes=3, size=8, passes=(2,)), book))
    assert not torch.equal(model.draw_tokens(LABELS[:3], 1.0), model.draw_tokens(LABELS[:3], 8.0))


def test_the_frames_are_the_picture_so_far_after_each_pass():
    model = tiny("var")
    pictures, frames = model.sample(LABELS, seed=3, frames=True)
    tokens = model.draw_tokens(LABELS, seed=3)
    assert len(frames) == 6 and torch.equal(frames[-1], pictures)
    for frame, end in ((0, 1), (1, 5), (3, 14)):  # after these passes, whole scales are there
        assert torch.equal(frames[frame], model.tokenizer[0].decode(tokens[:, :end]))
    assert not torch.equal(frames[1], frames[2]) and not torch.equal(frames[2], frames[3])
    with pytest.raises(ValueError, match="steps must be 6, got 7"):
        model.sample(LABELS, steps=7)


def test_each_pass_doubles_what_is_known_and_spreads_it_evenly():
    passes = var.doubling(8, 4).view(8, 8)
    assert passes.flatten().bincount().tolist() == [8, 8, 16, 32]
    assert torch.equal(passes == 3, torch.arange(8)[:, None] % 2 != torch.arange(8) % 2)  # a chessboard
    for last in (0, 1, 2):  # whatever is known, each 4x4 quarter has a fourth of it
        assert (passes <= last).view(2, 4, 2, 4).sum((1, 3)).unique().numel() == 1
    assert not var.doubling(5, 1).any() and var.doubling(3, 2).bincount().tolist() == [4, 5]


def test_a_cell_is_the_mean_of_its_area():
    assert shrink(torch.arange(16.0).view(1, 1, 4, 4), 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert shrink(PICTURES, 16) is PICTURES


def test_the_multiscale_tokenizer_rises_to_the_grid_that_it_has():
    assert tiny_tokenizer("multiscale", grid=4, code_dim=4).quantizer.scales == (1, 2, 4)
    assert tiny_tokenizer("multiscale", grid=8, code_dim=4).quantizer.scales == (1, 2, 4, 8)
