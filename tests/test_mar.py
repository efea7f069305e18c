"""MAR: who sees whom in a grid with gaps and in a chain of vectors, and that nothing is lost on the way to pictures."""

import pytest
import torch
import torch.nn.functional as F
from conftest import awake, briefly, tiny_tokenizer

from nanogen.blocks.heads import HEADS
from nanogen.blocks.sampling import halton_ranks, reveal_schedule
from nanogen.image import mar
from nanogen.lab.train import train

LABELS = torch.tensor([0, 1, 2, 3])  # the last one: no label
KINDS = [("flow", "latents"), ("diffusion", "patches"), ("mse", "latents"), ("categorical", "codes"), ("flow", "codes")]


def tiny_mar(asleep=False, **fields):
    """A grid of 4x4 tokens, 3 classes."""
    fields = dict(width=32, depth=2, heads=2, head_width=16, head_depth=1, classes=3, tokens="latents") | fields
    size = 16 if fields["tokens"] == "patches" else 8
    tokenizer = tiny_tokenizer(mar.TOKENS[fields["tokens"]]) if size == 8 else None
    torch.manual_seed(1)
    model = mar.MAR(mar.Config(**fields, size=size), tokenizer)
    return model if asleep else awake(model, 0.2)


def tiny_batch(model, count=4):
    """Random data as `prepare` gives them."""
    data = {"latents": torch.randn(count, 4, 4, 4), "codes": torch.randint(32, (count, 16)),
            "patches": torch.rand(count, 3, 16, 16) * 2 - 1}[model.config.tokens]
    name = {"latents": "latents", "codes": "tokens", "patches": "images"}[model.config.tokens]
    return {name: data, "labels": torch.arange(count) % 3}


# --- The chain


@pytest.mark.parametrize("place", [0, 3, 4, 9, 15])
def test_the_future_never_changes_the_past_and_the_past_is_known_to_all(place):
    model, tokens = tiny_mar(order="raster"), torch.randn(4, 16, 4)
    other = tokens.clone()
    other[:, place] += 1
    changed = (model.directions(tokens, LABELS) - model.directions(other, LABELS)).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [later > place for later in range(16)]


def test_a_place_of_the_chain_hears_directly_of_the_one_before_and_the_three_above():
    model, tokens = tiny_mar(order="raster"), torch.zeros(1, 16, 4)
    before = model.embed(tokens)[0]
    for position, neighbours in {10: {9, 5, 6, 7}, 7: {6, 2, 3}, 8: {7, 4, 5}, 0: set()}.items():
        others = tokens + torch.eye(16)[:, :, None]  # picture p has its token p changed
        change = (model.embed(others)[:, position] - before[position]).abs().amax(-1)
        assert set((change > 1e-4).nonzero()[:, 0].tolist()) == neighbours


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cached_sampling_equals_uncached(guidance):
    model = tiny_mar(order="raster")
    tokens, plain = (model.reveal(LABELS, guidance=guidance, seed=5, head_steps=3, cached=cached)[-1] for cached in (True, False))
    assert torch.allclose(tokens, plain, atol=1e-3)


# --- The grid with gaps


@pytest.mark.parametrize("order", ["random", "halton", "raster"])
def test_committed_tokens_never_change_and_the_schedule_is_kept(order):
    model = tiny_mar(order="raster" if order == "raster" else "random")
    steps = 16 if order == "raster" else 5
    history = model.reveal(LABELS, steps, 3.0, seed=3, order=order, head_steps=2)
    known = [~tokens.isnan().any(-1) for tokens in history]
    assert [k.sum(1).tolist() for k in known] == [[n] * 4 for n in reveal_schedule(16, steps)]
    for before, after, there in zip(history[:-1], history[1:], known[:-1], strict=True):
        assert torch.equal(after[there], before[there])
    if order == "halton":
        assert torch.equal(known[1], (halton_ranks(4) < known[1][0].sum()).expand(4, -1))
    if order == "random":
        assert len(known[2].unique(dim=0)) > 1  # every picture has an order of its own


def test_a_gap_is_filled_from_all_sides_and_what_is_masked_is_seen_by_none():
    model, tokens = tiny_mar(), torch.randn(1, 16, 4)
    tokens[:, 5] = float("nan")
    z = model.directions(tokens, LABELS[:1])
    assert z.isfinite().all()
    for place in (0, 6, 15):
        other = tokens.clone()
        other[:, place] += 1
        assert (model.directions(other, LABELS[:1]) - z)[:, 5].abs().max() > 1e-6


def test_only_masked_tokens_count_in_the_loss_and_the_network_does_not_see_them(monkeypatch):
    model, asked, seen = tiny_mar(), [], []
    batch = tiny_batch(model, 5)
    monkeypatch.setattr(model.head, "loss", lambda x, z: asked.append((x, z)) or x.sum())
    directions = model.directions
    monkeypatch.setattr(model, "directions", lambda tokens, labels: seen.append(tokens) or directions(tokens, labels))
    model.loss(batch)
    masked, truth = seen[0].isnan().any(-1), model.to_tokens(batch)
    wanted, got = truth[masked], asked[0][0]
    assert torch.equal(wanted.sort(0).values, got.sort(0).values)  # the same tokens, in any order
    assert torch.equal(seen[0][~masked], truth[~masked])
    assert asked[0][1].shape == (len(wanted), 32)


def test_masks_hide_each_number_of_places_alike_and_every_batch_the_same_number():
    model = tiny_mar(ordered=0.0)
    masks, count = model.draw_masks(4001)
    hidden = masks.sum(1)
    assert hidden.sum() == count == 2000 * 17 + 8 and hidden.min() == 1 and hidden.max() == 16
    assert (torch.bincount(hidden)[1:] / 4001 - 1 / 16).abs().max() < 0.02
    assert torch.allclose(masks.float().mean(0), torch.tensor(17 / 32), atol=0.04)  # no place is favoured
    assert model.draw_masks(1)[0].sum() == model.draw_masks(1)[1] == 8


def test_ordered_masks_leave_the_beginning_of_the_halton_order():
    model = tiny_mar(ordered=1.0)
    masks, _ = model.draw_masks(50)
    for mask in masks:
        assert torch.equal(mask, halton_ranks(4) >= 16 - mask.sum())
    model.config.ordered = 0.5
    masks, _ = model.draw_masks(1000)
    ordered = (masks == (halton_ranks(4) >= 16 - masks.sum(1, keepdim=True))).all(1)
    assert 0.45 < ordered.float().mean() < 0.7  # a random mask that hides 16 or 15 may look ordered


# --- Guidance


def test_guidance_grows_with_the_share_revealed_and_1_costs_one_pass(monkeypatch):
    model, strengths, rows = tiny_mar(), [], []
    sample = model.head.sample

    def note(z, steps, temperature, generator, z_uncond, guidance):
        strengths.append(guidance)
        return sample(z, steps, temperature, generator, z_uncond, guidance)

    monkeypatch.setattr(model.head, "sample", note)
    model.transformer.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    plain = model.sample(LABELS[:3], 4, head_steps=2)
    assert set(strengths) == {1} and set(rows) == {3}
    assert not torch.equal(plain, model.sample(LABELS[1:], 4, head_steps=2))  # the label matters
    strengths.clear(), rows.clear()
    model.sample(LABELS[:3], 4, 5.0, head_steps=2)
    assert strengths == [1 + 4 * known / 16 for known in reveal_schedule(16, 4)] and set(rows) == {6}
    assert (plain - model.sample(LABELS[:3], 4, 1 + 1e-5, head_steps=2)).abs().max() < 1e-2


# --- Tokens and pictures


def test_patches_are_pictures_and_come_back():
    model = tiny_mar(tokens="patches")
    batch = tiny_batch(model)
    tokens = model.to_tokens(batch)
    assert tokens.shape == (4, 16, 48) and tokens.std().item() == pytest.approx(1, abs=0.05)
    assert torch.allclose(model.to_pictures(tokens), batch["images"], atol=1e-5)
    tokens[:, 1] = float("nan")  # a place not known yet: the second patch of the first row
    assert (model.to_pictures(tokens)[:, :, :4, 4:8] == 0).all()


@pytest.mark.parametrize("kind", ["latents", "patches"])
def test_measured_tokens_have_mean_0_and_std_1_and_come_back(kind, monkeypatch):
    model = tiny_mar(tokens=kind)
    channels = model.token_dim
    grid = torch.randn(200, channels, 4, 4) * torch.linspace(0.1, 9, channels)[:, None, None] + 3
    model.measure(grid)
    batch = {"latents": grid, "images": F.pixel_shuffle(grid, 4) if kind == "patches" else None}
    tokens = model.to_tokens(batch)
    assert tokens.mean((0, 1)).abs().max() < 1e-4 and torch.allclose(tokens.std((0, 1)), torch.ones(channels), atol=1e-3)
    if kind == "latents":
        monkeypatch.setattr(model.tokenizer[0], "decode", lambda z: z)
        monkeypatch.setattr(mar.F, "interpolate", lambda known, size: known)
        assert torch.allclose(model.to_pictures(tokens), grid, atol=1e-3)
    other = tiny_mar(tokens=kind)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.token_std, model.token_std)  # kept with the weights


def test_codes_are_normalised_and_every_drawn_token_is_one():
    model = tiny_mar(tokens="codes")
    assert model.codes.mean(0).abs().max() < 1e-5 and torch.allclose(model.codes.std(0), torch.ones(model.token_dim), atol=1e-4)
    batch = tiny_batch(model)
    assert torch.equal(model.nearest_code(model.to_tokens(batch)), batch["tokens"])
    assert torch.equal(model.to_pictures(model.to_tokens(batch)), model.tokenizer[0].decode(batch["tokens"]))
    drawn = model.reveal(LABELS, 4, head_steps=2)[-1]  # by the flow head, whose vectors lie anywhere
    assert torch.equal(drawn, model.codes[model.nearest_code(drawn)])


@pytest.mark.parametrize("kind", ["latents", "codes", "patches"])
def test_prepared_pictures_are_what_the_loss_wants(kind):
    model = tiny_mar(tokens=kind)
    batch = model.prepare(torch.rand(3, 3, model.config.size, model.config.size) * 2 - 1, LABELS[:3])
    assert model.to_tokens(batch).shape == (3, 16, model.token_dim) and model.loss(batch)[0].isfinite()
    assert not any("tokenizer" in name for name in model.state_dict())


# --- Samples


@pytest.mark.parametrize(("head", "tokens"), KINDS)
def test_every_head_draws_pictures_from_a_seed_and_the_last_frame_is_the_picture(head, tokens):
    model = tiny_mar(head=head, tokens=tokens)
    first, frames = model.sample(LABELS, 3, 2.0, seed=1, frames=True, head_steps=2)
    assert first.shape == (4, 3, model.config.size, model.config.size) and first.abs().max() <= 1 and first.dtype == torch.float32
    assert torch.equal(first, model.sample(LABELS, 3, 2.0, seed=1, head_steps=2))
    assert head == "mse" or not torch.equal(first, model.sample(LABELS, 3, 2.0, seed=2, head_steps=2))
    assert len(frames) == 3 and torch.equal(frames[-1], first)


@pytest.mark.parametrize(("order", "head", "tokens"), [*(("halton", *kind) for kind in KINDS[:4]), ("raster", "flow", "latents")])
def test_every_head_learns_one_batch_by_heart(order, head, tokens):
    wide = 64  # wider than a token: a head that is not cannot even tell the noise
    model = tiny_mar(asleep=True, order=order, head=head, tokens=tokens, label_dropout=0.0, head_repeat=2, head_width=wide)
    data = tiny_batch(model, 3)
    if tokens == "latents":
        data["latents"] = data["latents"][:, :, :1, :1].expand(-1, -1, 4, 4)  # flat: a small network learns that soon
        model.measure(data["latents"])
    elif tokens == "patches":
        data["images"] = (data["images"][:, :, :1, :1].expand(-1, -1, 16, 16) * 127.5 + 127.5).byte()
    log = train(model, data, briefly(60, batch_size=3, lr=1e-2, flip=False), quiet=True)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]


# --- What is refused


@pytest.mark.parametrize(("order", "steps"), [("halton", 17), ("halton", -1), ("raster", 15), ("raster", -1)])
def test_numbers_of_steps_that_cannot_be_are_refused(order, steps):
    with pytest.raises(ValueError, match="steps must be"):
        tiny_mar(order=order).sample(LABELS, steps)


@pytest.mark.parametrize("order", ["raster", "spiral"])
def test_an_order_of_another_network_is_refused(order):
    with pytest.raises(ValueError, match="order must be random or halton"):
        tiny_mar().sample(LABELS, 4, order=order)
    with pytest.raises(ValueError, match="order must be raster"):
        tiny_mar(order="raster").sample(LABELS, order="halton")


@pytest.mark.parametrize(("fields", "said"), [
    (dict(tokens="words"), "tokens must be one of"), (dict(order="spiral"), "order must be one of"),
    (dict(head="gan", tokens="patches"), "head must be one of"), (dict(head="categorical", tokens="patches"), "tokens must be codes"),
    (dict(ordered=2.0), "ordered must be"), (dict(tokens="patches", size=30), "multiple of 4"), (dict(), "needs a tokenizer")])
def test_settings_that_do_not_exist_or_fit_are_refused_by_name(fields, said):
    with pytest.raises(ValueError, match=said):
        mar.MAR(mar.Config(**fields))


def test_it_says_which_tokenizer_it_stands_on():
    wanted = {"latents": ("tokenizer", {"bottleneck": "kl"}), "codes": ("tokenizer", {"bottleneck": "vq"}), "patches": None}
    assert {tokens: mar.stands_on(mar.Config(tokens=tokens)) for tokens in wanted} == wanted


@pytest.mark.parametrize("head", HEADS)
def test_the_head_is_a_small_part_of_the_model(head):
    tokenizer = tiny_tokenizer("vq", codes=1024)
    model = mar.MAR(mar.Config(head=head, tokens="codes", size=8), tokenizer)
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(parameter.numel() for parameter in model.head.parameters()) / total
    assert 4e6 < total < 5e6 and share < 0.1
