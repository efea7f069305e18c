"""Flow matching: learn a velocity field that carries noise to data along straight paths.

The idea, in four lines. Time runs from t=0 (noise) to t=1 (data), here and everywhere in nanogen.

    x_t = (1-t) x_0 + t x_1                 a straight line from noise x_0 ~ N(0, I) to a datum x_1
    dx_t/dt = x_1 - x_0                     its velocity
    loss = |net(x_t, t) - (x_1 - x_0)|^2    many lines cross at x_t: the network learns their mean velocity
    x <- x + net(x, t) dt                   following the mean from noise ends in new data, distributed alike

Lines cross, mean velocities do not, so the paths that come out are bent. How much is measured by `curvature`,
and it decides how many steps a sample takes. The rival on the same network is at the end: the DDPM objective
(predict the noise, on a variance-preserving path with the cosine schedule). Which bends more depends on the
data. Towards one point, flow is a straight line and diffusion a quarter wave; so it is in every direction in
which data hardly vary, and pictures have many of them. Where data vary as much as the noise does, diffusion
stands still while flow shrinks and swells again. The objective alone straightens nothing; reflow does.

A network is any function net(x_t, t) with x_t (B, ...), t (B,) in [0, 1] and a result shaped like x_t. Cost is
counted in network evaluations: steps times EVALUATIONS[method], and twice that under guidance.

Sources: Lipman et al. 2023, "Flow Matching"; Liu et al. 2022, "Rectified Flow" (straightness; reflow); Esser
et al. 2024, "Stable Diffusion 3" (logit-normal t, resolution shift); Ho and Salimans 2022 (guidance); Chen et
al. 2018, "Neural ODEs" and Grathwohl et al. 2019, "FFJORD" (likelihood); Ho et al. 2020, "DDPM"; Nichol and
Dhariwal 2021, "Improved DDPM" (cosine schedule); Song et al. 2021, "DDIM".
Different here: SD3 and the DDPM family let time run from data to noise, so their formulas appear with 1-t.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, ...), t (B,)) -> (B, ...)
TimeSampler = Callable[[int, torch.device], Tensor]  # how many, where -> (B,) in [0, 1]
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2}  # of the network, a step


# --- Training: which times, which loss


def uniform_times(count: int, device: torch.device | None = None) -> Tensor:
    """Times from U(0, 1): (count,)."""
    return torch.rand(count, device=device)


def logit_normal_times(
    count: int, device: torch.device | None = None, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Tensor:
    """sigmoid(mean + std N(0, 1)), then `shift_time`: (count,). SD3's choice: near t=0 and t=1 there is
    little to learn (the mean of the data, that of the noise), so look at the middle. mean > 0 looks nearer the data."""
    return shift_time(torch.sigmoid(mean + std * torch.randn(count, device=device)), shift)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """The resolution shift t / (t + shift (1-t)): monotone, 0 and 1 stay, shift > 1 dwells nearer the noise.

    In a larger picture the same noise is averaged over more pixels and hides less, so at equal t it is the
    easier one. SD3 derives shift = sqrt(pixels / pixels for which the schedule was tuned); its formula for
    the noise level 1-t, shift (1-t) / (1 + (shift-1) (1-t)), is this one. Raises ValueError for shift <= 0.
    """
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    return t / (t + shift * (1 - t))


def expand(t: Tensor, x: Tensor) -> Tensor:
    """t: (B,) -> (B, 1, ..., 1), to multiply x: (B, ...)."""
    return t.view(-1, *[1] * (x.dim() - 1))


def flow_loss(
    velocity: Network, x1: Tensor, times: TimeSampler = uniform_times, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The flow matching loss of data x1: (B, ...) -> (its mean, that of each sample (B,), the times t (B,)).

    Log the loss by t (`loss_by_time`): the mean alone hides which part is learned. It never reaches 0, since
    several lines cross at x_t. noise: the x_0 of each x1; if it is the one that *led* to x1, this is reflow.
    """
    t = times(len(x1), x1.device)
    x0 = torch.randn_like(x1) if noise is None else noise
    x_t = (1 - expand(t, x1)) * x0 + expand(t, x1) * x1
    each = (velocity(x_t, t).float() - (x1 - x0)).square().flatten(1).mean(1)
    return each.mean(), each, t


def loss_by_time(each: Tensor, t: Tensor, bins: int = 10) -> Tensor:
    """Mean loss in equal bins of time: each (B,), t (B,) -> (bins,), NaN where no t fell."""
    index = (t * bins).long().clamp(max=bins - 1)
    total = torch.zeros(bins, device=t.device).index_add_(0, index, each.detach().float())
    return total / torch.bincount(index, minlength=bins)


# --- Sampling: solve dx/dt = velocity(x, t)


@torch.no_grad()
def solve(
    velocity: Network,
    x0: Tensor,
    steps: int,
    method: str = "euler",
    t0: float = 0.0,
    t1: float = 1.0,
    shift: float = 1.0,
    frames: bool = False,
) -> Tensor:
    """Carry x0: (B, ...) from time t0 to t1 in `steps` steps, at steps * EVALUATIONS[method] evaluations.

    euler: along the velocity at the start of the step, error O(1/steps). midpoint: along that in the middle;
    heun: along the mean of start and end; both O(1/steps^2), at twice the price. t0=1, t1=0 leads from data
    to noise. shift: places the steps by `shift_time`, as in training. Returns (B, ...), or with `frames` all
    states: (steps + 1, B, ...). Raises ValueError for an unknown method or steps < 1.
    """
    if method not in EVALUATIONS:
        raise ValueError(f"method must be one of {', '.join(EVALUATIONS)}, got {method!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    grid = shift_time(torch.linspace(t0, t1, steps + 1, dtype=torch.float64), shift).tolist()

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


def guided(cond: Tensor, uncond: Tensor, g: float) -> Tensor:
    """Classifier-free guidance: uncond + g (cond - uncond). g=0 ignores the condition, g=1 is conditional,
    more exaggerates what the condition changes: clearer samples, less variety."""
    return uncond + g * (cond - uncond)


def guide(model: Callable[..., Tensor], condition: Tensor, null: int | Tensor, g: float) -> Network:
    """A network of (x, t) from model(x, t, condition). g=1 costs one pass, any other one of twice the batch.

    condition: (B, ...), class labels or anything with the batch first; null: what stands for "no condition",
    a label or a tensor that expands to (B, ...).
    """
    nothing = torch.as_tensor(null, dtype=condition.dtype, device=condition.device).expand_as(condition)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if g == 1:
            return model(x, t, condition)
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, nothing]))
        return guided(*both.chunk(2), g)

    return velocity


# --- Likelihood and straightness


def log_likelihood(
    velocity: Network, x1: Tensor, steps: int, exact: bool = True, method: str = "heun", seed: int = 0
) -> Tensor:
    """log p(x1) in nats of each sample of x1: (B, ...) -> (B,), under the flow from N(0, I).

    The density thins out as the flow spreads: d log p(x_t)/dt = -div v(x_t, t) along a path (Chen et al.). So
    walk from x_1 back to x_0: log p(x_1) = log N(x_0; 0, I) - integral of div v. If `exact`, the divergence
    sum_i dv_i/dx_i takes one backward pass a dimension; else it is Hutchinson's e.(dv/dx)e with one probe e
    of random signs for the whole path (from `seed`): one pass, and right on average. The samples of a batch
    must not see each other. Divide by -D log 2 for bits per dimension.
    """
    shape, size = x1.shape, x1[0].numel()
    probe = torch.randint(0, 2, (len(x1), size), generator=torch.Generator().manual_seed(seed))
    probe = (2 * probe - 1).to(x1)

    def both(state: Tensor, t: Tensor) -> Tensor:  # (B, D+1): x and the integral travel together
        with torch.enable_grad():
            x = state[:, :-1].detach().requires_grad_()
            v = velocity(x.reshape(shape), t).flatten(1)
            if exact:
                rows = (torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0] for i in range(size))
                divergence = sum(row[:, i] for i, row in enumerate(rows))
            else:
                divergence = (torch.autograd.grad((v * probe).sum(), x)[0] * probe).sum(1)
        return torch.cat([v.detach(), divergence[:, None]], dim=1)

    start = torch.cat([x1.flatten(1), x1.new_zeros(len(x1), 1)], dim=1)
    end = solve(both, start, steps, method, t0=1.0, t1=0.0)
    x0, integral = end[:, :-1], -end[:, -1]  # the walk ran backwards, so it summed up minus the integral
    return -0.5 * (x0.square() + math.log(2 * math.pi)).sum(1) - integral


def frames_curvature(frames: Tensor) -> Tensor:
    """How bent paths are: frames (steps + 1, B, ...) at equal steps of time -> scalar.

    The mean of |v_t - (x_1 - x_0)|^2 over time and samples, Liu et al.'s straightness, divided by that of
    |v_t|^2, with v_t from the frames themselves: the share of the motion that does not lead straight to the
    end. 0: one Euler step is exact. 1: the path comes back to where it began.
    """
    v = (frames[1:] - frames[:-1]) * (len(frames) - 1)
    chord = frames[-1] - frames[0]
    return (v - chord).square().mean() / v.square().mean()


def curvature(velocity: Network, x0: Tensor, steps: int = 100) -> Tensor:
    """`frames_curvature` of the paths from x0: (B, ...), by `steps` Euler steps."""
    return frames_curvature(solve(velocity, x0, steps, frames=True))


# --- Fields known in closed form, for tests and pictures


def posterior_mean(x: Tensor, points: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """E[x_1 | x_t = x] where x_t = signal x_1 + noise e, and x_1 is any of `points` (N, ...) alike.
    x: (B, ...); signal, noise: (B,) -> (B, ...). A softmax of distances: attention of x to the data set."""
    flat, data = x.flatten(1), points.flatten(1).to(x)
    gap = (flat[:, None] - signal[:, None, None] * data).square().sum(-1)  # (B, N)
    weight = torch.softmax(-gap / (2 * noise[:, None].square()), dim=1)
    return (weight @ data).view_as(x)


def oracle_velocity_points(points: Tensor) -> Network:
    """The velocity that flow matching would learn from the finite data set `points` (N, ...), if it learned
    perfectly: (E[x_1 | x_t] - x_t) / (1-t). It carries every noise to a datum: a perfect fit memorises.
    At t=1 it is singular, and Heun, which looks there, stops half a step short; Euler and midpoint do not."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        left = (1 - t).clamp(min=1e-4)
        return (posterior_mean(x, points, 1 - left, left) - x) / expand(left, x)

    return velocity


def oracle_noise_points(points: Tensor) -> Network:
    """The noise that `diffusion_loss` would learn to predict from the finite data set `points` (N, ...)."""

    def noise(x: Tensor, t: Tensor) -> Tensor:
        signal, spread = alpha_bar(t).sqrt(), (1 - alpha_bar(t)).sqrt().clamp(min=1e-4)
        return (x - expand(signal, x) * posterior_mean(x, points, signal, spread)) / expand(spread, x)

    return noise


def gaussian_velocity(mean: float | Tensor, std: float | Tensor) -> Network:
    """The exact velocity for data N(mean, std^2), independent in each dimension; both fit one sample.

    x_t ~ N(t mean, s^2) with s^2 = (1-t)^2 + t^2 std^2, and paths keep their place in it:
    x_t = t mean + s x_0. So v = mean + (s'/s) (x - t mean). The paths end in x_1 = mean + std x_0.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = expand(t, x)
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


def toy(name: str, count: int, seed: int = 0) -> Tensor:
    """Points in the plane, two or three units wide: (count, 2). Raises ValueError for an unknown name."""
    generator = torch.Generator().manual_seed(seed)
    u, noise = torch.rand(count, 2, generator=generator), torch.randn(count, 2, generator=generator)
    if name == "two modes":
        return torch.stack([2.0 * (u[:, 0] < 0.5) - 1, torch.zeros(count)], dim=1) + 0.05 * noise
    if name == "eight gaussians":
        angle = (8 * u[:, 0]).floor() * math.pi / 4
        return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.1 * noise
    if name == "moons":
        angle, side = math.pi * u[:, 0], 2.0 * (u[:, 1] < 0.5) - 1  # two half circles, one turned over
        return torch.stack([side * (angle.cos() - 0.5), side * (angle.sin() - 0.25)], dim=1) + 0.05 * noise
    if name == "checkerboard":  # 4 x 4 squares in [-1, 1]^2, every other one filled
        column = (4 * u[:, 0]).floor()
        row = 2 * torch.randint(0, 2, (count,), generator=generator) + column % 2
        return torch.stack([2 * u[:, 0] - 1, (row + u[:, 1]) / 2 - 1], dim=1)
    raise ValueError(f"name must be two modes, eight gaussians, moons or checkerboard, got {name!r}")


# --- The rival: diffusion, with the same network and the same direction of time


def alpha_bar(t: Tensor) -> Tensor:
    """The signal's share of the variance in x_t = sqrt(alpha_bar) x_1 + sqrt(1 - alpha_bar) e: from about 0
    at t=0 (noise) to 1 at t=1 (data). The cosine schedule of Nichol and Dhariwal, their time being 1-t.

    It ends at 1e-4, not 0, since x_1 is found by dividing by its root (they clip beta at 0.999 for that).
    """
    offset = 0.008  # theirs: keeps the last steps before the data from being too small

    cosine = torch.cos((1 - t + offset) / (1 + offset) * math.pi / 2)
    at_data = math.cos(offset / (1 + offset) * math.pi / 2)
    return 1e-4 + (1 - 1e-4) * (cosine / at_data).square().clamp(max=1)  # rounding must not lead beyond 1


def diffusion_loss(
    network: Network, x1: Tensor, times: TimeSampler = uniform_times, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """DDPM's loss: predict the noise. x1: (B, ...) -> (mean, each sample's (B,), t (B,)) like flow_loss."""
    t = times(len(x1), x1.device)
    noise = torch.randn_like(x1) if noise is None else noise
    signal = expand(alpha_bar(t), x1)
    x_t = signal.sqrt() * x1 + (1 - signal).sqrt() * noise
    each = (network(x_t, t).float() - noise).square().flatten(1).mean(1)
    return each.mean(), each, t


@torch.no_grad()
def solve_diffusion(
    network: Network,
    x0: Tensor,
    steps: int,
    method: str = "ddim",
    clip: float | None = None,
    frames: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Carry noise x0: (B, ...) to data with a network that predicts noise, one evaluation a step.

    Each step guesses the datum, x_1 = (x - sqrt(1-a) e) / sqrt(a), and goes back to the next, smaller noise
    level: with the same noise e ("ddim": deterministic, an ODE solver), or with part of it drawn anew
    ("ddpm": ancestral sampling with the posterior variance; needs many steps). clip: keeps the guess in
    [-clip, clip], 1 for pictures: near t=0 it is the network's error times 100. Returns (B, ...), or with
    `frames` (steps + 1, B, ...). Raises ValueError for an unknown method or steps < 1.
    """
    if method not in ("ddim", "ddpm"):
        raise ValueError(f"method must be ddim or ddpm, got {method!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    shares = alpha_bar(grid).tolist()
    x, states = x0, [x0]
    for now, a, b in zip(grid.tolist(), shares[:-1], shares[1:], strict=False):
        e = network(x, torch.full((len(x),), now, dtype=x.dtype, device=x.device))
        x1 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
        if clip is not None:
            x1 = x1.clamp(-clip, clip)
            e = (x - math.sqrt(a) * x1) / math.sqrt(1 - a)  # the noise that goes with the clipped guess
        fresh = (1 - b) / (1 - a) * (1 - a / b) if method == "ddpm" else 0.0  # variance to draw anew
        x = math.sqrt(b) * x1 + math.sqrt(max(1 - b - fresh, 0.0)) * e
        if fresh > 0:
            new = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x = x + math.sqrt(fresh) * new
        if frames:
            states.append(x)
    return torch.stack(states) if frames else x
