"""MeanFlow: an image in one step, by learning the average velocity instead of the velocity.

    flow       v(x_t, t)      the velocity now. It changes on the way: a sample takes many steps
    meanflow   u(x_t, t, r)   the average velocity from t to r >= t: x_r = x_t + (r - t) u

(r - t) u is the integral of v along the path from t to r. To integrate in training would be
expensive. So differentiate it along the path, with r fixed (t=0 is noise, t=1 data):

    d/dt [(r - t) u] = -v         what is left of the way shrinks by v
    -u + (r - t) du/dt = -v       product rule
    u = v + (r - t) du/dt         with du/dt = v . grad_x u + d_t u, along the path

The right side, computed by the network itself and held fixed, is the target for u. For r = t this
is flow matching. As there, v is data - noise of a single line: the target is linear in v, so the
mean is learned. du/dt is a Jacobian-vector product: one pass in forward mode, on a CPU as expensive
as four to six, so only a fraction of the batch has r != t. Of these pairs, the smaller and larger
of two logit-normal(0.4, 1) values, 0.0014% have r - t > 0.9; a sample in one step asks for 1.

    python -m nanogen train meanflow --data cifar10

Source: Geng et al. 2025, "Mean Flows for One-step Generative Modeling"; there, time runs from data
to noise, so r <= t. Different here: a U-Net on pixels; the mean squared error, not the sum, in the
weight of the loss; slower times (`SLOW`); no conditional prediction of the network in the target.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogen.blocks.flow_matching import expand, logit_normal_times
from nanogen.blocks.sampling import guided
from nanogen.blocks.transformer import ConditionEmbedding, TimeEmbedding, drop_labels
from nanogen.blocks.unet import UNet, check_fit
from nanogen.method import Method, check

Average = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # u(x (B, ...), t, r, labels (B,))
SLOW = 0.05  # t is embedded as SLOW t: waves of 1,000 rad per unit would make du/dt noisy


@dataclass
class Config:
    interval_fraction: float = 0.25  # fraction of the batch with r != t; the rest is flow matching
    power: float = 1.0  # p in the weight 1 / (error + 0.001)^p of an image's loss; 0: equal weights
    time_mean: float = 0.4  # mean of the logit-normal times before the sigmoid: > 0 is nearer data
    guidance: float = 2.0  # trained in, so that a guided image costs one pass; 1: none
    widths: tuple[int, ...] = (64, 128, 128)  # channels at 1/2, 1/4, 1/8 of the size
    blocks: int = 1  # residual blocks per level
    attention_at: int = 1  # coarsest levels with self-attention
    width: int = 256  # size of the condition vector
    label_dropout: float = 0.1  # fraction of training images whose label is hidden, for guidance
    size: int = 32  # side of the images in pixels
    classes: int = 10  # number of labels

    def __post_init__(self):
        check(self, interval_fraction=(0 <= self.interval_fraction <= 1, "from 0 to 1"),
              power=(self.power >= 0, "at least 0"), guidance=(self.guidance >= 0, "at least 0"),
              width=(self.width >= 1, "at least 1"))
        check_fit(self.size, self.widths)


def draw_times(count: int, intervals: int, mean: float = 0.0, device=None) -> tuple[Tensor, Tensor]:
    """t <= r, two sorted logit-normal draws: (count,) each. After the first `intervals`, r = t."""
    t, r = logit_normal_times(2 * count, device, mean).view(2, count).sort(dim=0).values
    r[intervals:] = t[intervals:]
    return t, r


@torch.no_grad()
def change_along_path(u: Average, x: Tensor, v: Tensor, t: Tensor, r: Tensor,
                      labels: Tensor) -> Tensor:
    """The total derivative du/dt = v . grad_x u + d_t u at a fixed r: float32, the shape of x."""
    # Float32: under autocast, forward mode mixes types. MATH: fused attention has no forward mode.
    with torch.autocast(x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda x, t: u(x, t, r, labels), (x, t), (v, torch.ones_like(t)))[1]


def meanflow_loss(u: Average, x1: Tensor, labels: Tensor, interval_fraction: float = 0.25,
                  power: float = 1.0, time_mean: float = 0.4,
                  guide: Callable | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Data x1 (B, ...), labels (B,) -> (weighted loss, a scalar; squared errors (B,); r - t (B,)).
    guide: turns (x_t, t, v) into the velocity to learn. power=1 divides each error by its own size:
    large errors do not dominate the gradient, and the loss stays near 1, so watch the errors. It
    also moves what is learned from the mean of v towards its likely values, the modes."""
    intervals = math.ceil(interval_fraction * len(x1))  # so many examples, the first, get r != t
    t, r = draw_times(len(x1), intervals, time_mean, x1.device)
    x0 = torch.randn_like(x1)
    x_t = torch.lerp(x0, x1, expand(t, x1))
    predicted = u(x_t, t, r, labels)
    v = x1 - x0 if guide is None else guide(x_t, t, x1 - x0)
    target = v.clone()
    if intervals:
        some = slice(intervals)
        change = change_along_path(u, x_t[some], v[some], t[some], r[some], labels[some])
        target[some] += expand((r - t)[some], x1) * change
    error = (predicted - target).square().flatten(1).mean(1)
    return (error * (error.detach() + 1e-3) ** -power).mean(), error.detach(), r - t


@torch.no_grad()
def follow_average(u: Average, x0: Tensor, labels: Tensor, steps: int = 1) -> list[Tensor]:
    """x_r = x_t + (r - t) u from noise x0 (B, ...) at t=0 to data at t=1: all steps + 1 states."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    times = torch.linspace(0, 1, steps + 1, device=x0.device)
    states = [x0]
    for t, r in zip(times[:-1], times[1:], strict=True):
        average = u(states[-1], t.expand(len(x0)), r.expand(len(x0)), labels)
        states.append(states[-1] + (r - t) * average)
    return states


class MeanFlow(Method):
    """A network that predicts the average velocity from t to r at (x_t, t, r, label)."""

    def __init__(self, config: Config, base: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.condition = ConditionEmbedding(config.classes, config.width, time=True)
        self.interval = TimeEmbedding(config.width)  # of r - t
        self.network = UNet(3, config.widths, config.blocks, config.attention_at, config.width)
        for module in self.network.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(for_forward_mode)

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> Tensor:
        """x_t: (B, 3, H, W), t <= r: (B,), labels: (B,) -> average velocity, the shape of x_t."""
        return self.network(x_t, self.condition(labels, SLOW * t) + self.interval(SLOW * (r - t)))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "labels" (B,), "images" (B, 3, H, W). Logs the errors for r = t and for r != t."""
        config = self.config
        labels = drop_labels(batch["labels"], config.classes, config.label_dropout)
        loss, error, length = meanflow_loss(
            self, batch["images"], labels, config.interval_fraction, config.power,
            config.time_mean, lambda x_t, t, v: self.guided_velocity(x_t, t, v, labels))
        parts = {"error_flow": length == 0, "error_interval": length > 0}
        return loss, {k: (error * at).sum() / at.sum().clamp(min=1) for k, at in parts.items()}

    @torch.no_grad()
    def guided_velocity(self, x_t: Tensor, t: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        """The velocity of the guided flow, uncond + g (v - uncond), where uncond is the network's
        own u(x_t, t, t) for the null class. Where the label is hidden, v: the unguided flow."""
        if self.config.guidance == 1:
            return v
        hidden = labels == self.config.classes
        uncond = self(x_t, t, t, torch.full_like(labels, self.config.classes))
        return torch.where(expand(hidden, v), v, guided(v, uncond, self.config.guidance))

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, steps: int = 1, guidance: float = 1.0,
               temperature: float = 1.0, seed: int = 0, frames: bool = False) -> dict:
        """"labels" (B,) -> "images" (B, 3, H, W) in [-1, 1]; "frames": those after each step.
        steps: evaluations of the network; temperature scales the starting noise; guidance: 1 or
        the one that is trained in, which draw the same, else ValueError."""
        trained, labels = self.config.guidance, conditions["labels"]
        if guidance not in (1, trained):
            raise ValueError(f"guidance {trained:g} is trained in and cannot become {guidance:g}")
        rng = torch.Generator(labels.device).manual_seed(seed)
        shape = len(labels), 3, self.config.size, self.config.size
        noise = temperature * torch.randn(shape, generator=rng, device=rng.device)
        states = [x.clamp(-1, 1) for x in follow_average(self, noise, labels, steps)]
        return {"images": states[-1]} | ({"frames": states} if frames else {})


def for_forward_mode(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Group norm has no forward mode in the channels-last layout (torch 2.13). So in passes without
    gradients, such as that of du/dt, its input is copied to the usual layout."""
    return inputs if torch.is_grad_enabled() else (inputs[0].contiguous(),)


Model = MeanFlow
