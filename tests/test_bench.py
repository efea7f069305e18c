"""The bench: its numbers are times of what it says, whatever the machine."""

import pytest
import torch

from nanogen.blocks.transformer import Transformer
from nanogen.lab import bench


def test_a_tiny_bench_prints_three_tables_and_returns_their_rows(capsys):
    rows = bench.bench(width=64, depth=1, batch=2, lengths=(4, 8), side=64, budget=0.05, compiled=False)
    printed = capsys.readouterr().out
    assert all(heading in printed for heading in ("The machine", "Training", "Sampling"))
    speeds = [row for row in rows if "ratio" in row]
    assert {row["precision"] for row in speeds} >= {"float32"} and all(row["seconds"] > 0 for row in speeds)
    for row in speeds:
        share = row["GFLOP/s"] / row["its products alone"]
        assert row["ratio"] == f"{share:.0%}"
    chains = [row for row in rows if "tokens" in row]
    assert [row["tokens"] for row in chains] == [4, 8]
    for key in ("cached, s", "uncached, s"):
        assert 0 < chains[0][key] < chains[1][key]


@pytest.mark.parametrize("width, depth, batch", [(64, 1, 2), (128, 2, 3)])
def test_the_products_timed_alone_are_those_of_the_step(width, depth, batch):
    """Counted by torch itself in the real step; the input asks for its gradient, too, as every layer but the first does."""
    from torch.utils.flop_counter import FlopCounterMode

    work, products = bench.product_work(width, depth, batch, torch.float32)
    counts = []
    for function in (products, bench.training_step(width, depth, batch, torch.float32, False)):
        with FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    assert counts == [work, work]


def test_a_cached_step_is_a_step_of_the_chain(monkeypatch):
    """The steps that are timed pass through the model with the past they claim: one new token, or all of them."""
    seen = []
    forward = Transformer.forward

    def watched(self, x, angles, **options):
        cache = options.get("cache")
        seen.append((x.shape[1], cache.layers[0].length if cache else None))
        return forward(self, x, angles, **options)

    monkeypatch.setattr(Transformer, "forward", watched)
    bench.sampling(64, 1, (4, 8), 0)
    assert {(1, 7), (8, None), (1, 3), (4, None)} <= set(seen)
