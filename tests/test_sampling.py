"""Drawing from logits, guidance, and the order in which masked tokens are revealed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogen.blocks.sampling import (
    apply_guidance,
    draw,
    halton_ranks,
    reveal_schedule,
    with_and_without,
)

LABELS = torch.tensor([0, 1, 2, 3])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def frequencies(logits, **options):
    """How often each index is drawn, of 20,000 draws."""
    drawn = draw(logits.expand(20_000, -1), generator(), **options)
    return torch.bincount(drawn, minlength=len(logits)) / 20_000


LOGITS = torch.tensor([0.0, 2.0, -1.0, 1.0, 1.5])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    assert torch.allclose(frequencies(LOGITS, temperature=temperature), expected, atol=0.015)


def test_temperature_0_takes_the_most_likely():
    logits = torch.randn(6, 4, 9)
    assert torch.equal(draw(logits, generator(), temperature=0.0), logits.argmax(-1))
    with pytest.raises(ValueError, match="negative"):
        draw(logits, generator(), temperature=-1.0)


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (0, range(5)), (9, range(5))])
def test_top_k_keeps_the_k_most_likely_in_proportion(k, kept):
    expected = torch.zeros(5)
    expected[list(kept)] = LOGITS[list(kept)].softmax(-1)
    assert torch.allclose(frequencies(LOGITS, top_k=k), expected, atol=0.015)


@given(st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=2, max_size=6, unique=True),
       st.floats(0.01, 0.99))
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


@pytest.mark.parametrize(
    "settings", [dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1), dict(temperature=-1.0),
                 dict(temperature=float("nan"))])
def test_settings_that_would_leave_no_token_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        draw(torch.zeros(2, 5), generator(), **settings)


def test_guidance_exaggerates_what_the_label_changes():
    assert with_and_without(LABELS, 7, 1.0).tolist() == [0, 1, 2, 3]
    assert with_and_without(LABELS, 7, 2.0).tolist() == [0, 1, 2, 3, 7, 7, 7, 7]
    cond, uncond = torch.randn(2, 4, 5)
    both = torch.cat([cond, uncond])
    assert torch.equal(apply_guidance(both, 0.0), uncond)
    assert apply_guidance(cond, 1.0) is cond
    assert torch.allclose(apply_guidance(both, 3.0), cond + 2 * (cond - uncond), atol=1e-5)


# --- The order of masked tokens


def test_the_first_steps_reveal_few():
    schedule = reveal_schedule(64, 12)
    new = np.diff([0, *schedule])
    assert schedule[:3] == [1, 3, 5] and schedule[-1] == 64 and new[0] == 1 and new[-1] >= 8
    assert reveal_schedule(64, 64) == list(range(1, 65))
    assert reveal_schedule(64, 1) == [64]


@pytest.mark.parametrize("grid", [1, 2, 4, 5, 8])
def test_halton_order_is_a_permutation(grid):
    assert sorted(halton_ranks(grid).tolist()) == list(range(grid**2))


def test_halton_order_covers_the_image_evenly_from_the_beginning():
    cells = halton_ranks(8).argsort()
    rows, columns = cells // 8, cells % 8
    for count in (8, 16, 32):  # every quarter of the image has a fourth of them, to within one
        quarters = torch.bincount((rows // 4 * 2 + columns // 4)[:count], minlength=4)
        assert (quarters - count // 4).abs().max() <= 1
    blocks = (rows // 2 * 4 + columns // 2)[:16].unique()
    assert len(blocks) >= 14  # of 16 blocks of 2x2; 16 cells at random fall into 11
    side_by_side = (columns[:16, None] - columns[:16]).abs() == 1
    assert not (side_by_side & (rows[:16, None] == rows[:16])).any()
