"""The image methods, each by itself: what it draws, in which order, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import awake, tiny, tiny_data, tiny_tokenizer

from nanogen import judge
from nanogen.blocks import heads, sampling
from nanogen.blocks.neighbours import raster_neighbours
from nanogen.blocks.sampling import reveal_schedule
from nanogen.image import flow, mar, maskgit, pixel_ar, token_ar, var

LABELS = torch.tensor([0, 1, 2, 3])  # the last one: the null class


def images(method_or_model, labels=LABELS, **options):
    model = tiny(method_or_model) if isinstance(method_or_model, str) else method_or_model
    return model.sample({"labels": labels}, **options)["images"]


# --- Configs


@pytest.mark.parametrize("method", [pixel_ar, token_ar, maskgit, var, mar])
@pytest.mark.parametrize(("fields", "said"), [
    (dict(heads=5), "heads must be such that"), (dict(width=6, heads=2), "heads must"),
    (dict(heads=0), "heads must be at least 1"), (dict(depth=0), "depth must"),
    (dict(label_dropout=1.5), "label_dropout must"), (dict(size=0), "size must")])
def test_a_transformer_that_cannot_be_is_refused_by_name(method, fields, said):
    with pytest.raises(ValueError, match=said):
        method.Config(**fields)


@pytest.mark.parametrize(("method", "fields"), [
    (token_ar, dict(bottleneck="kl")), (token_ar, dict(dropout=1.0)),
    (maskgit, dict(bottleneck="kl")), (maskgit, dict(order="raster")),
    (maskgit, dict(smoothing=1.0)), (maskgit, dict(gumbel=-1.0))])
def test_a_field_of_one_method_that_cannot_be_is_refused_by_name(method, fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be"):
        method.Config(**fields)


# --- Token AR and pixel AR


def test_one_position_embedded_alone_equals_the_last_of_all():
    model, pixels = tiny("token_ar"), tiny("pixel_ar")
    for past in range(16):
        units = torch.randint(32, (2, past))
        alone, every = (model.embed(units, model.tables(), last=last) for last in (True, False))
        assert torch.allclose(alone, every[:, -1:], atol=1e-5)
        units = torch.randint(32, (2, past, 3))
        alone, every = pixels.embed(units, last=True), pixels.embed(units)
        assert torch.allclose(alone, every[:, -1:], atol=1e-5)


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_neighbours_are_the_previous_unit_and_the_three_above(grid):
    units = torch.arange(grid**2 - 1)[None]
    seen = raster_neighbours(units, grid, outside=99)[0]
    for position in range(grid**2):
        row, column = divmod(position, grid)
        above = [(row - 1, column), (row - 1, column + 1), (row - 1, column - 1)]
        wanted = [r * grid + c if r >= 0 and 0 <= c < grid else 99 for r, c in above]
        assert seen[position].tolist() == [position - 1 if position else 99, *wanted]
    colours = units[..., None] + torch.tensor([0, 10, 20])  # (1, P, 3)
    assert raster_neighbours(colours, grid, 99).shape == (1, grid**2, 4, 3)
    assert torch.equal(raster_neighbours(colours, grid, 99)[..., 0], seen[None])


def test_similar_brightnesses_have_similar_features_and_outside_is_like_none():
    look = pixel_ar.value_features(torch.arange(257))
    assert look.shape == (257, pixel_ar.FEATURES)
    distance = torch.cdist(look, look)
    assert (distance[100, [101, 104, 116]].diff() > 0).all()  # farther, up to the finest wave
    assert (distance[:256, :256] + 9 * torch.eye(256)).min() > 0.05
    assert distance[256, :256].min() > 1


def test_a_token_sees_its_four_neighbours_and_nothing_beyond_the_border():
    model = tiny("token_ar")
    tokens, tables = torch.zeros(1, 15, dtype=torch.long), model.tables()
    before = model.embed(tokens, tables)[0]
    expected = {10: {9, 6, 7, 5}, 9: {8, 5, 6, 4}, 7: {6, 3, 2}, 5: {4, 1, 2, 0}}
    others = torch.where(torch.eye(15, dtype=torch.bool), 9, tokens)  # image p: token p changed
    changed = (model.embed(others, tables) != before).any(-1)
    for position, neighbours in expected.items():
        assert set(changed[:, position].nonzero()[:, 0].tolist()) == neighbours


@pytest.mark.parametrize(("method", "steps"), [("maskgit", -1), ("maskgit", 0), ("flow", -1),
                                               ("flow", 0)])
def test_numbers_of_steps_that_cannot_be_are_refused(method, steps):
    with pytest.raises(ValueError, match="steps must be"):
        images(method, steps=steps)


# --- Train where you sample: of each time, or fraction of masked tokens, that a sampler asks for,
# training draws the neighbourhood often enough. 0.03: more than half of what a uniform draw gives
# at its ends. 0.08: a one-step sampler asks for nothing else. 0.001, for a flow, whose ends are
# easy: about 40 draws in 600 steps of 64 images. (VAR trains all of its passes on every image.)


def nearby(trained, wanted):
    """The fraction of `trained` (N,) within 0.05 of a wanted value, for the one that has least."""
    return ((trained - wanted.unique()[:, None]).abs() <= 0.05).float().mean(1).min()


def times_asked(monkeypatch, network, learn, draw):
    seen = []
    monkeypatch.setattr(network, "forward", lambda x, t, _: seen.append(t) or torch.zeros_like(x))
    learn(), draw()
    return seen[0], torch.cat(seen[1:])


@pytest.mark.parametrize(("fields", "settings", "least"), [
    ({}, {}, 0.001), ({}, dict(method="heun"), 0.001), (dict(objective="ddpm"), {}, 0.03),
    (dict(times="uniform"), dict(method="heun"), 0.03), (dict(objective="reflow"), {}, 0.03),
    (dict(objective="reflow"), dict(method="euler", steps=1), 0.08)])
def test_a_flow_trains_at_the_times_that_its_sampler_asks_for(fields, settings, least, monkeypatch):
    teacher = tiny("flow")
    model = flow.Flow(replace(teacher.config, **fields), teacher)
    zero, labels = torch.zeros(40_000, 3, 1, 1), torch.zeros(40_000, dtype=torch.long)
    batch = {"images": zero, "x1": zero, "noise": zero, "labels": labels}
    trained, wanted = times_asked(
        monkeypatch, model, lambda: model.loss(batch), lambda: images(model, **settings))
    assert nearby(trained, wanted) >= least and wanted.min() == 0
    assert (wanted.max() == 1) == (settings.get("method") == "heun")


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_a_head_trains_at_the_times_that_its_sampler_asks_for(kind, monkeypatch):
    head, x, z = heads.make_head(kind, 4, 8), torch.zeros(10_000, 4), torch.zeros(10_000, 8)
    trained, wanted = times_asked(
        monkeypatch, head.mlp, lambda: head.loss(x, z), lambda: head.sample(z))
    assert nearby(trained, wanted) >= 0.03 and wanted.min() == 0


@pytest.mark.parametrize("steps", [1, 12, 16])
@pytest.mark.parametrize(("method", "name"), [("maskgit", "logits"), ("mar", "hidden_states")])
def test_masks_are_as_large_as_those_of_the_sampler(method, name, steps, monkeypatch):
    model, seen = tiny(method), []

    def note(tokens, other, *_):
        masked = tokens == model.mask if method == "maskgit" else other
        seen.append(masked.float().mean(1))
        return torch.zeros(*masked.shape, 32)

    monkeypatch.setattr(model, name, note)
    labels = torch.zeros(4000, dtype=torch.long)
    model.loss({"tokens": labels[:, None].expand(-1, 16), "latents": torch.zeros(4000, 4, 4, 4),
                "labels": labels})
    images(model, steps=steps)
    assert nearby(seen[0], torch.cat(seen[1:])) >= 0.03 and (seen[1] == 1).all()


# --- MaskGIT


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_training_masks_as_many_tokens_and_in_the_order_that_the_sampler_asks_for(
        order, monkeypatch):
    model, masked = tiny("maskgit", order=order), []

    def uniform(tokens, labels):
        masked.append(tokens == model.mask)
        return torch.zeros(*tokens.shape, 32)

    monkeypatch.setattr(model, "logits", uniform)
    tokens, labels = torch.randint(32, (4000, 16)), torch.zeros(4000, dtype=torch.long)
    loss, metrics = model.loss({"tokens": tokens, "labels": labels})
    masked = masked[0]
    counts, halton = masked.sum(1, keepdim=True), sampling.halton_ranks(4)
    assert loss.item() == pytest.approx(math.log(32), rel=1e-4)
    assert metrics["masked"].item() == pytest.approx(masked.float().mean().item())
    quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])  # of the fraction
    expected = quantiles if order == "halton" else torch.cos(math.pi / 2 * (1 - quantiles))
    expected = (16 * expected).ceil().clamp(min=1)
    assert (counts.float().quantile(quantiles) - expected).abs().max() <= 1
    ordered = (masked == (halton >= 16 - counts)).all(1)[((counts > 2) & (counts < 14))[:, 0]]
    share = maskgit.HALTON if order == "halton" else 0
    assert ordered.float().mean().item() == pytest.approx(share, abs=0.03)
    often = masked[:, halton.argsort()].float().mean(0)
    assert (often.diff() > 0).all() if order == "halton" else often.std() < 0.02


def test_only_masked_tokens_count_in_the_loss(monkeypatch):
    model = tiny("maskgit", smoothing=0.0)
    tokens = tiny_data("maskgit")["tokens"]
    right = 20.0 * F.one_hot(tokens, 32)

    def knows_what_is_masked(inputs, labels):
        return torch.where((inputs == model.mask)[..., None], right, -right)

    monkeypatch.setattr(model, "logits", knows_what_is_masked)
    batch = {"tokens": tokens, "labels": torch.zeros(len(tokens), dtype=torch.long)}
    assert model.loss(batch)[0] < 1e-4


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
    odds[:, torch.arange(16), 3] = torch.arange(16) + 5.0  # position 15 is the surest
    monkeypatch.setattr(model, "logits", lambda tokens, labels, tables: odds[: len(tokens)])
    history = model.reveal(LABELS, 16, 1.0, 0.0, seed=0, order="confidence")
    for step, tokens in enumerate(history, start=1):
        known = (tokens >= 0).nonzero()[:, 1].view(4, -1).tolist()
        assert known == [list(range(16 - step, 16))] * 4
    model.config.gumbel = 50.0
    first = model.reveal(LABELS, 16, 1.0, 0.0, seed=0, order="confidence")[0]
    assert (first >= 0).nonzero()[:, 1].tolist() != [15] * 4


def test_halton_reveals_in_its_order_and_an_unknown_order_is_refused():
    model = tiny("maskgit")
    history = model.reveal(LABELS, 16, 1.0, 1.0, seed=0, order="halton")
    ranks = sampling.halton_ranks(4)
    for step, tokens in enumerate(history, start=1):
        assert torch.equal(tokens >= 0, (ranks < step).expand(4, 16))
    with pytest.raises(ValueError, match="confidence or halton"):
        images(model, steps=4, order="raster")


def test_a_small_grid_takes_as_many_passes_as_it_has_tokens():
    config = maskgit.Config(width=32, depth=1, heads=2, size=4)
    model = maskgit.MaskGIT(config, tiny_tokenizer(grid=2))
    assert len(model.reveal(LABELS, 12)) == 4 and len(tiny("maskgit").reveal(LABELS)) == 12


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_tokens_that_are_given_stay_and_the_schedule_counts_the_others(order):
    model, truth = tiny("maskgit"), torch.randint(32, (4, 16))
    given = torch.arange(16) < torch.tensor([[6], [6], [9], [16]])  # each image has its own
    known = torch.where(given, truth, -1)
    history = model.reveal(LABELS, 5, 2.0, order=order, known=known)
    counts = [(tokens >= 0).sum(1).tolist() for tokens in history]
    assert counts == [[n, n, max(n, 9), 16] for n in (6 + m for m in reveal_schedule(10, 5))]
    for tokens in history:
        assert torch.equal(tokens[given], truth[given])
    assert (history[-1] >= 0).all() and not torch.equal(history[-1], truth)
    drawn = images(model, known=truth, steps=3, order=order)  # nothing is left to draw
    assert torch.equal(drawn, model.tokenizer.decode(truth))


def test_token_ar_completes_what_is_given(monkeypatch):
    model, truth = tiny("token_ar"), torch.randint(32, (4, 16))
    monkeypatch.setattr(model.tokenizer, "decode", lambda tokens: tokens)
    for given in ((torch.arange(16) < 8).expand(4, 16), torch.rand(4, 16) < 0.5):
        known = torch.where(given, truth, -1)
        drawn, again = (images(model, known=known, guidance=2.0, cached=c) for c in (True, False))
        assert torch.equal(drawn, again) and torch.equal(drawn[given], truth[given])
        assert (drawn >= 0).all() and not torch.equal(drawn, truth)


KEEPERS = [("token_ar", {}), ("maskgit", {}), ("var", {}), ("mar", {}),
           ("mar", {"tokens": "codes"}),
           ("mar", {"tokens": "patches"}), ("flow", {})]


def keeper(method, fields):
    if fields.get("tokens") == "codes":
        config = mar.Config(width=32, depth=1, heads=2, size=8, head_width=32, **fields)
        return awake(mar.MAR(config, tiny_tokenizer(grid=4)))
    return tiny(method, **fields)


@pytest.mark.parametrize(("method", "fields"), KEEPERS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_part_of_an_image_that_is_known_stays(method, fields, guidance):
    model, pictures = keeper(method, fields), torch.rand(4, 3, 8, 8) * 2 - 1
    seen = torch.ones(8, 8, dtype=torch.bool)
    everything = model.known_part(pictures, seen)
    seen[2:5, 4:] = False  # also touches cells that are half known
    part = model.known_part(pictures, seen)
    other = model.known_part(torch.where(seen, pictures, 0.5), seen)
    assert torch.equal(part.nan_to_num(9), other.nan_to_num(9)), "the hole leaks into what is known"
    drawn, again = (images(model, known=part, guidance=guidance, temperature=2.0, seed=seed)
                    for seed in (0, 1))
    whole = images(model, known=everything)
    if method == "flow" or fields.get("tokens") == "patches":  # known pixels are kept as they are
        hidden = F.adaptive_max_pool2d((~seen).float()[None], model.grid if fields else 8)
        kept = F.interpolate(hidden[None], 8)[0, 0] == 0
        assert torch.allclose(whole, pictures, atol=1e-5)
        assert torch.allclose(drawn[..., kept], pictures[..., kept], atol=1e-5)
        assert (drawn[..., ~kept] - again[..., ~kept]).abs().mean() > 0.1
    else:  # known tokens are kept, and decoded
        assert torch.allclose(whole, model.tokenizer.reconstruct(pictures), atol=1e-5)
        assert not torch.equal(drawn, again)


@pytest.mark.parametrize("cached", [True, False])
def test_var_codes_what_its_own_coarse_scales_leave_missing_of_the_known_part(cached):
    model, pictures = tiny("var"), torch.rand(4, 3, 8, 8) * 2 - 1
    seen = torch.ones(8, 8, dtype=torch.bool)
    seen[:, 4:] = False
    known = model.known_part(pictures, seen)
    tokens = model.draw_tokens(LABELS, 2.0, cached=cached, known=known)
    quantizer, cells = model.tokenizer.quantizer, seen[::2, ::2].flatten()
    *_, before, _ = quantizer.sums(tokens)
    wanted = quantizer.code(known.nan_to_num() - before, 3)
    assert torch.equal(tokens[:, -16:][:, cells], wanted[:, cells])


# --- Flow


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
@pytest.mark.parametrize("network", ["flow", "dit"])
def test_both_objectives_draw_with_both_networks(objective, network):
    model = tiny(network, objective=objective)
    for method in ("euler", "midpoint", "heun") if objective == "flow" else ("ddim", "ddpm"):
        options = dict(steps=3, guidance=2.0, method=method, frames=True)
        drawn = model.sample({"labels": LABELS}, **options)
        assert drawn["images"].shape == (4, 3, 8, 8) and drawn["images"].isfinite().all()
        assert len(drawn["frames"]) == 4
    batch = tiny_data(network)
    batch |= {"images": torch.randn(16, 3, 8, 8)} if network == "flow" else {}
    loss, metrics = model.loss(batch)
    assert loss.isfinite() and set(metrics) == {"loss_noise", "loss_middle", "loss_data"}


def test_a_dit_starts_with_the_velocity_0():
    model = tiny("dit", asleep=True)
    assert not model(torch.randn(4, *model.shape), torch.rand(4), LABELS).any()


def test_a_network_that_knows_the_image_draws_it(monkeypatch):
    model, image = tiny("flow"), torch.rand(1, 3, 8, 8) * 2 - 1
    monkeypatch.setattr(
        model, "forward", lambda x, t, labels: (image - x) / (1 - t)[:, None, None, None])
    for steps in (1, 5):
        assert torch.allclose(images(model, steps=steps), image.expand(4, -1, -1, -1), atol=1e-5)


def test_latents_reach_the_network_with_mean_0_and_std_1(monkeypatch):
    model, seen, decoded = tiny("dit"), [], []
    std, mean = torch.tensor([[0.1, 1, 5, 20], [3.0, 0, -8, 1]])[..., None, None]
    latents = torch.randn(400, 4, 4, 4) * std + mean
    model.measure({"latents": latents})
    monkeypatch.setattr(
        model, "forward", lambda x, t, labels: seen.append(x) or torch.zeros_like(x))
    # t = 1: the data themselves
    monkeypatch.setitem(flow.TIMES, "logit-normal", lambda count, device: torch.ones(count))
    model.loss({"latents": latents, "labels": torch.zeros(400, dtype=torch.long)})
    assert seen[0].mean((0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(seen[0].std((0, 2, 3)), torch.ones(4), atol=1e-4)
    monkeypatch.setattr(model.tokenizer, "decode", lambda z: decoded.append(z) or z)
    model.to_images(seen[0])
    assert torch.allclose(decoded[0], latents, atol=1e-3)  # and the way back
    other = tiny("dit")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.latents.std, model.latents.std)  # saved with the weights


@pytest.mark.parametrize("field", ["network", "objective", "times"])
def test_flow_refuses_what_it_does_not_know(field):
    with pytest.raises(ValueError, match=f"{field} must be one of"):
        flow.Config(**{field: "gan"})


def test_methods_say_which_tokenizer_they_require():
    kl = {"bottleneck": "kl", "size": 32}
    assert flow.Flow.requires(flow.Config()) is None
    assert flow.Flow.requires(flow.Config(network="dit"))[:2] == ("tokenizer", kl)
    fsq = ("tokenizer", {"bottleneck": "fsq", "size": 16})
    for method in (token_ar, maskgit):
        assert method.Model.requires(method.Config(bottleneck="fsq", size=16))[:2] == fsq
    scales = {"bottleneck": "multiscale", "size": 32, "codebook_size": 64}
    assert var.VAR.requires(var.Config(codebook_size=64))[:2] == ("tokenizer", scales)
    assert pixel_ar.PixelAR.requires(pixel_ar.Config()) is None


# --- Judges


def test_judges_give_features_maps_and_logits_of_a_second_label():
    config = judge.Config((16, 32, 64), classes=3, second="background", second_classes=4, size=16)
    model, x = judge.Judge(config).eval(), torch.randn(5, 3, 16, 16)
    assert model.features(x).shape == (5, 64) and model(x).shape == (5, 3)
    shapes = [tuple(m.shape[1:]) for m in model.maps(x)]
    assert shapes == [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
    second = torch.tensor([3, 2, 1, 0, 3])
    batch = {"images": x, "labels": torch.tensor([0, 1, 2, 0, 1]), "background": second}
    loss, metrics = awake(model).loss(batch)
    loss.backward()
    assert model.second_head.weight.grad.abs().sum() > 0 and 0 <= metrics["accuracy"] <= 1
    wide = judge.Judge(judge.Config()).eval()
    assert wide.features(torch.zeros(1, 3, 32, 32)).shape == (1, 256)


def test_a_random_shift_moves_each_image_by_at_most_so_many_pixels():
    x = torch.zeros(200, 3, 9, 9)
    x[:, :, 4, 4] = 1
    moved = judge.random_shift(x, 2)
    dots = moved[:, 0].nonzero()
    assert moved.shape == x.shape and len(dots) == 200 and (moved[:, 0] == moved[:, 2]).all()
    every = {(row, column) for row in range(2, 7) for column in range(2, 7)}
    assert set(map(tuple, dots[:, 1:].tolist())) == every
    assert torch.equal(judge.random_shift(x, 0), x)
