"""The image chapters, each by itself: what it draws, in which order, and what it says of what it cannot do."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import awake, tiny, tiny_data, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogen.blocks.sampling import apply_guidance, draw, with_and_without
from nanogen.image import flow, maskgit, pixel_ar, token_ar, tokenizer
from nanogen.lab import judges

LABELS = torch.tensor([0, 1, 2, 3])  # the last one: no label


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- Drawing from logits


def shares(logits, **options):
    """How often each index is drawn, of 20,000 draws."""
    drawn = draw(logits.expand(20_000, -1), generator(), **options)
    return torch.bincount(drawn, minlength=len(logits)) / 20_000


LOGITS = torch.tensor([0.0, 2.0, -1.0, 1.0, 1.5])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
    assert torch.allclose(shares(LOGITS, temperature=temperature), (LOGITS / temperature).softmax(-1), atol=0.015)


def test_temperature_0_takes_the_most_likely():
    logits = torch.randn(6, 4, 9)
    assert torch.equal(draw(logits, generator(), temperature=0.0), logits.argmax(-1))
    with pytest.raises(ValueError, match="negative"):
        draw(logits, generator(), temperature=-1.0)


@pytest.mark.parametrize(("k", "kept"), [(1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (0, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_k_most_likely_in_proportion(k, kept):
    expected = torch.zeros(5)
    expected[kept] = LOGITS[kept].softmax(-1)
    assert torch.allclose(shares(LOGITS, top_k=k), expected, atol=0.015)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6, unique=True), st.floats(0.01, 0.99))
@settings(max_examples=25, deadline=None)
def test_top_p_keeps_the_smallest_set_that_has_probability_p(values, p):
    logits = torch.tensor(values, dtype=torch.float64)
    probability = logits.softmax(-1)
    order, kept, total = probability.argsort(descending=True).tolist(), set(), 0.0
    while total < p - 1e-9:
        kept.add(order[len(kept)])
        total = sum(probability[i].item() for i in kept)
    drawn = draw(logits.expand(500, -1), generator(), top_p=p)
    assert set(drawn.tolist()) <= kept
    likely = {i for i in kept if probability[i] > 0.05}  # seen in 500 draws for sure
    assert likely <= set(drawn.tolist())


@pytest.mark.parametrize("settings", [dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1), dict(temperature=-1.0)])
def test_settings_that_would_leave_no_word_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        draw(torch.zeros(2, 5), generator(), **settings)


def test_guidance_exaggerates_what_the_label_changes():
    assert with_and_without(LABELS, 7, 1.0).tolist() == [0, 1, 2, 3]
    assert with_and_without(LABELS, 7, 2.0).tolist() == [0, 1, 2, 3, 7, 7, 7, 7]
    cond, uncond = torch.randn(2, 4, 5)
    both = torch.cat([cond, uncond])
    assert torch.equal(apply_guidance(both, 0.0), uncond) and apply_guidance(cond, 1.0) is cond
    assert torch.allclose(apply_guidance(both, 3.0), cond + 2 * (cond - uncond), atol=1e-5)


# --- The tokenizer

KINDS = ("vq", "fsq", "kl", "none")
PICTURES = torch.linspace(-1, 1, 5 * 3 * 16 * 16).view(5, 3, 16, 16).sin()


@pytest.mark.parametrize(("widths", "grid"), [((16,), 8), ((16, 16), 4), ((16, 16, 32), 2)])
@pytest.mark.parametrize("bottleneck", KINDS)
def test_a_picture_becomes_a_grid_and_a_picture_again(bottleneck, widths, grid):
    model = tiny_tokenizer(bottleneck, widths=widths, size=16)
    tokens = model.encode(PICTURES)
    assert model.grid == grid
    if bottleneck in ("vq", "fsq"):
        assert tokens.shape == (5, grid * grid) and tokens.dtype == torch.int64
        assert 0 <= tokens.min() and tokens.max() < model.vocabulary == {"vq": 32, "fsq": 20}[bottleneck]
    else:
        assert tokens.shape == (5, 4, grid, grid) and model.vocabulary == 0
    decoded = model.decode(tokens)
    assert decoded.shape == PICTURES.shape and decoded.min() >= -1 and decoded.max() <= 1
    assert torch.equal(decoded, model.reconstruct(PICTURES))  # and once more gives the same
    assert len(decoded.flatten(1).unique(dim=0)) > 1


@pytest.mark.parametrize("bottleneck", KINDS)
def test_what_is_decoded_is_what_the_loss_saw(bottleneck):
    model = tiny_tokenizer(bottleneck, size=16)
    loss, numbers = model.loss({"images": PICTURES})
    error = model.decoder(model.bottleneck(model.encoder(PICTURES))[0]) - PICTURES
    assert numbers["squared_error"].item() == pytest.approx(error.square().mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx((5 * error.square().mean() + numbers["bottleneck"]).item(), rel=1e-4)
    clamped = (error + PICTURES).clamp(-1, 1)
    assert torch.allclose(model.reconstruct(PICTURES), clamped, atol=1e-5)


def test_kl_draws_in_training_only_and_pulls_towards_the_normal():
    model = tiny_tokenizer("kl", size=16)
    features = model.encoder(PICTURES)
    assert torch.equal(model.bottleneck(features)[0], model.bottleneck(features)[0])
    model.train()
    draws = torch.stack([model.bottleneck(features)[0] for _ in range(400)])
    mean, log_variance = features.chunk(2, dim=1)
    assert torch.allclose(draws.mean(0), mean, atol=0.4) and torch.allclose(draws.std(0).log() * 2, log_variance, atol=0.5)
    normal = torch.zeros_like(features)
    assert model.bottleneck(normal)[2] == 0 and model.bottleneck(normal + 1)[2] > 0 and model.bottleneck(normal - 1)[2] > 0


def test_the_perceptual_loss_is_zero_for_equal_pictures_and_its_gradient_stays_out_of_the_eye():
    eye = judges.Judge(judges.Config(widths=(16, 16, 16), size=16)).eval().requires_grad_(False)
    other = (PICTURES + 0.3 * torch.randn_like(PICTURES)).requires_grad_()
    assert tokenizer.perceptual_loss(eye, PICTURES, PICTURES).item() == pytest.approx(0, abs=1e-6)
    loss = tokenizer.perceptual_loss(eye, other, PICTURES)
    loss.backward()
    assert loss > 0.01 and other.grad.abs().sum() > 0


@pytest.mark.parametrize("bottleneck", ["vq", "fsq"])
def test_tokens_not_there_yet_are_painted_grey(bottleneck):
    model = tiny_tokenizer(bottleneck, grid=4)
    tokens = torch.randint(model.vocabulary, (2, 16))
    partial = tokens.clone()
    partial[0, 5], partial[1, :] = -1, -1
    shown = tokenizer.show_partial(model, partial)
    assert shown.shape == (2, 3, 8, 8) and not shown[1].any()
    assert not shown[0, :, 2:4, 2:4].any()  # cell 5 of 4x4 is in row 1, column 1
    grey = (shown[0] == 0).all(0)
    assert grey.sum() == 4 and torch.equal(tokenizer.show_partial(model, tokens), model.decode(tokens))


@pytest.mark.parametrize("fields", [dict(bottleneck="gan"), dict(bottleneck="fsq", levels=(1,))])
def test_a_bottleneck_that_is_none_is_refused(fields):
    with pytest.raises(ValueError, match="must be"):
        tokenizer.Tokenizer(tokenizer.Config(**fields))


# --- Token AR


@pytest.mark.parametrize("chapter", ["token_ar", "pixel_ar"])
def test_one_position_embedded_alone_equals_the_last_of_all(chapter):
    model = tiny(chapter)
    for past in range(16):
        units = torch.randint(32, (2, past) if chapter == "token_ar" else (2, past, 3))
        assert torch.allclose(model.embed(units, last=True), model.embed(units)[:, -1:], atol=1e-5)


def test_brightnesses_near_each_other_look_alike_and_outside_looks_like_none():
    look = pixel_ar.value_features(torch.arange(257))
    assert look.shape == (257, pixel_ar.FEATURES)
    distance = torch.cdist(look, look)
    assert (distance[100, [101, 104, 116]].diff() > 0).all()  # up to the finest wave, farther looks farther
    assert (distance[:256, :256] + 9 * torch.eye(256)).min() > 0.05 and distance[256, :256].min() > 1


def test_a_token_sees_its_four_neighbours_and_nothing_beyond_the_border():
    model = tiny("token_ar")
    tokens = torch.zeros(1, 15, dtype=torch.long)
    before = model.embed(tokens)[0]
    expected = {10: {9, 6, 7, 5}, 9: {8, 5, 6, 4}, 7: {6, 3, 2}, 5: {4, 1, 2, 0}}
    for position, neighbours in expected.items():
        seen = set()
        for place in range(15):
            other = tokens.clone()
            other[0, place] = 9
            if not torch.equal(model.embed(other)[0, position], before[position]):
                seen.add(place)
        assert seen == neighbours


@pytest.mark.parametrize(("chapter", "steps"), [("token_ar", 7), ("pixel_ar", 7), ("maskgit", 17), ("maskgit", -1), ("flow", -1)])
def test_numbers_of_steps_that_cannot_be_are_refused(chapter, steps):
    with pytest.raises(ValueError, match="steps must be"):
        tiny(chapter).sample(LABELS, steps=steps)


# --- MaskGIT


def test_the_first_steps_reveal_few():
    schedule = maskgit.reveal_schedule(64, 12)
    new = np.diff([0, *schedule])
    assert schedule[:3] == [1, 3, 5] and schedule[-1] == 64 and new[0] == 1 and new[-1] >= 8
    assert maskgit.reveal_schedule(64, 64) == list(range(1, 65)) and maskgit.reveal_schedule(64, 1) == [64]


@pytest.mark.parametrize("grid", [1, 2, 4, 5, 8])
def test_halton_order_is_a_permutation(grid):
    assert sorted(maskgit.halton_ranks(grid).tolist()) == list(range(grid**2))


def test_halton_order_covers_the_picture_evenly_from_the_beginning():
    cells = maskgit.halton_ranks(8).argsort()
    rows, columns = cells // 8, cells % 8
    for count in (8, 16, 32):  # every quarter of the picture has its share, to within one
        quarters = torch.bincount((rows // 4 * 2 + columns // 4)[:count], minlength=4)
        assert (quarters - count // 4).abs().max() <= 1
    blocks = (rows // 2 * 4 + columns // 2)[:16].unique()
    assert len(blocks) >= 14  # of 16 blocks of 2x2; 16 cells at random fall into 11
    assert (rows[:16, None] == rows[:16]).logical_and((columns[:16, None] - columns[:16]).abs() == 1).sum() == 0  # none side by side


def test_the_masked_share_follows_the_cosine(monkeypatch):
    model, masked = tiny("maskgit"), []
    monkeypatch.setattr(model, "logits", lambda tokens, labels: masked.append(tokens == model.mask) or torch.zeros(*tokens.shape, 32))
    tokens, labels = torch.randint(32, (4000, 16)), torch.zeros(4000, dtype=torch.long)
    loss, numbers = model.loss({"tokens": tokens, "labels": labels})
    masked = masked[0]
    share = masked.float().mean(1)
    assert loss.item() == pytest.approx(math.log(32), rel=1e-4) and numbers["masked"].item() == pytest.approx(share.mean().item())
    assert masked.any(1).all() and masked.all(1).any()
    assert share.mean().item() == pytest.approx(2 / math.pi + 0.5 / 16, abs=0.02)  # E cos(pi r / 2), rounded up to whole tokens
    quantiles = torch.tensor([0.25, 0.5, 0.75])
    expected = torch.cos(math.pi / 2 * (1 - quantiles)) + 0.5 / 16
    assert torch.allclose(share.quantile(quantiles), expected, atol=0.06)
    assert torch.allclose(masked.float().mean(0), share.mean(), atol=0.04)  # no place is favoured


def test_only_masked_tokens_count_in_the_loss(monkeypatch):
    model = tiny("maskgit", smoothing=0.0)
    tokens = tiny_data("maskgit")["tokens"]
    right = 20.0 * F.one_hot(tokens, 32)

    def knows_what_is_masked(inputs, labels):
        return torch.where((inputs == model.mask)[..., None], right, -right)

    monkeypatch.setattr(model, "logits", knows_what_is_masked)
    assert model.loss({"tokens": tokens, "labels": torch.zeros(len(tokens), dtype=torch.long)})[0] < 1e-4


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_a_replay_reveals_the_truth_and_nothing_else(order):
    truth = torch.randint(32, (4, 16))
    history = tiny("maskgit").reveal(LABELS, 6, 1.0, 1.0, seed=0, order=order, truth=truth)
    assert torch.equal(history[-1], truth)
    for tokens in history:
        assert torch.equal(tokens[tokens >= 0], truth[tokens >= 0])
    assert not (history[0] >= 0).all()


def test_the_surest_token_comes_first_and_chance_enters_by_gumbel(monkeypatch):
    model = tiny("maskgit", gumbel=0.0)
    odds = torch.zeros(4, 16, 32)
    odds[:, torch.arange(16), 3] = torch.arange(16) + 5.0  # place 15 is the surest
    monkeypatch.setattr(model, "logits", lambda tokens, labels, words: odds[: len(tokens)])
    history = model.reveal(LABELS, 16, 1.0, 0.0, seed=0, order="confidence")
    for step, tokens in enumerate(history, start=1):
        assert (tokens >= 0).nonzero()[:, 1].view(4, -1).tolist() == [list(range(16 - step, 16))] * 4
    model.config.gumbel = 50.0
    first = (model.reveal(LABELS, 16, 1.0, 0.0, seed=0, order="confidence")[0] >= 0).nonzero()[:, 1]
    assert first.tolist() != [15] * 4


def test_halton_reveals_in_its_order_and_an_unknown_order_is_refused():
    model = tiny("maskgit")
    history = model.reveal(LABELS, 16, 1.0, 1.0, seed=0, order="halton")
    ranks = maskgit.halton_ranks(4)
    for step, tokens in enumerate(history, start=1):
        assert torch.equal(tokens >= 0, (ranks < step).expand(4, 16))
    with pytest.raises(ValueError, match="confidence or halton"):
        model.sample(LABELS, steps=4, order="raster")


# --- Flow


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
@pytest.mark.parametrize("network", ["flow", "dit"])
def test_both_objectives_draw_with_both_networks(objective, network):
    model = tiny(network, objective=objective)
    methods = ("euler", "midpoint", "heun") if objective == "flow" else ("ddim", "ddpm")
    for method in methods:
        pictures, frames = model.sample(LABELS, steps=3, guidance=2.0, method=method, frames=True)
        assert pictures.shape == (4, 3, 8, 8) and len(frames) == 4 and pictures.isfinite().all()
    loss, numbers = model.loss({**tiny_data(network), **({"images": torch.randn(16, 3, 8, 8)} if network == "flow" else {})})
    assert loss.isfinite() and set(numbers) == {"loss_noise", "loss_middle", "loss_data"}


def test_a_network_that_knows_the_picture_draws_it(monkeypatch):
    model, picture = tiny("flow"), torch.rand(1, 3, 8, 8) * 2 - 1
    monkeypatch.setattr(model, "forward", lambda x, t, labels: (picture - x) / (1 - t)[:, None, None, None])
    for steps in (1, 5):
        assert torch.allclose(model.sample(LABELS, steps=steps), picture.expand(4, -1, -1, -1), atol=1e-5)


def test_latents_reach_the_network_with_mean_0_and_std_1(monkeypatch):
    model = tiny("dit")
    latents = torch.randn(400, 4, 4, 4) * torch.tensor([0.1, 1, 5, 20])[:, None, None] + torch.tensor([3.0, 0, -8, 1])[:, None, None]
    model.measure(latents)
    seen = []
    monkeypatch.setattr(model, "forward", lambda x, t, labels: seen.append(x) or torch.zeros_like(x))
    monkeypatch.setattr(flow, "logit_normal_times", lambda count, device: torch.ones(count))  # t = 1: the data themselves
    model.loss({"latents": latents, "labels": torch.zeros(400, dtype=torch.long)})
    assert seen[0].mean((0, 2, 3)).abs().max() < 1e-4 and torch.allclose(seen[0].std((0, 2, 3)), torch.ones(4), atol=1e-4)
    decoded = []
    monkeypatch.setattr(model.tokenizer[0], "decode", lambda z: decoded.append(z) or z)
    model.to_pictures(seen[0])
    assert torch.allclose(decoded[0], latents, atol=1e-3)  # and the way back
    other = tiny("dit")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.latent_std, model.latent_std)  # kept with the weights


@pytest.mark.parametrize("fields", [dict(network="mlp"), dict(objective="gan"), dict(times="never")])
def test_flow_refuses_what_it_does_not_know(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be one of"):
        flow.Flow(flow.Config(**fields))


def test_chapters_say_which_tokenizer_they_stand_on():
    assert flow.stands_on(flow.Config()) is None and flow.stands_on(flow.Config(network="dit")) == ("tokenizer", {"bottleneck": "kl"})
    assert maskgit.stands_on(maskgit.Config(bottleneck="fsq")) == token_ar.stands_on(token_ar.Config(bottleneck="fsq")) == ("tokenizer", {"bottleneck": "fsq"})


# --- Judges


def test_judges_give_features_maps_and_a_second_answer():
    model = judges.Judge(judges.Config(widths=(16, 32, 64), classes=3, second=4, size=16)).eval()
    images = torch.randn(5, 3, 16, 16)
    assert model.features(images).shape == (5, 64) and model(images).shape == (5, 3)
    assert [tuple(m.shape) for m in model.maps(images)] == [(5, 16 // 2, 16, 16), (5, 16, 8, 8), (5, 32, 4, 4), (5, 64, 2, 2)]
    batch = {"images": images, "labels": torch.tensor([0, 1, 2, 0, 1]), "second": torch.tensor([3, 2, 1, 0, 3])}
    loss, numbers = awake(model).loss(batch)
    loss.backward()
    assert model.second.weight.grad.abs().sum() > 0 and 0 <= numbers["accuracy"] <= 1
    wide = judges.Judge(judges.Config()).eval()
    assert wide.features(torch.zeros(1, 3, 32, 32)).shape == (1, 256)


def test_a_random_shift_moves_each_picture_by_at_most_so_many_pixels():
    images = torch.zeros(200, 3, 9, 9)
    images[:, :, 4, 4] = 1
    moved = judges.random_shift(images, 2)
    places = moved[:, 0].nonzero()
    assert moved.shape == images.shape and len(places) == 200 and (moved[:, 0] == moved[:, 2]).all()
    assert sorted(set(map(tuple, places[:, 1:].tolist()))) == [(row, column) for row in range(2, 7) for column in range(2, 7)]
    assert torch.equal(judges.random_shift(images, 0), images)
