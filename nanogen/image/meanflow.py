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
mean is learned.

Training draws t <= r, two sorted logit-normal(2, 2) values; a quarter of the batch has r = t. A
sampler of one step asks for t = 0, r = 1, and 0.9% of the pairs have r - t > 0.9. With logit-normal
(0.4, 1) only 0.0014% have, and one step would hardly be trained. FD-nano (README, glossary)
measures the distance from real images: lower is better.

    python -m nanogen train meanflow --data cifar10      # FD-nano 63.6 in one step

Source: Geng et al. 2025, "Mean Flows for One-step Generative Modeling" (times as for its CIFAR-10
model); there, time runs from data to noise, so r <= t. Different here: a U-Net on pixels; the mean
squared error, not the sum, in the weight of the loss; slower times (`SLOW`); the guided target
mixes only the line's v and the prediction without label (the paper may add the one with it). Ours,
with a switch for each:

    difference      du/dt is the change of u over a tenth of the interval: one more pass. The
                    derivative of the paper ("jvp", forward mode) costs four to six on a CPU.
    tangent         the path follows the network's own velocity u(x_t, t, t), which has less noise
                    than a single line: Geng et al. 2025, "Improved Mean Flows".
    interval_start  flow matching alone comes first, since the average velocity is built on it, and
                    its steps are cheaper: Kim et al. 2025, "Understanding, Accelerating, and
                    Improving MeanFlow Training".
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
from nanogen.method import Method, check_numbers, choose

Average = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # u(x (B, ...), t, r, labels (B,))
SLOW = 0.05  # t is embedded as SLOW t: waves of 1,000 rad per unit would make du/dt noisy


@dataclass
class Config:
    interval_fraction: float = 0.75  # fraction of the batch with r != t; the rest is flow matching
    interval_start: float = 0.73  # pairs with r != t come after this fraction of the training
    time_mean: float = 2.0  # mean of the logit-normal times before the sigmoid: > 0 is nearer data
    time_std: float = 2.0  # their standard deviation: a larger one draws more long intervals
    derivative: str = "difference"  # du/dt: difference, or jvp (exact, slow on a CPU)
    difference: float = 0.1  # length of the difference, as a fraction of r - t
    tangent: str = "network"  # direction of the path: network (its own velocity) or line
    power: float = 1.0  # p in the weight 1 / (error + 0.001)^p of an image's loss; 0: equal weights
    guidance: float = 2.0  # trained in, so that a guided image costs one pass; 1: none
    widths: tuple[int, ...] = (64, 128, 128)  # channels at 1/2, 1/4, 1/8 of the size
    blocks: int = 1  # residual blocks per level
    attention_at: int = 1  # coarsest levels with self-attention
    width: int = 256  # size of the condition vector
    label_dropout: float = 0.1  # fraction of training images whose label is hidden, for guidance
    size: int = 32  # side of the images in pixels
    classes: int = 10  # number of labels

    def __post_init__(self):
        choose(self, derivative=("difference", "jvp"), tangent=("network", "line"))
        check_numbers(self, interval_fraction=(0 <= self.interval_fraction <= 1, "from 0 to 1"),
                      interval_start=(0 <= self.interval_start <= 1, "from 0 to 1"),
                      time_mean=(True, "any number"), time_std=(self.time_std > 0, "more than 0"),
                      difference=(0 < self.difference <= 1, "more than 0, at most 1"),
                      attention_at=(self.attention_at >= 0, "at least 0"))
        check_fit(self.size, self.widths)


def draw_times(count: int, intervals: int, mean: float = 2.0, std: float = 2.0,
               device=None) -> tuple[Tensor, Tensor]:
    """t <= r, two sorted logit-normal draws: (count,) each. After the first `intervals`, r is set
    to t, the smaller of the two, as in the paper."""
    t, r = logit_normal_times(2 * count, device, mean, std).view(2, count).sort(dim=0).values
    r[intervals:] = t[intervals:]
    return t, r


@torch.no_grad()
def jvp(u: Average, x: Tensor, v: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> Tensor:
    """The total derivative du/dt = v . grad_x u + d_t u at a fixed r: float32, the shape of x."""
    # Float32: under autocast, forward mode mixes types. MATH: fused attention has no forward mode.
    with torch.autocast(x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda x, t: u(x, t, r, labels), (x, t), (v, torch.ones_like(t)))[1]


@torch.no_grad()
def difference(u: Average, x: Tensor, v: Tensor, t: Tensor, r: Tensor, labels: Tensor, now: Tensor,
               fraction: float) -> Tensor:
    """An approximation of `jvp` by one more pass: the change of u from t to t + h along the path,
    divided by h = fraction (r - t) + 0.0001. now: u(x, t, r). A longer difference has less noise
    and a larger error (Zhang et al. 2025, "AlphaFlow", shorten it during the training)."""
    h = fraction * (r - t) + 1e-4  # never 0
    later = u(x + expand(h, x) * v, t + h, r, labels)
    return (later - now) / expand(h, x)


def meanflow_loss(u: Average, x1: Tensor, labels: Tensor, config: Config, intervals: int,
                  guide: Callable | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Data x1 (B, ...), labels (B,) -> (weighted loss, a scalar; squared errors (B,); r - t (B,)).
    intervals: so many examples, the first, get r != t. guide: turns (x_t, t, v) into the velocity
    to learn. power=1 divides each error by its own size: large errors do not dominate the gradient,
    and the loss stays near 1, so watch the errors. It also moves what is learned from the mean of v
    towards its likely values, the modes."""
    t, r = draw_times(len(x1), intervals, config.time_mean, config.time_std, x1.device)
    x0 = torch.randn_like(x1)
    x_t = torch.lerp(x0, x1, expand(t, x1))
    predicted = u(x_t, t, r, labels)
    target = x1 - x0 if guide is None else guide(x_t, t, x1 - x0)  # right where r = t
    if intervals:
        x, v, t_, r_, labels = (part[:intervals] for part in (x_t, target, t, r, labels))
        if config.tangent == "network":
            with torch.no_grad():
                v = u(x, t_, t_, labels)
        if config.derivative == "jvp":
            change = jvp(u, x, v, t_, r_, labels)
        else:
            now = predicted[:intervals].detach()
            change = difference(u, x, v, t_, r_, labels, now, config.difference)
        target[:intervals] += expand(r_ - t_, x) * change
    error = (predicted - target).square().flatten(1).mean(1)
    return (error * (error.detach() + 1e-3) ** -config.power).mean(), error.detach(), r - t


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
        config, count = self.config, len(batch["images"])
        labels = drop_labels(batch["labels"], config.classes, config.label_dropout)
        begun = self.progress >= config.interval_start or not self.training  # always if held out
        loss, error, length = meanflow_loss(
            self, batch["images"], labels, config,
            math.ceil(config.interval_fraction * count) if begun else 0,
            lambda x_t, t, v: self.guided_velocity(x_t, t, v, labels))
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
        """"labels" (B,) -> "images" (B, 3, H, W) in [-1, 1]; "frames": the noise, then after each
        step. steps: evaluations of the network; temperature scales the starting noise; guidance is
        trained in: 1 means it, too, and another one is a ValueError."""
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
