"""MAR: which tokens see which, and that nothing is lost between tokens and images."""

import pytest
import torch
from conftest import awake, briefly, tiny_tokenizer

from nanogen.blocks.heads import HEADS
from nanogen.blocks.sampling import halton_ranks, reveal_schedule
from nanogen.image import mar
from nanogen.lab.train import train

LABELS = torch.tensor([0, 1, 2, 3])  # the last one: the null class
KINDS = [("flow", "latents"), ("diffusion", "patches"), ("mse", "latents"),
         ("categorical", "codes"), ("flow", "codes")]


def tiny_mar(asleep=False, head="flow", tokens="latents", **fields):
    """A grid of 4x4 tokens, 3 classes."""
    sizes = dict(head_width=16, head_depth=1)
    for name in mar.UNUSED_FIELDS.get(head, ()):
        sizes.pop(name, None), fields.pop(name, None)
    fields = dict(width=32, depth=2, heads=2, classes=3) | sizes | fields
    size = 16 if tokens == "patches" else 8
    tokenizer = tiny_tokenizer(mar.TOKENS[tokens]) if size == 8 else None
    torch.manual_seed(1)
    config = mar.Config(**fields, head=head, tokens=tokens, size=size)
    model = mar.MAR(config, tokenizer)
    return model if asleep else awake(model, 0.2)


def tiny_batch(model, count=4):
    """Random data as `prepare` gives them."""
    name, data = {
        "latents": ("latents", torch.randn(count, 4, 4, 4)),
        "codes": ("tokens", torch.randint(32, (count, 16))),
        "patches": ("images", torch.rand(count, 3, 16, 16) * 2 - 1),
    }[model.config.tokens]
    return {name: data, "labels": torch.arange(count) % 3}


def draw(model, labels=LABELS, **settings):
    return model.sample({"labels": labels}, **settings)["images"]


def history(model, **settings):
    """The tokens and which are known after each pass, and the images."""
    states, to_images = [], model.to_images
    model.to_images = lambda *state: states.append(state) or to_images(*state)
    model.sample({"labels": LABELS}, frames=True, **settings)
    return states


# --- Which tokens see which


@pytest.mark.parametrize("order", ["random", "halton"])
def test_known_tokens_never_change_and_the_schedule_is_kept(order):
    states = history(tiny_mar(), steps=5, guidance=3.0, seed=3, order=order, head_steps=2)
    known = [known for _, known in states]
    assert [k.sum(1).tolist() for k in known] == [[n] * 4 for n in reveal_schedule(16, 5)]
    for (before, there), (after, still) in zip(states[:-1], states[1:], strict=True):
        assert torch.equal(after[there], before[there]) and still[there].all()
    if order == "halton":
        assert torch.equal(known[1], (halton_ranks(4) < known[1][0].sum()).expand(4, -1))
    if order == "random":
        assert len(known[2].unique(dim=0)) > 1  # every image has an order of its own


def test_a_masked_token_sees_all_known_ones_and_is_seen_by_none():
    model, tokens, masked = tiny_mar(), torch.randn(1, 16, 4), torch.arange(16)[None] == 5
    z = model.hidden_states(tokens, masked, LABELS[:1])
    for position in (0, 5, 6, 15):
        other = tokens.clone()
        other[:, position] += 1
        change = (model.hidden_states(other, masked, LABELS[:1]) - z).abs().amax(-1)[0]
        assert change.max() == 0 if position == 5 else change[5] > 1e-6


def test_only_masked_tokens_count_in_the_loss_and_the_network_does_not_see_them(monkeypatch):
    model, asked, masks = tiny_mar(), [], []
    batch = tiny_batch(model, 5)
    draw_masks = model.draw_masks
    monkeypatch.setattr(model, "draw_masks", lambda n: masks.append(draw_masks(n)) or masks[-1])
    monkeypatch.setattr(model.head, "loss", lambda x, z: asked.append((x, z)) or x.sum())
    model.loss(batch | {"labels": torch.full((5,), 3)})
    (tokens, z), (masked, total) = asked[0], masks[0]
    truth = model.to_tokens(batch)
    hidden = model.hidden_states(truth.masked_fill(masked[..., None], 9), masked, LABELS[[3] * 5])
    index = [(truth[masked] == token).all(-1).nonzero().item() for token in tokens]
    assert torch.allclose(z, hidden[masked][index], atol=1e-5)
    assert len(tokens) == len(set(index)) == total == masked.sum()  # each of them once


def test_masks_hide_every_number_of_tokens_equally_often():
    model = tiny_mar(ordered=0.0)
    masks, total = model.draw_masks(4001)
    hidden = masks.sum(1)
    assert hidden.sum() == total == 2000 * 17 + 8 and hidden.min() == 1 and hidden.max() == 16
    assert (torch.bincount(hidden)[1:] / 4001 - 1 / 16).abs().max() < 0.02
    assert torch.allclose(masks.float().mean(0), torch.tensor(17 / 32), atol=0.04)
    assert model.draw_masks(1)[0].sum() == model.draw_masks(1)[1] == 8


def test_ordered_masks_leave_the_beginning_of_the_halton_order():
    model = tiny_mar(ordered=1.0)
    for mask in model.draw_masks(50)[0]:
        assert torch.equal(mask, halton_ranks(4) >= 16 - mask.sum())
    model.config.ordered = 0.5
    masks, _ = model.draw_masks(1000)
    ordered = (masks == (halton_ranks(4) >= 16 - masks.sum(1, keepdim=True))).all(1)
    assert 0.45 < ordered.float().mean() < 0.7  # a random mask of 16 or 15 may look ordered


# --- Guidance


def test_guidance_grows_with_the_fraction_known_and_1_costs_one_pass(monkeypatch):
    model, strengths, rows = tiny_mar(), [], []
    sample = model.head.sample

    def note(z, steps, temperature, generator, z_uncond, guidance):
        strengths.append(guidance)
        return sample(z, steps, temperature, generator, z_uncond, guidance)

    monkeypatch.setattr(model.head, "sample", note)
    model.transformer.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    settings = dict(steps=4, head_steps=2)
    plain = draw(model, LABELS[:3], **settings)
    assert set(strengths) == {1} and set(rows) == {3}
    assert not torch.equal(plain, draw(model, LABELS[1:], **settings))  # the label matters
    strengths.clear(), rows.clear()
    draw(model, LABELS[:3], guidance=5.0, **settings)
    assert strengths == [1 + 4 * known / 16 for known in reveal_schedule(16, 4)]
    assert set(rows) == {6}
    assert (plain - draw(model, LABELS[:3], guidance=1 + 1e-5, **settings)).abs().max() < 1e-2


# --- Tokens and images


def test_patches_become_images_again():
    model = tiny_mar(tokens="patches")
    batch, known = tiny_batch(model), torch.ones(4, 16, dtype=torch.bool)
    tokens = model.to_tokens(batch)
    assert tokens.shape == (4, 16, 48) and tokens.std().item() == pytest.approx(1, abs=0.05)
    assert torch.allclose(model.to_images(tokens, known), batch["images"], atol=1e-5)
    known[:, 1] = False  # the second patch of the first row
    images = model.to_images(tokens, known)
    assert not images[:, :, :4, 4:8].any() and (images == 0).all(1).sum() == 4 * 16
    assert not model.encodes


@pytest.mark.parametrize("kind", mar.TOKENS)
def test_what_unknown_tokens_hold_does_not_leak_into_known_cells(kind):
    model = tiny_mar(tokens=kind)
    tokens, known = model.to_tokens(tiny_batch(model)), torch.rand(4, 16) < 0.5
    other = torch.where(known[..., None], tokens, tokens.flip(1))
    assert torch.equal(model.to_images(tokens, known), model.to_images(other, known))


def test_measured_latents_have_mean_0_and_std_1_and_come_back(monkeypatch):
    model = tiny_mar()
    grid = torch.randn(200, 4, 4, 4) * torch.linspace(0.1, 9, 4)[:, None, None] + 3
    model.measure({"latents": grid})
    tokens = model.to_tokens({"latents": grid})
    assert tokens.mean((0, 1)).abs().max() < 1e-4
    assert torch.allclose(tokens.std((0, 1)), torch.ones(4), atol=1e-3)
    monkeypatch.setattr(model.tokenizer, "decode", lambda z: z)
    monkeypatch.setattr(mar.F, "interpolate", lambda known, size: known)
    images = model.to_images(tokens, torch.ones(200, 16, dtype=torch.bool))
    assert torch.allclose(images, grid, atol=1e-3)
    other = tiny_mar()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.standardize.std, model.standardize.std)  # saved with the weights


def test_codes_are_standardized_and_every_drawn_token_is_one():
    model = tiny_mar(tokens="codes")
    assert model.codes.mean(0).abs().max() < 1e-5
    assert torch.allclose(model.codes.std(0), torch.ones(model.token_dim), atol=1e-4)
    batch = tiny_batch(model)
    images = model.to_images(model.to_tokens(batch), torch.ones(4, 16, dtype=torch.bool))
    assert torch.equal(images, model.tokenizer.decode(batch["tokens"]))
    drawn, _ = history(model, steps=4, head_steps=2)[-1]  # a flow head may draw any vector
    assert (drawn[:, :, None] == model.codes).all(-1).any(-1).all()


@pytest.mark.parametrize("kind", ["latents", "codes"])
def test_prepared_images_are_what_the_loss_takes(kind):
    model = tiny_mar(tokens=kind)
    batch = model.prepare({"images": torch.rand(3, 3, 8, 8) * 2 - 1, "labels": LABELS[:3]})
    assert model.encodes and model.to_tokens(batch).shape == (3, 16, model.token_dim)
    assert model.loss(batch)[0].isfinite()


# --- Samples


@pytest.mark.parametrize(("head", "tokens"), KINDS)
def test_every_head_draws_images_from_a_seed(head, tokens):
    model, settings = tiny_mar(head=head, tokens=tokens), dict(steps=3, guidance=2.0, head_steps=2)
    drawn = model.sample({"labels": LABELS}, seed=1, frames=True, **settings)
    first, size = drawn["images"], model.config.size
    assert first.shape == (4, 3, size, size) and first.abs().max() <= 1
    assert torch.equal(first, draw(model, seed=1, **settings))
    assert head == "mse" or not torch.equal(first, draw(model, seed=2, **settings))
    assert len(drawn["frames"]) == 3 and torch.equal(drawn["frames"][-1], first)


@pytest.mark.parametrize(("head", "tokens"), KINDS[:4])
def test_every_head_can_overfit_one_batch(head, tokens):
    wide = dict(head_width=64, head_repeat=2)  # wider than a token, or it cannot tell the noise
    model = tiny_mar(asleep=True, head=head, tokens=tokens, label_dropout=0.0, **wide)
    data = tiny_batch(model, 3)
    if tokens == "latents":  # flat: a small network learns that soon
        data["latents"] = data["latents"][:, :, :1, :1].expand(-1, -1, 4, 4)
        model.measure(data)
    elif tokens == "patches":
        flat = data["images"][:, :, :1, :1].expand(-1, -1, 16, 16)
        data["images"] = (flat * 127.5 + 127.5).byte()
    log = train(model, data, briefly(80, batch_size=3, lr=1e-2, flip=False), quiet=True)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]


# --- What is refused


@pytest.mark.parametrize("settings", [dict(steps=-1), dict(steps=0), dict(order="raster"),
                                      dict(head_steps=0)])
def test_bad_settings_of_the_sampler_are_refused(settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"{name.removeprefix('head_')} .*must be"):
        draw(tiny_mar(), **(dict(steps=4) | settings))


@pytest.mark.parametrize(("fields", "said"), [
    (dict(tokens="pixels"), "tokens must be"), (dict(order="raster"), "order must be one of"),
    (dict(head="gan"), "head must be one of"), (dict(head="categorical"), "tokens must be codes"),
    (dict(ordered=2.0), "ordered must be"), (dict(tokens="patches", size=30), "multiple of 4"),
    (dict(head="mse", head_depth=3), "head_depth has no effect"), (dict(heads=5), "heads must"),
    (dict(head="categorical", tokens="codes", head_width=8), "head_width has no effect"),
    (dict(head_repeat=0), "head_repeat must be at least 1")])
def test_a_config_that_cannot_be_is_refused_by_name(fields, said):
    with pytest.raises(ValueError, match=said):
        mar.Config(**fields)


def test_it_says_which_tokenizer_it_requires():
    for tokens, kind in (("latents", "kl"), ("codes", "vq")):
        found = mar.MAR.requires(mar.Config(tokens=tokens, size=16))
        assert found[:2] == ("tokenizer", {"bottleneck": kind, "size": 16})
        with pytest.raises(ValueError, match=f"{tokens} require a {kind} tokenizer"):
            mar.MAR(mar.Config(tokens=tokens))
    assert mar.MAR.requires(mar.Config(tokens="patches")) is None


@pytest.mark.parametrize("head", HEADS)
def test_the_head_is_a_small_part_of_the_model(head):
    tokenizer = tiny_tokenizer("vq", codebook_size=1024)
    model = mar.MAR(mar.Config(head=head, tokens="codes", size=8), tokenizer)
    total = sum(parameter.numel() for parameter in model.parameters())
    fraction = sum(parameter.numel() for parameter in model.head.parameters()) / total
    assert 4e6 < total < 5e6 and fraction < 0.1
