"""VAR and its tokenizer: scales that add up, and a chain whose unit is a scale."""

import pytest
import torch
from conftest import tiny, tiny_tokenizer

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
def test_cached_scales_equal_the_masked_pass_over_all_of_them():
    model = tiny("var")
    tokens = torch.randint(32, (4, 30))
    whole, parts, cache = model.logits(tokens, LABELS), [], None
    condition = model.label(LABELS)
    cache = var.Cache(model.transformer, 4, 30)
    inputs = model.inputs(model.tokenizer[0].quantizer.sums(tokens[:, :14]), condition)
    start = 0
    for x in inputs:
        end = start + x.shape[1]
        h = model.transformer(x, model.angles[start:end], condition=condition, cache=cache)
        parts.append(h @ model.head().mT)
        start = end
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)


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
    """The sum that the sampler builds step by step equals the one that training builds from all tokens at once."""
    model = tiny("var")
    tokens, condition = model.draw_tokens(LABELS[:3], seed=2), model.label(LABELS[:3])
    quantizer, total, start = model.tokenizer[0].quantizer, 0, 0
    at_once = model.inputs(quantizer.sums(tokens[:, :14]), condition)
    for k, side in enumerate(model.scales[:-1]):
        part = tokens[:, start : start + side**2]
        total = total + quantizer.enlarge(quantizer.book.vectors[part], k)
        assert torch.equal(model.input(total, k + 1), at_once[k + 1])
        start += side**2


def test_a_finer_scale_never_changes_a_coarser_one_and_a_scale_is_drawn_in_one_go():
    model, tokens = tiny("var"), torch.randint(32, (4, 30))
    before = model.logits(tokens, LABELS)
    for k, (start, end) in enumerate([(0, 1), (1, 5), (5, 14), (14, 30)]):
        other = tokens.clone()
        other[:, start:end] = (tokens[:, start:end] + 7) % 32
        changed = (model.logits(other, LABELS) != before).any(-1).any(0)
        assert not changed[:end].any() and (k == 3 or changed[end:].all())


def test_the_frames_are_the_thumbnail_and_then_finer_pictures():
    model = tiny("var")
    pictures, frames = model.sample(LABELS, frames=True)
    assert len(frames) == 4 and torch.equal(frames[-1], pictures)
    assert not torch.equal(frames[0], frames[1])
    with pytest.raises(ValueError, match="one step per scale"):
        model.sample(LABELS, steps=7)


def test_a_cell_is_the_mean_of_its_area():
    assert shrink(torch.arange(16.0).view(1, 1, 4, 4), 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert shrink(PICTURES, 16) is PICTURES


def test_the_multiscale_tokenizer_rises_to_the_grid_that_it_has():
    assert tiny_tokenizer("multiscale", grid=4, code_dim=4).quantizer.scales == (1, 2, 4)
    assert tiny_tokenizer("multiscale", grid=8, code_dim=4).quantizer.scales == (1, 2, 4, 8)
