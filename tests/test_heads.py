"""Generation heads: what each learns where two answers are right; that they are exchangeable."""

import math

import pytest
import torch
from conftest import awake
from oracles import learn_toy, toy

from nanogen.blocks.heads import HEADS, make_head

CODES = torch.randn(6, 3, generator=torch.Generator().manual_seed(7))
MODES = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
ITERATED = ("diffusion", "flow")


def tiny_head(kind, **fields):
    """Tokens of 3 numbers from vectors of 8."""
    torch.manual_seed(1)
    return awake(make_head(kind, 3, 8, **(dict(width=16, codes=CODES) | fields)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def learned(kind, points, steps):
    return learn_toy(make_head(kind, 2, 1, width=32), points, steps, lr=1e-2)


def test_mse_predicts_the_mean_which_is_neither_mode():
    drawn = learned("mse", toy("two modes", 2000), 150)
    assert drawn.abs().max() < 0.15 and torch.cdist(drawn, MODES).min() > 0.8


@pytest.mark.parametrize("kind", ITERATED)
def test_flow_and_diffusion_find_both_modes_and_nothing_between(kind):
    distance, mode = torch.cdist(learned(kind, toy("two modes", 2000), 250), MODES).min(1)
    assert 0.35 < (mode == 0).float().mean() < 0.65
    assert distance.mean() < 0.2 and (distance > 0.5).float().mean() < 0.05


def test_categorical_draws_codes_as_often_as_they_occur():
    p = torch.tensor([0.05, 0.1, 0.15, 0.2, 0.2, 0.3])
    index = torch.multinomial(p, 4000, replacement=True)
    points = CODES[index] + 0.01 * torch.randn(4000, 3)  # the nearest code counts
    head = make_head("categorical", 3, 1, codes=CODES)
    drawn = learn_toy(head, points, steps=150, lr=1e-2)
    drawn_code = (drawn[:, None] == CODES).all(-1)  # (1000, 6)
    assert drawn_code.any(1).all() and torch.allclose(drawn_code.float().mean(0), p, atol=0.06)
    assert torch.equal(head.sample(torch.ones(2, 1), temperature=0.0), CODES[[5, 5]])


CHANCE = {"mse": 1, "categorical": math.log(6), "diffusion": 0.5, "flow": 2}


@pytest.mark.parametrize("kind", HEADS)
def test_an_untrained_head_has_the_loss_of_chance(kind):
    head = make_head(kind, 3, 8, width=16, codes=CODES)
    x = CODES[torch.randint(6, (500,))] if kind == "categorical" else torch.randn(500, 3)
    assert head.loss(x, 0.1 * torch.randn(500, 8)).item() == pytest.approx(CHANCE[kind], rel=0.1)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_can_take_each_others_place(kind):
    head, x, z = tiny_head(kind), torch.randn(50, 3), torch.randn(50, 8)
    loss = head.loss(x, z)
    loss.backward()
    gradients = [p.grad for p in head.parameters()]
    assert loss.shape == () and all(g is not None and g.isfinite().all() for g in gradients)
    first, again, other = (head.sample(z, 4, 1.0, generator(seed), -z, 2.0) for seed in (1, 1, 2))
    assert first.shape == (50, 3) and first.dtype == torch.float32 and not first.requires_grad
    assert torch.equal(first, again) and (kind == "mse" or not torch.equal(first, other))
    still, too = (head.sample(z, 4, 0.0, generator(seed)) for seed in (1, 2))
    assert torch.equal(still, too)  # at temperature 0 nothing is left to chance
    assert not torch.equal(still, head.sample(-z, 4, 0.0))  # z matters
    with pytest.raises(ValueError, match="steps of the head"):
        head.sample(z, 0)


@pytest.mark.parametrize("kind", HEADS)
def test_guidance_1_is_conditional_and_costs_one_pass(kind, monkeypatch):
    head, z, nothing, rows = tiny_head(kind), torch.randn(5, 8), torch.randn(5, 8), []
    predict = head.predict
    counted = lambda z, *inputs: rows.append(len(z)) or predict(z, *inputs)  # noqa: E731
    monkeypatch.setattr(head, "predict", counted)
    plain = head.sample(z, 4, 1.0, generator())
    assert torch.equal(plain, head.sample(z, 4, 1.0, generator(), nothing, 1.0))
    assert set(rows) == {5} and len(rows) == (8 if kind in ITERATED else 2)
    rows.clear()
    ones = head.sample(z, 4, 1.0, generator(), nothing, torch.ones(5))
    assert torch.allclose(plain, ones, atol=1e-4) and set(rows) == {10}
    none = head.sample(z, 4, 1.0, generator(), nothing, 0.0)
    assert torch.allclose(head.sample(nothing, 4, 1.0, generator()), none, atol=1e-4)


@pytest.mark.parametrize("kind", ["mse", "diffusion", "flow"])
def test_every_row_has_its_own_guidance(kind):
    head, z, nothing = tiny_head(kind), torch.randn(3, 8), torch.randn(3, 8)
    strengths = [0.0, 1.5, 4.0]
    together = head.sample(z, 3, 1.0, generator(), nothing, torch.tensor(strengths))
    for i, g in enumerate(strengths):
        alone = head.sample(z, 3, 1.0, generator(), nothing, g)
        assert torch.allclose(together[i], alone[i], atol=1e-4)


def test_guidance_moves_log_odds_predictions_and_fields_by_the_same_formula():
    z, nothing = torch.randn(4, 8), torch.randn(4, 8)
    mse = tiny_head("mse")
    cond, uncond = mse.sample(z), mse.sample(nothing)
    drawn = mse.sample(z, z_uncond=nothing, guidance=3.0)
    assert torch.allclose(drawn, uncond + 3 * (cond - uncond), atol=1e-5)
    categorical = tiny_head("categorical")
    cond, uncond = categorical.predict(z), categorical.predict(nothing)
    drawn = categorical.sample(z, temperature=0.0, z_uncond=nothing, guidance=3.0)
    assert torch.equal(drawn, CODES[(uncond + 3 * (cond - uncond)).argmax(-1)])
    flow = tiny_head("flow")
    noise = torch.randn(4, 3, generator=generator(5))
    cond, uncond = (flow.predict(c, noise, torch.zeros(4)) for c in (z, nothing))
    step = flow.sample(z, 1, 1.0, generator(5), nothing, 3.0)  # one Euler step from t=0 to t=1
    assert torch.allclose(step, noise + uncond + 3 * (cond - uncond), atol=1e-5)


@pytest.mark.parametrize("kind", ITERATED)
@pytest.mark.parametrize("steps", [1, 2, 16])
def test_a_head_that_knows_nothing_yet_does_not_blow_up(kind, steps):
    drawn = make_head(kind, 3, 8, width=16).sample(torch.randn(500, 8), steps, 1.0, generator())
    assert drawn.std() < 1.1  # as the noise; a token estimated from wrong noise would have 100


@pytest.mark.parametrize("kind", ITERATED)
def test_each_z_serves_several_noises_and_times(kind):
    head, seen = tiny_head(kind, repeat=4), []
    head.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    z = torch.arange(5.0)[:, None].expand(5, 8)
    head.loss(torch.zeros(5, 3), z)
    x_t, t, z = seen[0]
    assert x_t.shape == (20, 3) and len(t.unique()) == 20 and len(x_t.unique(dim=0)) == 20
    assert torch.bincount(z[:, 0].long()).tolist() == [4] * 5
