"""The bench: how near nanogen comes to this machine's own limits.

    machine     matrix products per second, and how fast memory is copied: what anything here can hope for
    training    forward and backward of the Transformer against nothing but the matrix products that it consists of
    sampling    a chain of tokens with and without the cache: a step of a chain costs one token's work, or that of them all

A ratio of 80% says: norms, rotations, softmax, copies and Python together take a fifth of the time. It grows with width,
since products are width^2 work and everything else is width^1; and it falls where products are fast (bfloat16 on AMX or a
GPU), since everything else is bound by memory. Other programs on the machine only ever add time: all that is compared is
timed in turn, and the fastest of each counts.

    python -m nanogen bench
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from nanogen.blocks.transformer import Cache, Transformer, grid_positions, rotary_angles
from nanogen.lab import machine
from nanogen.lab.evaluate import table

SIDE, HEAD = 8, 64  # tokens along a side of the grid, as on all 32x32 pictures here; features of an attention head
CHAINS = 8  # drawn at once


def bench(width: int = 512, depth: int = 4, batch: int = 0, lengths: tuple[int, ...] = (64, 256, 1024), side: int = 2048,
          budget: float = 15.0, compiled: bool = True) -> list[dict]:
    """Print three tables, and return their rows. Under three minutes on two CPU cores.

    width, depth: of the Transformer; batch: pictures of 64 tokens a step (64 on a CPU, 512 elsewhere); lengths: of the
    chains that are sampled; side: of the plain matrices; budget: seconds for each comparison; compiled: torch.compile, too.
    """
    batch = batch or (64 if machine.device().type == "cpu" else 512)
    rows = limits(side)
    print(f"{machine.describe()}\n\nThe machine: products of {side} x {side} matrices\n{table(rows)}", flush=True)
    speeds = training(width, depth, batch, budget, compiled)
    print(f"\nTraining: width {width}, depth {depth}, {batch} x {SIDE**2} tokens, forward and backward\n{table(speeds)}")
    chains = sampling(width, depth, lengths, budget)
    print(f"\nSampling: {CHAINS} chains at once, width {width}, depth {depth}\n{table(chains)}")
    return rows + speeds + chains


def limits(side: int) -> list[dict]:
    """What the machine can do: plain products in each precision, and a copy that is larger than its caches."""
    operands = {str(dtype): torch.randn(side, side, device=machine.device()).to(dtype) for dtype in precisions()}
    seconds = fastest({name: lambda a=a: a @ a for name, a in operands.items()}, 3)
    rows = [{"what": name.removeprefix("torch."), "GFLOP/s": 2 * side**3 / best / 1e9} for name, best in seconds.items()]
    source = torch.ones(256 * side**2 // 16, dtype=torch.uint8, device=machine.device())  # 64 MB for a side of 2048
    target = torch.empty_like(source)
    best = fastest({"copy": lambda: target.copy_(source)}, 1)["copy"]
    return [*rows, {"what": "copy", "GB/s": 2 * source.numel() / best / 1e9}]  # read and written


def precisions() -> list[torch.dtype]:
    """float32, and bfloat16 unless this device does without it (Apple's runs float32 here)."""
    return [torch.float32] + ([torch.bfloat16] if machine.device().type != "mps" else [])


def training(width: int, depth: int, batch: int, budget: float, compiled: bool) -> list[dict]:
    """A row for each precision, eager and compiled: GFLOP/s of the step, of its products alone, and the ratio."""
    rows = []
    for dtype in precisions():
        work, products = product_work(width, depth, batch, dtype)
        steps = {"eager": training_step(width, depth, batch, dtype, False)}
        if compiled:
            steps["compiled"] = training_step(width, depth, batch, dtype, True)
            try:
                steps["compiled"]()
            except Exception as error:  # no C++ compiler, most often
                print(f"torch.compile does not work here: {str(error).strip().splitlines()[0][:100]}")
                del steps["compiled"]
        seconds = fastest({"products": products} | steps, budget)
        for name in steps:
            rows.append({
                "precision": str(dtype).removeprefix("torch."), "step": name, "seconds": seconds[name],
                "GFLOP/s": work / seconds[name] / 1e9, "its products alone": work / seconds["products"] / 1e9,
                "ratio": f"{seconds['products'] / seconds[name]:.0%}",
            })
    return rows


def product_work(width: int, depth: int, batch: int, dtype: torch.dtype) -> tuple[int, Callable]:
    """The matrix products of one training step, and nothing else: (floating-point operations, a function that does them).

    Each product y = x w has two in the backward pass, dx = dy w^T and dw = x^T dy, of the same size.
    """
    tokens, heads = batch * SIDE**2, width // HEAD
    shapes = [(1, tokens, width, wide) for wide in (3 * width, width, 4 * width)] + [(1, tokens, 4 * width, width)]
    shapes += [(batch * heads, SIDE**2, HEAD, SIDE**2), (batch * heads, SIDE**2, SIDE**2, HEAD)]  # q k^T, and weights times v

    def random(*shape: int) -> Tensor:
        matrices = torch.randn(shape, device=machine.device()).to(dtype)
        return matrices[0] if len(matrices) == 1 else matrices

    operands = [(random(n, rows, inner), random(n, inner, wide), random(n, rows, wide)) for n, rows, inner, wide in shapes]

    def products() -> None:
        for _ in range(depth):
            for x, w, dy in operands:
                x @ w, dy @ w.mT, x.mT @ dy

    return 6 * depth * sum(n * rows * inner * wide for n, rows, inner, wide in shapes), products


def training_step(width: int, depth: int, batch: int, dtype: torch.dtype, compiled: bool) -> Callable:
    """A function that does one forward and backward pass, without a condition and without the optimizer."""
    transformer = Transformer(width, depth, width // HEAD, condition=False).to(machine.device())
    run = torch.compile(transformer) if compiled else transformer
    x = torch.randn(batch, SIDE**2, width, device=machine.device(), requires_grad=True)
    angles = rotary_angles(grid_positions(SIDE, SIDE), HEAD).to(machine.device())

    def step() -> None:
        with machine.autocast(dtype):
            loss = run(x, angles).square().mean()
        loss.backward()
        transformer.zero_grad()
        x.grad = None

    return step


@torch.no_grad()
def sampling(width: int, depth: int, lengths: tuple[int, ...], budget: float) -> list[dict]:
    """A row for each length: seconds for the chains with and without the cache, and what their last token costs.

    Not every step is taken: the cost of a step is measured at a few lengths of the past and summed up between them.
    """
    dtype, capacity = machine.precision(), max(lengths)
    transformer = Transformer(width, depth, width // HEAD, condition=False).to(machine.device()).eval()
    angles = rotary_angles(torch.arange(capacity, device=machine.device())[:, None], HEAD)
    past = torch.randn(CHAINS, capacity, width, device=machine.device())
    cache = Cache(transformer, CHAINS, capacity, dtype)

    def with_cache(position: int) -> None:
        for layer in cache.layers:
            layer.length = position
        transformer(past[:, :1], angles[position : position + 1], cache=cache)

    def without(position: int) -> None:
        transformer(past[:, : position + 1], angles[: position + 1], causal=True)

    positions = sorted({round(share * length) - 1 for length in lengths for share in (0.25, 0.5, 0.75, 1)} | {0})
    steps = {(run, at): lambda run=run, at=at: run(at) for at in positions for run in (with_cache, without)}
    with machine.autocast(dtype):
        seconds = fastest(steps, budget)
    rows = []
    for length in lengths:
        at = [position for position in positions if position < length]
        chain = {run: torch.trapezoid(torch.tensor([seconds[run, i] for i in at]), torch.tensor(at)).item() + seconds[run, 0]
                 for run in (with_cache, without)}
        rows.append({
            "tokens": length, "cached, s": chain[with_cache], "uncached, s": chain[without],
            "times faster": chain[without] / chain[with_cache], "ms for the last token": 1000 * seconds[with_cache, length - 1],
        })
    return rows


def fastest(functions: dict, budget: float) -> dict:
    """The least seconds that each function takes: called in turn, at least three times, until `budget` seconds are over."""
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()  # warm up
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < budget:
        rounds += 1
        for name, function in functions.items():
            machine.synchronize()
            begin = time.perf_counter()
            function()
            machine.synchronize()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best
