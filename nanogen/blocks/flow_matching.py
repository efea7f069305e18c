"""Flow matching: learn a velocity field that carries noise to data along straight paths.

The whole method. Time runs from t=0 (noise) to t=1 (data), here and everywhere in nanogen.

    def loss(network, x1):                               # x1: a batch of data
        x0, t = randn_like(x1), rand(len(x1), 1)         # noise, and a time for each sample
        x_t = (1 - t) * x0 + t * x1                      # a point on the straight line between them
        return (network(x_t, t) - (x1 - x0)).square().mean()      # the velocity of that line

    def sample(network, x, steps):                       # x: noise
        for i in range(steps):
            x = x + network(x, i / steps) / steps        # dx/dt = network(x, t)
        return x                                         # a sample of the data's distribution

Many lines cross at x_t, so the network learns their mean velocity. Paths of mean velocities do not
cross; they bend. The more they bend, the more steps a sample needs (`frames_curvature`). Longer
training does not straighten the paths; reflow does (image/flow.py).

The baseline on the same network comes last: DDPM predicts the noise, on a path of constant variance
with the cosine schedule. In dimensions in which the data hardly vary, flow's paths are straight and
DDPM's are curved; images have many of these. Where they vary like the noise, DDPM's are straighter.

Sources: Lipman et al. 2023, "Flow Matching"; Liu et al. 2022, "Rectified Flow" (straightness,
reflow); Esser et al. 2024, "Stable Diffusion 3" (logit-normal t); Lee et al. 2024, "Improving the
Training of Rectified Flows" (U-shaped t); Ho et al. 2020, "DDPM"; Nichol & Dhariwal 2021 (cosine
schedule); Song et al. 2021, "DDIM".
Different here: in SD3 and DDPM time runs from data to noise, so their formulas appear with 1-t.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nanogen.blocks.sampling import apply_guidance, with_and_without

Network = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, ...), t (B,)) -> (B, ...)
TimeSampler = Callable[[int, torch.device], Tensor]  # (B, device) -> (B,) in [0, 1]
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2}  # solver -> network evaluations per step


def uniform_times(count: int, device: torch.device | None = None) -> Tensor:
    """Times from U(0, 1): (count,)."""
    return torch.rand(count, device=device)


def logit_normal_times(count: int, device: torch.device | None = None, mean: float = 0.0,
                       std: float = 1.0) -> Tensor:
    """sigmoid(mean + std N(0, 1)): (count,), as in SD3. Times near 0 and 1 are rare, since there is
    little to learn: the means of data and noise. mean > 0: more times near the data."""
    return torch.sigmoid(mean + std * torch.randn(count, device=device))


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times closer to the noise at 0, for data that noise hides less. If n pixels or frames show
    the same, the noise of their mean is sqrt(n) times smaller. With shift = sqrt(n), their mean has
    the ratio of signal to noise that a single one has at t (SD3, eq. 23, where t=1 is noise). The
    logit of t becomes smaller by log(shift)."""
    return t / (t + shift * (1 - t))


def u_shaped_times(count: int, device: torch.device | None = None) -> Tensor:
    """Times of density cosh(4 (t - 1/2)), up to a factor: (count,). Many are near 0 and 1, where a
    straightened flow has its largest errors and is asked most (Lee et al. 2024, a = 4)."""
    u = 2 * torch.rand(count, device=device) - 1
    return 0.5 + torch.asinh(math.sinh(2) * u) / 4  # the inverse of the cumulative probability


def flow_loss(velocity: Network, x1: Tensor, times: TimeSampler = uniform_times,
              noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Flow matching on data x1: (B, ...) -> (mean loss, loss of each sample (B,), times t (B,)).
    The loss never reaches 0, since many lines cross at x_t. noise: the x_0 of each x1, drawn unless
    given; with the noise from which a flow made x1, this is the loss of reflow."""
    t = times(len(x1), x1.device)
    x0 = torch.randn_like(x1) if noise is None else noise
    x_t = (1 - expand(t, x1)) * x0 + expand(t, x1) * x1
    each = (velocity(x_t, t).float() - (x1 - x0)).square().flatten(1).mean(1)
    return each.mean(), each, t


def expand(t: Tensor, x: Tensor) -> Tensor:
    """t: (B,) -> (B, 1, ..., 1), to multiply x: (B, ...)."""
    return t.view(-1, *[1] * (x.dim() - 1))


def loss_by_time(each: Tensor, t: Tensor, bins: int = 10) -> Tensor:
    """Mean loss in equal bins of time: each (B,), t (B,) -> (bins,), NaN where no t fell."""
    index = (t * bins).long().clamp(max=bins - 1)
    total = torch.zeros(bins, device=t.device).index_add_(0, index, each.detach().float())
    return total / torch.bincount(index, minlength=bins)


# ---- sampling: solve dx/dt = velocity(x, t)

@torch.no_grad()
def solve(velocity: Network, x0: Tensor, steps: int, method: str = "euler", t0: float = 0.0,
          t1: float = 1.0, frames: bool = False, shift: float = 1.0) -> Tensor:
    """Carry x0: (B, ...) from time t0 to t1 in `steps` equal steps; t0=1, t1=0: from data to noise.
    shift > 1: smaller steps near the noise (see `shifted`).
    euler follows the velocity at the start of the step, with an error of O(1/steps). midpoint takes
    the velocity in the middle, heun the mean of those at start and end: O(1/steps^2), twice the
    cost. Returns (B, ...), or with `frames` all states: (steps + 1, B, ...)."""
    check_solver(steps, method, *EVALUATIONS)
    grid = shifted(torch.linspace(t0, t1, steps + 1, dtype=torch.float64), shift).tolist()

    def slope(x: Tensor, t: float) -> Tensor:
        return velocity(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))

    x, states = x0, [x0]
    for now, then in zip(grid[:-1], grid[1:], strict=True):
        step = then - now
        v = slope(x, now)
        if method == "midpoint":
            v = slope(x + step / 2 * v, now + step / 2)
        elif method == "heun":
            v = (v + slope(x + step * v, then)) / 2
        x = x + step * v
        if frames:
            states.append(x)
    return torch.stack(states) if frames else x


def check_solver(steps: int, method: str, *methods: str) -> None:
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def guide(model: Callable[..., Tensor], condition: Tensor, null: int | Tensor, g: float) -> Network:
    """Classifier-free guidance: without + g (with - without the condition), a network (x, t) from a
    model(x, t, condition). It runs the model on twice the batch, unless g is 1.
    condition: (B, ...), such as labels; null: see `with_and_without`."""
    conditions, passes = with_and_without(condition, null, g), 1 if g == 1 else 2

    def network(x: Tensor, t: Tensor) -> Tensor:
        outputs = model(torch.cat([x] * passes), torch.cat([t] * passes), conditions)
        return apply_guidance(outputs, g)

    return network


def frames_curvature(frames: Tensor) -> Tensor:
    """How much paths bend: frames (steps + 1, B, ...) at equal steps of time -> scalar. The
    mean of |v_t - (x_1 - x_0)|^2 over time and samples (Liu et al.'s straightness), divided by the
    mean of |v_t|^2. 0: the paths are straight, one Euler step is exact. 1: they return."""
    v = (frames[1:] - frames[:-1]) * (len(frames) - 1)
    return (v - (frames[-1] - frames[0])).square().mean() / v.square().mean()


def log_likelihood(velocity: Network, x1: Tensor, steps: int, exact: bool = True,
                   seed: int = 0) -> Tensor:
    """log p(x1) in nats of data x1: (B, ...) -> (B,), under the flow from N(0, I).

    Where a flow spreads, the density falls: d log p(x_t)/dt = -div v(x_t, t) along a path (Chen et
    al. 2018, "Neural ODEs"). So follow the path back to x_0 by midpoint steps, and add up div v on
    the way. exact: div v = sum_i dv_i/dx_i, by a backward pass for each of the D dimensions; else
    Hutchinson's estimate e.(dv/dx)e with random signs e (Grathwohl et al. 2019, "FFJORD"): one
    pass, right on average. For images of 8 bits, add uniform noise of one level to x1 and subtract
    D log(127.5) from the result: the density of values from 0 to 256."""
    rng = torch.Generator().manual_seed(seed)
    signs = (2 * torch.randint(0, 2, (len(x1), x1[0].numel()), generator=rng) - 1).to(x1)

    def both(state: Tensor, t: Tensor) -> Tensor:  # (B, D + 1): the velocity, and div v beside it
        with torch.enable_grad():
            x = state[:, :-1].detach().requires_grad_()
            v = velocity(x.view(x1.shape), t).flatten(1)
            if exact:
                divergence = sum(torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i]
                                 for i in range(signs.shape[1]))
            else:
                divergence = (torch.autograd.grad((v * signs).sum(), x)[0] * signs).sum(1)
        return torch.cat([v.detach(), divergence[:, None]], dim=1)

    start = torch.cat([x1.flatten(1), x1.new_zeros(len(x1), 1)], dim=1)
    end = solve(both, start, steps, "midpoint", t0=1.0, t1=0.0)
    x0, integral = end[:, :-1], -end[:, -1]  # solved backwards in time, hence the minus
    return -0.5 * (x0.square() + math.log(2 * math.pi)).sum(1) - integral


# ---- the baseline: diffusion, with the same network and the same direction of time

def alpha_bar(t: Tensor) -> Tensor:
    """The data's fraction of the variance in x_t = sqrt(alpha_bar) x_1 + sqrt(1 - alpha_bar) e,
    with noise e, by the cosine schedule: 1 at t=1 (data). At t=0 (noise) it is 1e-4, not 0, because
    samplers divide by its root (the paper clips beta instead)."""
    offset = 0.008  # of the paper: keeps the last steps before the data from being too small
    cosine = torch.cos((1 - t + offset) / (1 + offset) * math.pi / 2)
    at_data = math.cos(offset / (1 + offset) * math.pi / 2)
    return 1e-4 + (1 - 1e-4) * (cosine / at_data).square().clamp(max=1)  # 1 in spite of rounding


def diffusion_loss(network: Network, x1: Tensor, times: TimeSampler = uniform_times,
                   noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """DDPM's loss, for a network that predicts the noise. Shapes as in `flow_loss`."""
    t = times(len(x1), x1.device)
    noise = torch.randn_like(x1) if noise is None else noise
    signal = expand(alpha_bar(t), x1)
    x_t = signal.sqrt() * x1 + (1 - signal).sqrt() * noise
    each = (network(x_t, t).float() - noise).square().flatten(1).mean(1)
    return each.mean(), each, t


@torch.no_grad()
def solve_diffusion(network: Network, x0: Tensor, steps: int, method: str = "ddim",
                    clip: float | None = None, frames: bool = False,
                    generator: torch.Generator | None = None) -> Tensor:
    """Carry noise x0: (B, ...) to data with a network that predicts noise, one evaluation a step.
    Each step estimates the datum, x_1 = (x - sqrt(1-a) e) / sqrt(a), and adds noise of the next,
    lower level. ddim adds the predicted noise e again: nothing is random, it is an ODE solver. ddpm
    draws a part of the noise anew (ancestral sampling with the posterior variance) and needs many
    steps. clip: keeps the estimate in [-clip, clip], 1 for images; near t=0 the network's error
    enters the estimate times 100. Result as in `solve`."""
    check_solver(steps, method, "ddim", "ddpm")
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    signals = alpha_bar(grid).tolist()
    x, states = x0, [x0]
    for now, a, b in zip(grid[:-1].tolist(), signals[:-1], signals[1:], strict=True):
        e = network(x, torch.full((len(x),), now, dtype=x.dtype, device=x.device))
        x1 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
        if clip is not None:
            x1 = x1.clamp(-clip, clip)
            e = (x - math.sqrt(a) * x1) / math.sqrt(1 - a)  # the noise that fits the clipped x_1
        fresh = (1 - b) / (1 - a) * (1 - a / b) if method == "ddpm" else 0.0  # variance drawn anew
        x = math.sqrt(b) * x1 + math.sqrt(max(1 - b - fresh, 0.0)) * e
        if fresh > 0:
            new = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x = x + math.sqrt(fresh) * new
        if frames:
            states.append(x)
    return torch.stack(states) if frames else x
