"""The Transformer and the U-Net: which token sees which, positions, the identity at the start."""

import pytest
import torch
import torch.nn.functional as F
from conftest import awake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanogen.blocks import transformer
from nanogen.blocks.transformer import (
    Cache,
    CodeEmbedding,
    ConditionEmbedding,
    TimeEmbedding,
    Transformer,
    attention,
    drop_labels,
    grid_positions,
    norm,
    rotary_angles,
    rotate,
)
from nanogen.blocks.unet import ResidualBlock, UNet, check_fit

WIDTH, HEADS, TOKENS = 32, 2, 12
ANGLES = rotary_angles(torch.arange(TOKENS)[:, None], WIDTH // HEADS)
CONDITION = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)


def network(**options) -> Transformer:
    model = awake(Transformer(WIDTH, 2, HEADS, **options))
    for block in model.blocks:
        nn.init.uniform_(block.scale, 0.5, 4.0)
    return model


def rotation_of(angles):
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def some_tokens(tokens=TOKENS):
    return torch.randn(3, tokens, WIDTH)


# --- Attention


def test_causal_equals_the_mask_of_the_lower_triangle():
    model, x = network(), some_tokens()
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    causal = model(x, ANGLES, causal=True, condition=CONDITION)
    masked = model(x, ANGLES, mask=mask, condition=CONDITION)
    assert torch.allclose(causal, masked, atol=1e-5)
    assert not torch.allclose(causal, model(x, ANGLES, condition=CONDITION), atol=1e-2)


@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
def test_the_plain_products_for_short_chains_equal_the_fused_kernel(kind):
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, 16).bfloat16()  # float32 takes the kernel
    mask = None
    if kind == "mask":
        mask = (torch.rand(2, 1, TOKENS, TOKENS) < 0.5) | torch.eye(TOKENS, dtype=torch.bool)
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == "causal")
    assert torch.allclose(attention(q, k, v, mask, kind == "causal"), fused, atol=0.03)


def test_long_chains_take_the_fused_kernel(monkeypatch):
    q, k, v = torch.randn(3, 1, 1, 300, 8)
    plain = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
    name, calls, fused = "scaled_dot_product_attention", [], F.scaled_dot_product_attention
    monkeypatch.setattr(transformer.F, name, lambda *a, **o: calls.append(1) or fused(*a, **o))
    assert torch.allclose(attention(q, k, v), plain, atol=1e-5) and len(calls) == 1


def test_the_learned_scale_multiplies_the_logits_of_its_head(monkeypatch):
    block, x, heads = Transformer(WIDTH, 1, HEADS).blocks[0], some_tokens(), []
    monkeypatch.setattr(transformer, "attention", lambda *qkv: heads.append(qkv) or qkv[2])
    for scale in ([1.0, 1.0], [1.0, 5.0]):
        nn.init.ones_(block.scale).data *= torch.tensor(scale)
        block.attend(x, rotation_of(ANGLES), None, False, None, 0)
    before, after = ((q @ k.mT).abs() for q, k, *_ in heads)  # (B, heads, T, T) each
    assert before.amax() < 16.001  # times head^-0.5: no logit above sqrt(head)
    assert torch.allclose(after, before * torch.tensor([1.0, 5.0])[:, None, None], atol=1e-4)


def test_the_first_token_of_a_chain_is_on_its_own():
    model, x = network(), some_tokens()
    alone = model(x[:, :1], ANGLES[:1], causal=True, condition=CONDITION)
    whole = model(x, ANGLES, causal=True, condition=CONDITION)
    assert torch.allclose(whole[:, :1], alone, atol=1e-5)


def test_without_positions_and_mask_the_order_of_tokens_does_not_matter():
    model, x = network(), some_tokens()
    order = torch.randperm(TOKENS)
    still = torch.zeros_like(ANGLES)
    for angles, equal, tolerance in ((still, True, 1e-5), (ANGLES, False, 1e-2)):
        shuffled = model(x[:, order], angles, condition=CONDITION)
        in_order = model(x, angles, condition=CONDITION)[:, order]
        assert torch.allclose(in_order, shuffled, atol=tolerance) == equal


# --- Positions


@given(st.integers(1, 3), st.integers(-40, 40), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_scores_depend_on_differences_of_positions_only(axes, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 30, (6, axes), generator=generator)
    q, k = torch.randn(2, 1, 1, 6, 24, generator=generator)

    def scores(positions):
        rotation = rotation_of(rotary_angles(positions, 24))
        return rotate(q, rotation) @ rotate(k, rotation).transpose(-1, -2)

    assert torch.allclose(scores(positions), scores(positions + shift), atol=1e-3)
    stretched = scores(3 * positions + torch.arange(6)[:, None])
    assert not torch.allclose(scores(positions), stretched, atol=1e-2)


def test_rotation_keeps_lengths_and_position_zero_stays():
    x = torch.randn(1, 1, TOKENS, 16)
    turned = rotate(x, rotation_of(ANGLES))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert not torch.allclose(turned[:, :, 1:], x[:, :, 1:], atol=1e-2)


def test_angles_fill_half_a_head_and_axes_share_it_evenly():
    angles = rotary_angles(torch.tensor([[1, 0], [0, 1]]), 28)  # 14 pairs, 7 an axis
    assert angles.shape == (2, 14) and (angles[0, :7] > 0).all() and (angles[0, 7:] == 0).all()
    assert torch.equal(angles[0, :7], angles[1, 7:])
    angles = rotary_angles(torch.ones(1, 3), 16)  # 8 pairs, 2 an axis; the 2 left over do not turn
    assert angles.shape == (1, 8) and angles[0, 6:].tolist() == [0, 0]


def test_a_raster_runs_along_its_last_axis():
    assert grid_positions(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert grid_positions(3).tolist() == [[0], [1], [2]]
    assert grid_positions(2, 2, 2).shape == (8, 3)


# --- The cache


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 6], [12], [1, 3, 8]])
def test_any_number_of_tokens_at_once_can_be_added_to_the_cache(chunks):
    model, x = network(), some_tokens()
    group = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(chunks))
    mask = group[:, None] >= group  # the past, and each other
    whole = model(x, ANGLES, mask=mask, condition=CONDITION)
    cache, parts, start = Cache(model, 3, TOKENS), [], 0
    for count in chunks:
        new = slice(start, start := start + count)
        parts.append(model(x[:, new], ANGLES[new], condition=CONDITION, cache=cache))
        assert start == cache.length
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def test_modulation_may_be_computed_once():
    model, x = network(), some_tokens()
    once = model(x, ANGLES, modulation=model.modulate(CONDITION))
    assert torch.equal(once, model(x, ANGLES, condition=CONDITION))
    of_each_token = CONDITION[:, None].expand(3, TOKENS, WIDTH)
    each = model(x, ANGLES, condition=of_each_token)
    assert torch.allclose(once, each, atol=1e-5)


# --- The start of training


def test_at_the_start_every_block_is_the_identity():
    x = some_tokens()
    assert torch.equal(Transformer(WIDTH, 4, HEADS)(x, ANGLES, condition=CONDITION), norm(x))
    assert not torch.allclose(network()(x, ANGLES, condition=CONDITION), norm(x), atol=1e-2)


def test_gradients_reach_every_weight_once_the_gates_are_open():
    model = network().train()
    y = model(some_tokens(), ANGLES, condition=CONDITION)
    y.square().mul(torch.rand(WIDTH)).mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_dropout_is_for_training_only():
    model, x = network(dropout=0.5), some_tokens()
    for training in (False, True):
        model.train(training)
        first, second = (model(x, ANGLES, condition=CONDITION) for _ in range(2))
        assert torch.equal(first, second) != training


def test_the_norm_gives_every_vector_a_mean_square_of_one():
    assert torch.allclose(norm(7 * torch.randn(5, 64)).square().mean(-1), torch.ones(5), atol=1e-4)
    assert norm(torch.zeros(2, 8)).isfinite().all()


# --- Conditions


def test_times_and_labels_are_told_apart():
    embedding = ConditionEmbedding(3, WIDTH, time=True)
    labels, times = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0.5, 0.5, 0.5, 0.5, 0.51])
    vectors = embedding(labels, times)
    assert vectors.shape == (5, WIDTH) and torch.pdist(vectors).min() > 1e-2
    assert TimeEmbedding(WIDTH)(torch.rand(4)).shape == (4, WIDTH)


def test_a_tenth_of_the_labels_is_hidden():
    labels = torch.randint(10, (10_000,))
    dropped = drop_labels(labels, 10)
    assert 0.08 < (dropped == 10).float().mean() < 0.12
    assert torch.equal(dropped[dropped < 10], labels[dropped < 10])
    assert torch.equal(drop_labels(labels, 10, 0.0), labels)
    assert (drop_labels(labels, 10, 1.0) == 10).all()


# --- The U-Net


@pytest.mark.parametrize("widths", [(32,), (16, 32), (32, 32, 64)])
def test_the_unet_keeps_the_shape_and_starts_at_zero(widths):
    model = UNet(3, widths, blocks=1, attention_at=1, condition=8)
    x, c = torch.randn(2, 3, 16, 16), torch.randn(2, 8)
    assert model(x, c).shape == x.shape and not model(x, c).any()
    assert not torch.allclose(awake(model)(x, c), model(x, c.flip(0)))  # the condition counts
    changed = x.clone()
    changed[0, :, 0, 0] += 1
    assert (model(changed, c) - model(x, c))[0, :, -1, -1].any()  # everything sees everything
    assert torch.allclose(model(changed, c)[1], model(x, c)[1], atol=1e-6)  # but no image another


def test_a_residual_block_starts_as_its_shortcut():
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(ResidualBlock(16, 16)(x), x)
    block = ResidualBlock(16, 32, condition=8)
    assert torch.equal(block(x, torch.randn(2, 8)), block.shortcut(x))


@pytest.mark.parametrize(
    ("size", "widths", "why"),
    [(36, (16, 16, 16), "size must be a multiple of 8"), (32, (24,), "of 16"), (32, (), "of 16")])
def test_images_and_widths_that_do_not_fit_are_refused(size, widths, why):
    check_fit(32, (16, 32, 64))
    with pytest.raises(ValueError, match=why):
        check_fit(size, widths)


# --- Embeddings of codes


def test_what_is_learned_about_a_code_is_learned_about_similar_ones_too():
    embedding = CodeEmbedding(torch.linspace(-1, 1, 64)[:, None], 32, zero=True)
    assert not embedding().any()  # an output layer starts with a uniform guess
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.01)
    embedding()[10].sum().neg().backward()  # raise code 10, and only it
    optimizer.step()
    rise = embedding().sum(1)
    assert rise[10] > rise[11] > rise[30] and rise[9] > rise[60]


def test_extra_vectors_need_no_code_and_no_two_are_alike():
    vectors = CodeEmbedding(torch.randn(20, 3), 16, extra=2)()
    assert vectors.shape == (22, 16)
    assert (torch.cdist(vectors, vectors) + 9 * torch.eye(22)).min() > 0.1
