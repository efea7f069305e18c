"""Flow matching: a velocity field that carries noise to pictures along straight lines.

    x_t = (1 - t) noise + t data        a straight line from noise (t = 0) to data (t = 1)
    dx_t / dt = data - noise            its velocity: what the network learns to predict from x_t and t
    sample: start from noise, walk along the predicted velocity from t = 0 to t = 1

That is the whole method (blocks/flow_matching.py has it in ten lines). Two networks, as in the history of Stable Diffusion:

    unet   a small convolutional U-Net on pixels       (versions 1 and 2, there on latents)
    dit    a Transformer on the latents of a KL tokenizer (version 3, Flux)

and, on the same network, the objective that came before (objective="ddpm": predict the noise on a curved path), so that
"straighter, so fewer steps" can be measured.

    python -m nanogen train flow --data cifar10 --minutes 12

Reflow (objective="reflow") straightens a finished flow, its teacher. Lines between noise and data drawn at random cross, and
where they cross the mean velocity bends. The teacher's paths never cross, so a student that starts as the teacher and learns
the straight lines between the *ends* of its paths meets few crossings: fewer steps do. The teacher's guidance is in the pairs.

Sources: Lipman et al. 2023 and Liu et al. 2022 (the objective; the latter also reflow); Esser et al. 2024 (logit-normal times,
Stable Diffusion 3); Peebles & Xie 2023 (DiT); Ho et al. 2020, Nichol & Dhariwal 2021 (DDPM, cosine schedule); Song et al. 2021
(DDIM sampling).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanogen.blocks.flow_matching import (
    diffusion_loss,
    flow_loss,
    guide,
    logit_normal_times,
    loss_by_time,
    solve,
    solve_diffusion,
    uniform_times,
)
from nanogen.blocks.transformer import ConditionEmbedding, Transformer, drop_labels, grid_positions, rotary_angles
from nanogen.blocks.unet import UNet, check_fit


@dataclass
class Config:
    network: str = "unet"  # unet (on pixels) or dit (on latents)
    objective: str = "flow"  # flow, ddpm, or reflow (unet only, stands on a finished flow)
    times: str = "logit-normal"  # how training times are drawn: logit-normal or uniform
    widths: tuple[int, ...] = (64, 128, 128)  # unet: channels at 1/2, 1/4, 1/8 of the size
    blocks: int = 1  # unet: residual blocks per level
    attention_at: int = 1  # unet: coarsest levels with self-attention
    width: int = 256  # size of the condition vector; dit: features per token
    depth: int = 6  # dit: blocks
    heads: int = 4  # dit: attention heads
    reflow_pairs: int = 4000  # reflow: pairs of noise and picture that the teacher draws
    reflow_steps: int = 8  # reflow: midpoint steps of the teacher from a noise to its picture
    reflow_guidance: float = 3.0  # reflow: guidance of the teacher
    label_dropout: float = 0.1  # share of training pictures whose label is hidden, for guidance
    size: int = 32  # side of the pictures in pixels
    classes: int = 10  # number of labels


def stands_on(config: Config) -> tuple[str, dict] | None:
    """The chapter underneath and what it must be, as fields of its Config; None: there is none."""
    if config.objective == "reflow":
        same = {name: getattr(config, name) for name in ("widths", "blocks", "attention_at", "width")}  # it starts as its teacher
        return "flow", {"objective": "flow", "network": "unet"} | same
    return ("tokenizer", {"bottleneck": "kl"}) if config.network == "dit" else None


class Flow(nn.Module):
    """A network that predicts the velocity (or, for ddpm, the noise) at (x_t, t, label)."""

    def __init__(self, config: Config, base: nn.Module | None = None):
        """base: the KL tokenizer of a dit, or the teacher of a reflow, another Flow with the same network."""
        super().__init__()
        choices = {"network": ("unet", "dit"), "objective": ("flow", "ddpm", "reflow"), "times": ("logit-normal", "uniform")}
        for name, allowed in choices.items():
            if getattr(config, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
        if config.width < 1:
            raise ValueError(f"width must be at least 1, got {config.width}")
        if config.objective == "reflow" and (config.network != "unet" or base is None):
            raise ValueError("reflow needs network unet and a finished flow to start from")
        if config.network == "dit" and base is None:
            raise ValueError("a dit needs a KL tokenizer to stand on")
        self.config = config
        reflow = config.objective == "reflow"
        self.teacher, self.tokenizer = ([base], []) if reflow else ([], [base])  # in lists: frozen, not in the saved weights
        self.condition = ConditionEmbedding(config.classes, config.width, time=True)
        if config.network == "unet":
            check_fit(config.size, config.widths)
            self.shape = (3, config.size, config.size)
            self.network = UNet(3, config.widths, config.blocks, config.attention_at, config.width)
        else:
            self.shape = (base.config.channels, base.grid, base.grid)
            self.network = LatentTransformer(self.shape, config.width, config.depth, config.heads)
        self.register_buffer("latent_mean", torch.zeros(self.shape[0], 1, 1))
        self.register_buffer("latent_std", torch.ones(self.shape[0], 1, 1))
        if reflow:
            self.load_state_dict(base.state_dict())

    def measure(self, latents: Tensor) -> None:
        """Remember mean and std of each channel of some latents (N, C, h, w): the network sees them as N(0, 1)."""
        self.latent_mean.copy_(latents.mean((0, 2, 3), keepdim=True)[0])
        self.latent_std.copy_(latents.std((0, 2, 3), keepdim=True)[0])

    def prepare(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What `loss` wants, made once before training from a batch of pictures (B, 3, H, W) and labels (B,).

        dit: the pictures' latents. reflow: noise, and where the teacher carries it under these labels, as float16; of the
        pictures only the number counts.
        """
        if self.config.objective == "reflow":
            noise = torch.randn(images.shape, device=images.device)
            field = guide(self.teacher[0], labels, self.config.classes, self.config.reflow_guidance)
            x1 = solve(field, noise, self.config.reflow_steps, "midpoint")
            return {"noise": noise.half(), "x1": x1.half(), "labels": labels}
        return {"latents": self.tokenizer[0].encode(images), "labels": labels}

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x_t: (B, C, h, w), t: (B,), labels: (B,) -> velocity or noise, the shape of x_t."""
        return self.network(x_t, self.condition(labels, t))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "labels" (B,) and "images" (B, 3, H, W) in [-1, 1], or "latents" (B, C, h, w), or for a reflow "x1" and
        "noise" (B, 3, H, W). Mean squared error."""
        noise, labels = None, batch["labels"]
        if self.config.objective == "reflow":  # no hidden labels: guidance is in the pairs already
            x1, noise = batch["x1"].float(), batch["noise"].float()
        else:
            labels = drop_labels(labels, self.config.classes, self.config.label_dropout)
            x1 = batch["images"] if "images" in batch else (batch["latents"] - self.latent_mean) / self.latent_std
        objective = diffusion_loss if self.config.objective == "ddpm" else flow_loss
        times = logit_normal_times if self.config.times == "logit-normal" else uniform_times
        loss, each, t = objective(lambda x_t, t: self(x_t, t, labels), x1, times, noise)
        thirds = loss_by_time(each, t, 3).nan_to_num()  # near the noise, in the middle, near the data; 0 where no t fell
        return loss, dict(zip(("loss_noise", "loss_middle", "loss_data"), thirds, strict=True))

    @torch.no_grad()
    def sample(self, labels: Tensor, steps: int | None = None, guidance: float = 1.0, temperature: float = 1.0, seed: int = 0,
               frames: bool = False, method: str | None = None):
        """Pictures of these labels (B,): (B, 3, H, W) in [-1, 1]; with `frames`, also a list of the pictures on the way.

        steps, method: of the solver. Flow and reflow: 8 steps of midpoint unless told, two evaluations each; or euler, heun.
        ddpm: 25 steps of ddim unless told, one evaluation each; or ddpm.
        temperature scales the starting noise. A reflow has learned its teacher's guidance: 1, or reflow_guidance by name, draws
        with that one; any other raises ValueError.
        """
        if self.config.objective == "reflow":
            trained = self.config.reflow_guidance
            if guidance not in (1, trained):
                raise ValueError(f"guidance {trained:g} is trained in and cannot become {guidance:g} afterwards: "
                                 f"leave it out, or train with --reflow_guidance {guidance:g}")
            guidance = 1.0
        generator = torch.Generator(labels.device).manual_seed(seed)
        noise = temperature * torch.randn(len(labels), *self.shape, generator=generator, device=labels.device)
        field = guide(self, labels, self.config.classes, guidance)
        if self.config.objective == "ddpm":
            clip = 1.0 if self.config.network == "unet" else None
            states = solve_diffusion(field, noise, steps or 25, method or "ddim", clip=clip, frames=True, generator=generator)
        else:
            states = solve(field, noise, steps or 8, method or "midpoint", frames=True)
        images = self.to_pictures(states[-1])
        return (images, [self.to_pictures(x) for x in states]) if frames else images

    def to_pictures(self, x: Tensor) -> Tensor:
        """What the flow moves -> pictures in [-1, 1]: pixels as they are, latents through the decoder."""
        if self.config.network == "unet":
            return x.clamp(-1, 1)
        return self.tokenizer[0].decode(x * self.latent_std + self.latent_mean)


class LatentTransformer(nn.Module):
    """DiT on a grid of latents: every cell is a token. (B, C, h, w) and a condition (B, width) -> (B, C, h, w)."""

    def __init__(self, shape: tuple[int, int, int], width: int, depth: int, heads: int):
        super().__init__()
        channels, height, breadth = shape
        self.inp = nn.Conv2d(channels, width, 3, padding=1)  # 3x3, not 1x1: each token hears of its neighbours
        self.transformer = Transformer(width, depth, heads)
        self.out = nn.Linear(width, channels)
        self.out.adamw = True
        nn.init.zeros_(self.out.weight)
        self.register_buffer("angles", rotary_angles(grid_positions(height, breadth), width // heads), persistent=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        tokens = self.inp(x).flatten(2).transpose(1, 2)  # (B, h w, width)
        tokens = self.transformer(tokens, self.angles, condition=condition)
        return self.out(tokens).transpose(1, 2).view_as(x).float()


Model = Flow
