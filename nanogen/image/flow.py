"""Flow matching: a velocity field that carries noise to images along straight lines.

    x_t = (1 - t) noise + t data    a straight line from noise (t = 0) to data (t = 1)
    dx_t / dt = data - noise        its velocity, which the network predicts from x_t and t
    sample: start from noise, follow the predicted velocity from t = 0 to t = 1

Losses and solvers are in blocks/flow_matching.py. network="unet" is a small U-Net on pixels, "dit"
a Transformer on the latents of a KL tokenizer (as in Stable Diffusion 3 and Flux).

objective="ddpm" is the older method: predict the noise, on a curved path. objective="reflow"
straightens a finished flow, the teacher. Lines between random pairs of noise and data cross, so the
teacher's paths bend; but these paths never cross. So a student that starts as a copy of the teacher
and learns straight lines between the *ends* of the teacher's paths, drawn with guidance, needs
fewer steps.

Training should draw the times that the sampler asks for (`times`; t=0 is noise, t=1 data):

    objective  training draws t from     P(t < 0.05)  its sampler asks for
    flow       logit-normal(0, 1), as SD3     0.16%  0, 1/16 ... 15/16 (midpoint, 8 steps)
    ddpm       uniform, as DDPM                  5%  0, 1/25 ... 24/25 (25 steps)
    reflow     U-shaped (Lee et al. 2024)      9.4%  0, 1/4, 1/2, 3/4 (euler, 4 steps)

Flow's ends are rare, because they are easy: at t=0 the answer is (mean of the data) - x_t. DDPM
divides its first answers by 0.01, so they must be good. heun also asks for t=1, as rare as t=0, and
euler goes a whole step by its answer at t=0: for these solvers, uniform times may be better.

    python -m nanogen train flow --data cifar10

Sources: those in blocks/flow_matching.py; Peebles & Xie 2023 (DiT).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanogen.blocks import flow_matching as fm
from nanogen.blocks import transformer
from nanogen.blocks.standardize import Standardizer
from nanogen.blocks.transformer import ConditionEmbedding, Transformer, drop_labels, grid_angles
from nanogen.blocks.unet import UNet, check_fit
from nanogen.image import check_transformer
from nanogen.method import Method, Requirement, check, check_numbers, choose, unused

TIMES = {"logit-normal": fm.logit_normal_times, "uniform": fm.uniform_times,
         "u-shaped": fm.u_shaped_times}
AUTO_TIMES = {"flow": "logit-normal", "ddpm": "uniform", "reflow": "u-shaped"}  # by objective


@dataclass
class Config:
    network: str = "unet"  # unet (on pixels) or dit (on latents)
    objective: str = "flow"  # flow, ddpm, or reflow (unet only; requires a finished flow)
    times: str = "auto"  # how training draws t: logit-normal, uniform, u-shaped; auto: see above
    widths: tuple[int, ...] = (64, 128, 128)  # unet: channels at 1/2, 1/4, 1/8 of the size
    blocks: int = 1  # unet: residual blocks per level
    attention_at: int = 1  # unet: coarsest levels with self-attention
    width: int = 256  # size of the condition vector; dit: features per token
    depth: int = 6  # dit: blocks
    heads: int = 4  # dit: attention heads
    reflow_pairs: int = 4000  # reflow: pairs of noise and image that the teacher draws
    reflow_steps: int = 8  # reflow: midpoint steps of the teacher from a noise to its image
    reflow_guidance: float = 3.0  # reflow: guidance of the teacher (a recipe may always set it)
    label_dropout: float = 0.1  # fraction of training images whose label is hidden, for guidance
    size: int = 32  # side of the images in pixels
    classes: int = 10  # number of labels

    def __post_init__(self):
        choose(self, network=("unet", "dit"), objective=("flow", "ddpm", "reflow"),
               times=("auto", *TIMES))
        check_numbers(self, attention_at=(self.attention_at >= 0, "at least 0"))
        if self.network == "unet":
            unused(self, "depth", "heads", when="with network unet")
            check_fit(self.size, self.widths)
        else:
            unused(self, "widths", "blocks", "attention_at", when="with network dit")
            check_transformer(self)
        if self.objective != "reflow":
            return unused(self, "reflow_pairs", "reflow_steps", when="without objective reflow")
        unused(self, "label_dropout", when="with objective reflow")
        check(self, network=(self.network == "unet", "unet with objective reflow"))


class Flow(Method):
    """A network that predicts the velocity (or, for ddpm, the noise) at (x_t, t, label)."""

    def __init__(self, config: Config, base: nn.Module | None = None):
        """base: the KL tokenizer of a dit; for reflow the teacher, a Flow with the same network."""
        super().__init__()
        reflow, latent = config.objective == "reflow", config.network == "dit"
        self.config, self.encodes = config, reflow or latent
        self.examples = config.reflow_pairs if reflow else None
        self.condition = ConditionEmbedding(config.classes, config.width, time=True)
        if latent:
            self.freeze(tokenizer=base)
            self.shape = (base.config.channels, base.grid, base.grid)
            self.network = LatentTransformer(self.shape, config.width, config.depth, config.heads)
            self.latents = Standardizer(base.config.channels, trailing=2)
        else:
            self.shape = (3, config.size, config.size)
            self.network = UNet(3, config.widths, config.blocks, config.attention_at, config.width)
        if reflow:
            self.freeze(teacher=base)  # only training needs it
            if base is not None:
                self.load_state_dict(base.state_dict())

    @staticmethod
    def requires(config: Config) -> Requirement | None:
        if config.network == "dit":
            return Requirement("tokenizer", {"bottleneck": "kl", "size": config.size})
        if config.objective == "reflow":  # the student starts with the weights of its teacher
            net = ("network", "widths", "blocks", "attention_at", "width", "size")
            fields = {"objective": "flow"} | {name: getattr(config, name) for name in net}
            return Requirement("flow", fields, training_only=True)

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """dit: "images" (B, 3, H, W) -> "latents" (B, C, h, w). reflow: for each of the "labels"
        (B,), "noise" and the teacher's image "x1", float16 (B, 3, H, W). The labels stay."""
        labels = batch["labels"]
        if self.config.network == "dit":
            return {"latents": self.tokenizer.encode(batch["images"]), "labels": labels}
        noise = torch.randn(len(labels), *self.shape, device=labels.device)
        field = fm.guide(self.teacher, labels, self.config.classes, self.config.reflow_guidance)
        x1 = fm.solve(field, noise, self.config.reflow_steps, "midpoint")
        return {"noise": noise.half(), "x1": x1.half(), "labels": labels}

    def measure(self, data: dict[str, Tensor]) -> None:
        if self.config.network == "dit":
            self.latents.measure(data["latents"])  # the network sees them as N(0, 1)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x_t: (B, C, h, w), t: (B,), labels: (B,) -> velocity or noise, the shape of x_t."""
        return self.network(x_t, self.condition(labels, t))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Mean squared error. batch: "labels" (B,) and "images" (B, 3, H, W), or as prepared."""
        config, noise, labels = self.config, None, batch["labels"]
        if config.objective == "reflow":  # no hidden labels: guidance is in the pairs already
            x1, noise = batch["x1"].float(), batch["noise"].float()
        else:
            labels = drop_labels(labels, config.classes, config.label_dropout)
            x1 = batch["images"] if config.network == "unet" else self.latents(batch["latents"])
        objective = fm.diffusion_loss if config.objective == "ddpm" else fm.flow_loss
        times = AUTO_TIMES[config.objective] if config.times == "auto" else config.times
        loss, each, t = objective(lambda x_t, t: self(x_t, t, labels), x1, TIMES[times], noise)
        thirds = fm.loss_by_time(each, t, 3).nan_to_num()  # 0 where no t fell
        return loss, dict(zip(("loss_noise", "loss_middle", "loss_data"), thirds, strict=True))

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, steps: int | None = None,
               method: str | None = None, guidance: float = 1.0, temperature: float = 1.0,
               known: Tensor | None = None, seed: int = 0, frames: bool = False) -> dict:
        """"labels" (B,) -> "images" (B, 3, H, W) in [-1, 1]; "frames": the noise, then after each
        step.
        method, steps: of the solver. Defaults: midpoint (or heun, euler), 8 steps of 2
        evaluations; for reflow euler, 4 steps; for ddpm ddim (or ddpm), 25 steps. temperature
        scales the starting noise. known: images that stay, NaN where to draw. Reflow draws with its
        teacher's guidance: 1 means it, too; ValueError for another."""
        config, labels = self.config, conditions["labels"]
        reflow, ddpm = config.objective == "reflow", config.objective == "ddpm"
        if reflow and guidance not in (1, config.reflow_guidance):
            raise ValueError(f"guidance {config.reflow_guidance:g} is trained in and cannot become "
                             f"{guidance:g}: leave it out, or train with another reflow_guidance")
        field = fm.guide(self, labels, config.classes, 1.0 if reflow else guidance)
        if steps is None:
            steps = {"ddpm": 25, "reflow": 4}.get(config.objective, 8)
        method = method or {"ddpm": "ddim", "reflow": "euler"}.get(config.objective, "midpoint")
        rng = torch.Generator(labels.device).manual_seed(seed)
        x0 = temperature * torch.randn(len(labels), *self.shape, generator=rng, device=rng.device)
        if known is not None:
            if (config.network, config.objective) != ("unet", "flow"):
                raise ValueError("only a flow on pixels keeps a part of an image: network unet, "
                                 "objective flow")
            field = pinned(field, known, x0)
        if ddpm:
            clip = 1.0 if config.network == "unet" else None
            states = fm.solve_diffusion(field, x0, steps, method, clip, frames=True, generator=rng)
        else:
            states = fm.solve(field, x0, steps, method, frames=True)
        images = [self.to_images(x) for x in (states if frames else states[-1:])]
        return {"images": images[-1]} | ({"frames": images} if frames else {})

    def known_part(self, images: Tensor, seen: Tensor) -> Tensor:
        """See `Method.known_part`: images (B, 3, H, W), NaN where they are to be drawn."""
        return torch.where(seen, images, torch.nan)

    def to_images(self, x: Tensor) -> Tensor:
        """The end of a path -> images in [-1, 1]: pixels are clipped, latents decoded."""
        pixels = self.config.network == "unet"
        return x.clamp(-1, 1) if pixels else self.tokenizer.decode(self.latents.inverse(x))


def pinned(velocity: fm.Network, known: Tensor, x0: Tensor) -> fm.Network:
    """The velocity field, but what is known (B, C, H, W), where not NaN, goes on a straight line
    from its noise x0: so the network sees it at the right noise level, and it arrives unchanged
    (as RePaint does for diffusion: Lugmayr et al. 2022)."""
    return lambda x, t: torch.where(known.isnan(), velocity(x, t), known - x0)


class LatentTransformer(nn.Module):
    """DiT on a grid of latents, each cell a token: (B, C, h, w), a condition (B, width) -> same."""

    def __init__(self, shape: tuple[int, int, int], width: int, depth: int, heads: int):
        super().__init__()
        channels, *grid = shape
        self.inp = nn.Conv2d(channels, width, 3, padding=1)  # 3x3: each token sees its neighbours
        self.transformer = Transformer(width, depth, heads)
        self.out = transformer.zeroed(nn.Linear(width, channels), adamw=True)
        self.register_buffer("angles", grid_angles(*grid, head=width // heads), persistent=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        tokens = self.inp(x).flatten(2).transpose(1, 2)  # (B, h w, width)
        tokens = self.transformer(tokens, self.angles, condition=condition)
        return self.out(tokens).transpose(1, 2).view_as(x).float()


Model = Flow
