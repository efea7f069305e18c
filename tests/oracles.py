"""What a test can compare with: fields known in closed form, and toy data in the plane."""

import math

import torch

from nanogen.blocks.flow_matching import alpha_bar, expand


def posterior_mean(x, points, signal, noise):
    """E[x_1 | x_t = x] where x_t = signal x_1 + noise e, and x_1 is any of `points` (N, ...) alike.
    x: (B, ...); signal, noise: (B,) -> (B, ...). A softmax of distances: attention to the data."""
    flat, data = x.flatten(1), points.flatten(1).to(x)
    gap = (flat[:, None] - signal[:, None, None] * data).square().sum(-1)  # (B, N)
    weight = torch.softmax(-gap / (2 * noise[:, None].square()), dim=1)
    return (weight @ data).view_as(x)


def oracle_velocity_points(points):
    """The velocity that flow matching would learn from the finite data set `points` (N, ...), if it
    learned perfectly: (E[x_1 | x_t] - x_t) / (1-t). It carries every noise to a datum.
    At t=1 it is singular, and Heun, which looks there, stops half a step short."""

    def velocity(x, t):
        left = (1 - t).clamp(min=1e-4)
        return (posterior_mean(x, points, 1 - left, left) - x) / expand(left, x)

    return velocity


def oracle_noise_points(points):
    """The noise that `diffusion_loss` would learn to predict from the data `points` (N, ...)."""

    def noise(x, t):
        signal, spread = alpha_bar(t).sqrt(), (1 - alpha_bar(t)).sqrt().clamp(min=1e-4)
        mean = posterior_mean(x, points, signal, spread)
        return (x - expand(signal, x) * mean) / expand(spread, x)

    return noise


def gaussian_velocity(mean, std):
    """The exact velocity for data N(mean, std^2), independent in each dimension.

    x_t ~ N(t mean, s^2) with s^2 = (1-t)^2 + t^2 std^2, and x_t = t mean + s x_0 along a path. So
    v = mean + (s'/s) (x - t mean). The paths end in x_1 = mean + std x_0.
    """

    def velocity(x, t):
        t = expand(t, x)
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


def toy(name, count, seed=0):
    """Points in the plane, two or three units wide: (count, 2)."""
    generator = torch.Generator().manual_seed(seed)
    u, noise = (f(count, 2, generator=generator) for f in (torch.rand, torch.randn))
    if name == "two modes":
        x = 2.0 * (u[:, 0] < 0.5) - 1
        return torch.stack([x, torch.zeros(count)], dim=1) + 0.05 * noise
    if name == "eight gaussians":
        angle = (8 * u[:, 0]).floor() * math.pi / 4
        return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.1 * noise
    raise ValueError(name)


def learn_toy(head, points, steps, lr):
    """Train a generation head on points (N, token_dim) that share one z -> 1,000 draws."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x = points[torch.randint(len(points), (256,))]
        loss = head.loss(x, x.new_ones(len(x), 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.sample(torch.ones(1000, 1), steps=16)
