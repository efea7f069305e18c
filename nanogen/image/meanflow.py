"""MeanFlow: a picture in one step, by learning the average velocity instead of the velocity.

    flow       v(x_t, t)       the velocity now. It changes on the way, so a sample takes many small steps
    meanflow   u(x_t, t, r)    the average velocity from t to r >= t. One step gets there: x_r = x_t + (r - t) u

The average is an integral along a path, (r - t) u = integral of v from t to r, and walking paths in training would cost
as much as it saves. But let t move along the path while r stays (time runs from t=0, noise, to t=1, data):

    d/dt [(r - t) u] = -v         the way that is left shrinks by what is walked
    -u + (r - t) du/dt = -v       product rule
    u = v + (r - t) du/dt         with du/dt = v . grad_x u + d_t u, the change of u along the path

The right side, computed with the network as it is and held fixed, is the target of the left. For r = t it is flow
matching, and v may again be data - noise of a single line, since the target is linear in v: the mean is learned.
du/dt is a Jacobian-vector product: one pass in forward mode that carries every number's slope in the direction (v, 1)
along. Only the share `jumps` of a batch has r > t, and only that share pays for it: on a CPU it costs four to six passes.

    python -m nanogen train meanflow --data cifar10 --minutes 12

Source: Geng et al. 2025, "Mean Flows for One-step Generative Modeling", whose time runs from data to noise.
Different from the paper: a U-Net on pixels; the weight of the loss uses the mean squared error, not the sum; slow time
waves (`SLOW`); guidance without their mixing of the network's conditional answer into the target.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogen.blocks.flow_matching import expand, guided, logit_normal_times
from nanogen.blocks.transformer import ConditionEmbedding, TimeEmbedding, drop_labels
from nanogen.blocks.unet import UNet, check_fit

Average = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # u: (x (B, ...), t (B,), r (B,), labels (B,)) -> (B, ...)
SLOW = 0.05  # times are embedded as SLOW t: waves of up to 1000 rad would have slopes of 1000, and du/dt would be noise


@dataclass
class Config:
    jumps: float = 0.25  # share of the batch with r > t; the rest is flow matching
    power: float = 1.0  # p in the weight 1 / (error + 0.001)^p of each picture's loss; 0: plain squared error
    time_mean: float = 0.4  # mean of the logit-normal times before the sigmoid: above 0, nearer the data
    guidance: float = 2.0  # trained in, so that a guided picture costs one pass; 1: none
    widths: tuple[int, ...] = (64, 128, 128)  # channels at 1/2, 1/4, 1/8 of the size
    blocks: int = 1  # residual blocks per level
    attention_at: int = 1  # coarsest levels with self-attention
    width: int = 256  # size of the condition vector
    label_dropout: float = 0.1  # share of training pictures whose label is hidden, for guidance
    size: int = 32  # side of the pictures in pixels
    classes: int = 10  # number of labels


def average_times(count: int, jumps: int, mean: float = 0.0, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """t <= r, the smaller and the larger of two logit-normal draws: (count,) each. After the first `jumps`, r = t."""
    draws = logit_normal_times(2 * count, device, mean).view(2, count)
    t, r = draws.amin(0), draws.amax(0)
    r[jumps:] = t[jumps:]
    return t, r


@torch.no_grad()
def change_along_path(network: Average, x: Tensor, v: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> Tensor:
    """du/dt = v . grad_x u + d_t u, for a fixed r: shaped like x (B, ...). In float32.

    A wrapper such as DistributedDataParallel averages gradients by hooks, which `torch.func.jvp` skips; lab/train.py
    averages them by itself.
    """
    # In float32: under autocast, forward mode mixes types. And the fused attention kernels have no forward mode.
    with torch.autocast(x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda x, t: network(x, t, r, labels), (x, t), (v, torch.ones_like(t)))[1]


def meanflow_loss(
    network: Average, x1: Tensor, labels: Tensor, jumps: float = 0.25, power: float = 1.0, time_mean: float = 0.4,
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of data x1: (B, ...) with labels (B,) -> (scalar, squared error of each (B,), how far each jumps, r - t (B,)).

    guide: turns (x_t, t, v) into the velocity to learn instead of v. Examples must come in random order: the first jump.
    With power 1 every sample weighs alike, however wrong it is, so the scalar hardly moves in training: watch the errors. And
    what is learned is no longer quite the mean but nearer the likely: in the plane, samples crowd at the modes.
    """
    count = math.ceil(jumps * len(x1))
    t, r = average_times(len(x1), count, time_mean, x1.device)
    x0 = torch.randn_like(x1)
    x_t = torch.lerp(x0, x1, expand(t, x1))
    u = network(x_t, t, r, labels)
    v = x1 - x0 if guide is None else guide(x_t, t, x1 - x0)
    target = v.clone()
    if count:
        change = change_along_path(network, x_t[:count], v[:count], t[:count], r[:count], labels[:count])
        target[:count] += expand((r - t)[:count], x1) * change
    error = (u - target).square().flatten(1).mean(1)
    weight = (error.detach() + 1e-3) ** -power
    return (weight * error).mean(), error.detach(), r - t


@torch.no_grad()
def jump(network: Average, x0: Tensor, labels: Tensor, steps: int = 1) -> list[Tensor]:
    """From noise x0 (B, ...) at t=0 to data at t=1 in equal steps, one pass each: all steps + 1 states."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    times = torch.linspace(0, 1, steps + 1, device=x0.device)
    states = [x0]
    for t, r in zip(times[:-1], times[1:], strict=True):
        states.append(states[-1] + (r - t) * network(states[-1], t.expand(len(x0)), r.expand(len(x0)), labels))
    return states


class MeanFlow(nn.Module):
    """A network that predicts the average velocity from t to r at (x_t, t, r, label)."""

    def __init__(self, config: Config):
        super().__init__()
        rules = {
            "jumps": (0 <= config.jumps <= 1, "from 0 to 1"), "power": (config.power >= 0, "at least 0"),
            "guidance": (config.guidance >= 0, "at least 0"), "width": (config.width >= 1, "at least 1"),
        }
        for name, (good, wanted) in rules.items():
            if not good:
                raise ValueError(f"{name} must be {wanted}, got {getattr(config, name)!r}")
        check_fit(config.size, config.widths)
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
        """batch: "labels" (B,) and "images" (B, 3, H, W) in [-1, 1]. Also logs the squared errors with r = t and r > t."""
        config = self.config
        labels = drop_labels(batch["labels"], config.classes, config.label_dropout)

        def guide(x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
            return self.guided_velocity(x_t, t, v, labels)

        loss, error, distance = meanflow_loss(
            self, batch["images"], labels, config.jumps, config.power, config.time_mean, guide)
        jumps = distance > 0
        numbers = {"error_flow": (error * ~jumps).sum() / (~jumps).sum().clamp(min=1),
                   "error_jump": (error * jumps).sum() / jumps.sum().clamp(min=1)}
        return loss, numbers

    @torch.no_grad()
    def guided_velocity(self, x_t: Tensor, t: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        """The velocity of the guided flow, v_uncond + g (v - v_uncond), the first being the network's own u(x_t, t, t).
        Where the label is hidden it is v: what is learned there is the unguided flow."""
        if self.config.guidance == 1:
            return v
        hidden = labels == self.config.classes
        uncond = self(x_t, t, t, torch.full_like(labels, self.config.classes))
        return torch.where(expand(hidden, v), v, guided(v, uncond, self.config.guidance))

    @torch.no_grad()
    def sample(self, labels: Tensor, steps: int | None = None, guidance: float = 1.0, temperature: float = 1.0, seed: int = 0,
               frames: bool = False):
        """Pictures of these labels (B,): (B, 3, H, W) in [-1, 1]; with `frames`, also a list of the pictures on the way.

        steps: passes of the network, 1 unless told; temperature scales the starting noise. guidance is trained in: 1, or the
        value of the training by name, draws with that one; any other raises ValueError.
        """
        if guidance not in (1, self.config.guidance):
            raise ValueError(f"guidance {self.config.guidance:g} is trained in and cannot become {guidance:g} afterwards: "
                             f"leave it out, or train with --guidance {guidance:g}")
        generator = torch.Generator(labels.device).manual_seed(seed)
        shape = (len(labels), 3, self.config.size, self.config.size)
        noise = temperature * torch.randn(shape, generator=generator, device=labels.device)
        states = [x.clamp(-1, 1) for x in jump(self, noise, labels, 1 if steps is None else steps)]
        return (states[-1], states) if frames else states[-1]


def for_forward_mode(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The forward mode of a group norm (torch 2.13) refuses the channels-last layout, in which training runs. Only passes
    without gradient are in forward mode, so the others are spared the copy."""
    return inputs if torch.is_grad_enabled() else (inputs[0].contiguous(),)


Model = MeanFlow
