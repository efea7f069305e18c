"""Quantizers: nearest means nearest, gradients pass, every code is used, indices decode."""

from math import prod

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogen.blocks.multiscale import MultiScaleVQ
from nanogen.blocks.quantize import FSQ, Codebook, ResidualVQ, VectorQuantizer, nearest, usage


def all_kinds(dim=16):
    return {
        "vq": VectorQuantizer(dim, 32),
        "euclidean": VectorQuantizer(dim, 32, code_dim=None),
        "fsq": FSQ(dim, (5, 4, 3)),
        "rvq": ResidualVQ(dim, 32, depth=4),
        "rvq, projected": ResidualVQ(dim, 32, depth=4, code_dim=6),
    }


KINDS = list(all_kinds())


# --- What all of them promise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_decode_gives_the_codes_and_shapes_are_kept(kind, training):
    quantizer = all_kinds()[kind].train(training)
    codes, indices, loss = quantizer(torch.randn(4, 3, 5, 16))
    assert codes.shape == (4, 3, 5, 16) and loss.shape == ()
    assert indices.shape == ((4, 3, 5, 4) if "rvq" in kind else (4, 3, 5))
    assert indices.dtype == torch.int64 and indices.max() < quantizer.codebook_size
    quantizer(torch.randn(4, 3, 5, 16))  # in training, this one moves the codebook
    codes, indices, _ = quantizer.eval()(torch.randn(4, 3, 5, 16))
    assert torch.equal(codes, quantizer.decode(indices))  # exactly, not nearly


def test_codes_dropped_in_training_decode_too():
    quantizer = ResidualVQ(16, 32, depth=4, dropout=1.0)
    codes, indices, _ = quantizer(torch.randn(40, 6, 16))
    assert torch.equal(codes, quantizer.decode(indices))
    sent = indices >= 0
    assert (sent[..., 0]).all() and (sent == sent[:, :1]).all()  # one depth a sample, at least 1
    assert (sent[..., :-1] >= sent[..., 1:]).all()  # always the first so many
    depths = torch.bincount(sent[:, 0].sum(-1), minlength=5)
    assert (depths[1:] >= 3).all()  # 40 draws from 1 to 4
    quantizer.eval()
    assert (quantizer(torch.randn(40, 6, 16)).indices >= 0).all()  # in use, nothing is dropped


@pytest.mark.parametrize("kind", ["euclidean", "rvq"])
def test_straight_through_is_the_identity(kind):
    quantizer = all_kinds()[kind]
    x = torch.randn(8, 5, 16, requires_grad=True)
    upstream = torch.randn(8, 5, 16)
    (gradient,) = torch.autograd.grad(quantizer(x).codes, x, upstream)
    assert torch.equal(gradient, upstream)  # not depth times it, not nothing


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_encoder_and_both_projections(kind):
    quantizer = all_kinds()[kind]
    x = torch.randn(8, 5, 16, requires_grad=True)
    codes, _, loss = quantizer(x)
    (codes.square().sum() + loss).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in quantizer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_changes_nothing_but_the_dtype_given(kind):
    quantizer = all_kinds()[kind].eval()
    x = torch.randn(4, 6, 16).bfloat16()
    plain = quantizer(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = quantizer(x)
        assert torch.equal(quantizer.decode(half.indices), plain.codes)
    assert half.codes.dtype == torch.bfloat16 and torch.equal(half.indices, plain.indices)
    assert torch.equal(half.loss, plain.loss) and torch.equal(half.codes, plain.codes.bfloat16())
    quantizer.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(quantizer(x).loss.dtype == torch.float32 for _ in range(2))
    assert all(b.dtype != torch.bfloat16 for b in quantizer.buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_from_a_checkpoint_is_no_interruption(kind):
    batches = torch.randn(6, 10, 4, 16)
    one = all_kinds()[kind]
    for batch in batches[:3]:
        one(batch)
    two = all_kinds()[kind]
    two.load_state_dict(one.state_dict())
    results = []
    for quantizer in (one, two):
        torch.manual_seed(5)
        results.append([quantizer(batch) for batch in batches[3:]])
    for a, b in zip(*results, strict=True):
        assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_changes_nothing(kind):
    quantizer = all_kinds()[kind]
    quantizer(torch.randn(8, 5, 16))
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer.eval()(torch.randn(8, 5, 16))
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


def test_a_depth_that_does_not_exist_and_usage_of_nothing_are_refused():
    with pytest.raises(ValueError, match="depth must be from 1 to 3"):
        ResidualVQ(16, 8, depth=3)(torch.randn(4, 16), depth=4)
    with pytest.raises(ValueError, match="at least one index"):
        usage(torch.tensor([-1]), 4)


@pytest.mark.parametrize("kind", KINDS)
def test_indices_that_are_no_code_are_refused(kind):
    quantizer = all_kinds()[kind]
    for wrong in (-2 if "rvq" in kind else -1, quantizer.codebook_size, 10**6):
        with pytest.raises(IndexError, match="codes"):
            quantizer.decode(torch.tensor([[0, wrong]]))


# --- Vector quantization


@pytest.mark.parametrize("normalise", [True, False])
def test_indices_are_the_true_nearest_neighbours(normalise):
    codebook = Codebook(5, 40, normalise, decay=0.99, dead_below=0.05)
    x = torch.randn(3000, 5)
    if normalise:
        x = torch.nn.functional.normalize(x, dim=-1)
    brute = torch.stack([(x - v).square().sum(-1) for v in codebook.vectors]).argmin(0)
    assert torch.equal(nearest(x, codebook.vectors), brute)  # in 3 parts of 1,024 rows


def clusters(count, dim=8, per_cluster=32):
    centres = 5 * torch.randn(count, dim)
    return centres, (centres[:, None] + 0.1 * torch.randn(count, per_cluster, dim)).flatten(0, 1)


@pytest.mark.parametrize("code_dim", [None, 8])
def test_the_k_means_start_uses_nearly_all_codes_and_fits(code_dim):
    centres, x = clusters(64)
    quantizer = VectorQuantizer(8, 64, code_dim)
    untrained = quantizer.eval()(x).indices
    codes, indices, _ = quantizer.train()(x)
    used, perplexity = usage(indices, 64)
    assert used > 0.9 > usage(untrained, 64)[0] and perplexity > 32
    if code_dim is None:
        assert (codes - x).square().mean() < 0.35 * x.var()


def test_the_start_is_repeatable_and_happens_once():
    x = torch.randn(200, 8)
    codebooks = []
    for _ in range(2):
        torch.manual_seed(3)
        codebooks.append(VectorQuantizer(8, 16))
        codebooks[-1](x)
    assert torch.equal(codebooks[0].codebook.vectors, codebooks[1].codebook.vectors)
    before = codebooks[0].codebook.vectors.clone()
    codebooks[0](x)
    change = (codebooks[0].codebook.vectors - before).norm() / before.norm()
    assert 0 <= change < 0.05  # a step of the moving average, not a new start


def test_the_moving_average_is_the_mean_of_what_hit_the_code():
    codebook = Codebook(2, 2, normalise=False, decay=0.5, dead_below=0.05)
    codebook.vectors.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
    codebook.counts.copy_(torch.tensor([2.0, 2.0]))
    codebook.sums.copy_(codebook.vectors * 2)
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0], [9.0, 7.0]])
    codebook.update(x, nearest(x, codebook.vectors))
    # counts stay at 2; sums: half of the old (0, 0) and of (4, 0); half of (20, 20) and of (18, 16)
    assert torch.allclose(codebook.vectors, torch.tensor([[1.0, 0.0], [9.5, 9.0]]))


def test_the_codebook_follows_features_that_drift():
    quantizer, x = VectorQuantizer(4, 16, code_dim=None), torch.randn(256, 4)
    quantizer(x)
    start = quantizer.eval()(x).loss
    quantizer.train()
    for step in range(1200):  # 300 on the way, then at rest: time for those left behind to revive
        quantizer(x + min(step, 300) / 30)
    _, indices, loss = quantizer.eval()(x + 10)
    assert usage(indices, 16)[0] == 1 and loss < 1.15 * start


def test_dead_codes_revive_though_the_batch_is_smaller_than_the_codebook():
    batches = 20 + torch.randn(20, 32, 8)  # far from where the codes are before the first batch

    def used_later(dead_below):
        quantizer = VectorQuantizer(8, 256, code_dim=None, dead_below=dead_below)
        return torch.cat([quantizer(batch).indices for batch in batches][10:]).unique()

    assert len(used_later(0.05)) > 120  # of 320 draws from 256 codes
    assert len(used_later(0.0)) <= 32  # without revival, never more than the first batch started


def test_a_code_far_from_all_features_is_moved_to_one_of_them():
    quantizer, x = VectorQuantizer(2, 8, code_dim=None, decay=0.9), torch.randn(100, 2)
    quantizer(x)
    codebook = quantizer.codebook
    codebook.vectors[3], codebook.sums[3] = 1e3, codebook.counts[3] * 1e3
    for _ in range(60):  # 0.9^29 is below 5%
        quantizer(x)
    assert codebook.vectors[3].norm() < 10 and 3 in quantizer.eval()(x).indices


def test_nothing_is_revived_while_all_codes_are_used_however_small_the_batch():
    """An absolute threshold (EnCodec: fewer than 2 hits) would replace every code at every step."""
    _, x = clusters(16, per_cluster=1)
    quantizer = VectorQuantizer(8, 16, code_dim=None)
    quantizer(x)
    before = quantizer.codebook.vectors.clone()
    assert usage(quantizer(x).indices, 16)[0] == 1 and quantizer.codebook.counts.max() < 2
    for _ in range(50):
        quantizer(x)
    assert torch.allclose(quantizer.codebook.vectors, before, atol=1e-4)


def test_commitment_draws_the_features_to_their_codes():
    quantizer = VectorQuantizer(4, 8, code_dim=None, commitment=0.5).eval()
    x = torch.randn(10, 4, requires_grad=True)
    codes, _, loss = quantizer(x)
    assert torch.allclose(loss, 0.5 * (x - codes).square().mean())
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.allclose(gradient, 2 * 0.5 * (x - codes).detach() / x.numel())


def test_usage_counts_codes_and_perplexity():
    used, perplexity = usage(torch.tensor([[0, 1], [2, 3], [-1, -1]]), 8)
    assert used == 0.5 and abs(perplexity - 4) < 1e-9
    assert usage(torch.zeros(10, dtype=torch.long), 8) == (1 / 8, 1.0)


# --- Finite scalars


@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple))
@settings(max_examples=40, deadline=None)
def test_fsq_indices_and_codes_are_one_to_one(levels):
    quantizer = FSQ(6, levels)
    every = torch.arange(prod(levels))
    channels = quantizer.lookup(every)
    assert quantizer.codebook_size == prod(levels) == len(channels.unique(dim=0))
    assert channels.abs().max() <= 1
    # a feature that tanh squashes onto the code (a hair inside [-1, 1]) comes back as this index
    codes, indices, loss = quantizer.quantize(torch.atanh(0.999 * channels))
    assert torch.equal(indices, every) and torch.equal(codes, channels) and loss == 0


def test_fsq_rounds_to_the_nearest_level():
    quantizer, z = FSQ(3, (2, 5, 8)), torch.randn(500, 3)
    codes = quantizer.quantize(z)[0]
    for i, levels in enumerate((2, 5, 8)):
        grid = torch.linspace(-1, 1, levels)
        brute = grid[(z[:, i : i + 1].tanh() - grid).abs().argmin(1)]
        assert torch.allclose(codes[:, i], brute, atol=1e-6)


def test_fsq_gradient_is_that_of_tanh():
    z = torch.randn(20, 3, requires_grad=True)
    codes = FSQ(3, (2, 5, 8)).quantize(z)[0]
    (gradient,) = torch.autograd.grad(codes.sum(), z)
    assert torch.allclose(gradient, 1 - z.tanh().square())


def test_fsq_uses_all_its_codes_from_the_first_step():
    quantizer = FSQ(64)
    assert quantizer.codebook_size == 1000 and "levels" not in quantizer.state_dict()
    used, perplexity = usage(quantizer(torch.randn(20_000, 64)).indices, 1000)
    assert used > 0.95 and perplexity > 700


# --- Residual vector quantization


def trained_residual(depth=5):
    quantizer = ResidualVQ(6, 32, depth, dropout=0.0)
    for _ in range(30):
        quantizer(torch.randn(512, 6))
    return quantizer.eval()


def test_rvq_error_falls_with_depth():
    quantizer, x = trained_residual(), torch.randn(512, 6)
    errors = [(quantizer(x, depth=d).codes - x).square().mean() for d in range(1, 6)]
    assert all(after < 0.8 * before for before, after in zip(errors, errors[1:], strict=False))


def test_rvq_first_codebooks_do_not_know_how_many_follow():
    quantizer, x = trained_residual(), torch.randn(20, 6)
    full = quantizer(x)
    for depth in range(1, 6):
        short = quantizer(x, depth=depth)
        assert torch.equal(short.indices, full.indices[..., :depth])
        assert torch.equal(short.codes, quantizer.decode(full.indices[..., :depth]))


def test_rvq_commitment_of_later_codebooks_reaches_the_encoder():
    """By hand: every codebook pulls z to the sum up to itself. In EnCodec only the first does."""
    quantizer = trained_residual(3)
    x = torch.randn(20, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(quantizer(x).loss, x)
    partial_sums = [quantizer.decode(quantizer(x).indices[..., :d]) for d in (1, 2, 3)]
    by_hand = sum(2 * (x - q) for q in partial_sums) * 0.25 / (3 * x.numel())
    assert torch.allclose(gradient, by_hand, atol=1e-7)
    only_first = 2 * (x - partial_sums[0]) * 0.25 / (3 * x.numel())
    assert (gradient - only_first).norm() > 0.2 * only_first.norm()


def test_rvq_dropped_samples_move_no_codebook():
    quantizer, x = ResidualVQ(6, 8, depth=2, dropout=0.0), torch.randn(64, 6)
    quantizer(x)
    quantizer.draw_depths = lambda count, depth, device: torch.ones(count, dtype=torch.long)
    second = quantizer.codebooks[1]
    before = second.vectors.clone()
    _, indices, loss = quantizer(x + 1)
    assert (indices[:, 1] == -1).all() and (indices[:, 0] >= 0).all() and loss.isfinite()
    assert torch.allclose(second.vectors, before, atol=1e-6)
    assert not torch.equal(second.counts, torch.zeros(8))


# --- Several processes


def keep_one_codebook(rank: int, store: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 32, code_dim=None)
    batches = torch.randn(4, 200, 8, generator=torch.Generator().manual_seed(0))
    for batch in batches:  # each process takes its half of the batch
        quantizer(batch[rank * 100 : (rank + 1) * 100])
    torch.save(quantizer.state_dict(), f"{result}{rank}")
    torch.manual_seed(0)
    quantizer = MultiScaleVQ(8, 8, scales=(1, 2), code_dim=4)  # shares running statistics, too
    for batch in batches.view(4, 50, 2, 2, 8):
        quantizer(batch[rank * 25 : (rank + 1) * 25])
    torch.save(quantizer.state_dict(), f"{result}{rank}-scales")
    torch.manual_seed(rank)  # each draws its own noise; few features leave dead codes to revive
    quantizer = VectorQuantizer(8, 64)
    for _ in range(4):
        quantizer(torch.randn(16, 8))
    torch.save(quantizer.codebook.state_dict(), f"{result}{rank}-own-noise")
    dist.destroy_process_group()


def test_two_processes_keep_the_codebook_of_one(tmp_path):
    mp.spawn(keep_one_codebook, (str(tmp_path / "store"), str(tmp_path / "rank")), nprocs=2)

    def saved(name):  # by both processes, which must be equal
        one, two = (torch.load(f"{tmp_path}/rank{i}{name}", weights_only=True) for i in (0, 1))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
        return one

    batches = torch.randn(4, 200, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    alone = VectorQuantizer(8, 32, code_dim=None)
    for batch in batches:
        alone(batch)
    both = saved("")
    for name, value in alone.state_dict().items():
        assert torch.allclose(both[name].float(), value.float(), atol=1e-4)
    torch.manual_seed(0)
    alone, both = MultiScaleVQ(8, 8, scales=(1, 2), code_dim=4), saved("-scales")
    for batch in batches.view(4, 50, 2, 2, 8):
        alone(batch)
    for name in ("mean", "std"):  # of the first scale; k-means started from another order
        assert torch.allclose(both[name][0], getattr(alone, name)[0], atol=1e-4)
    assert saved("-own-noise").keys() == alone.codebook.state_dict().keys()
