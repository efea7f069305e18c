"""Pixel AR: the simplest chain. An image is a list of values from 0 to 255; predict the next one.

    p(image) = product over pixels, row by row, of
               p(red | past) p(green | past, red) p(blue | past, red, green)

Every factor is a choice among 256 values, so the likelihood is exact. In bits per dimension it says
how many bits a perfect compressor with this model would need for each value: compare it with PNG.
The Transformer walks from pixel to pixel; three small heads then chain the colours of one pixel.
Training and sampling take the same order, and every image trains all of its positions; but there
the past is real, never drawn. Sampling is slow: one pass per pixel, and a chain that grows with the
area. So the next method has tokens.

    python -m nanogen train pixel_ar --data cifar10      # 4.38 bits/dim

Sources: van den Oord et al. 2016, "PixelRNN" (256-way choices, colours in turn); Chen et al. 2020,
"iGPT" (a Transformer). Different here: the colours are chained in the heads: the chain is 3 times
shorter; every pixel also sees its four neighbours; similar values have similar features.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks import transformer
from nanogen.blocks.neighbours import raster_neighbours
from nanogen.blocks.sampling import apply_guidance, draw, with_and_without
from nanogen.blocks.transformer import CodeEmbedding, ConditionEmbedding, drop_labels
from nanogen.image import check_transformer
from nanogen.method import Method

FEATURES = 25  # that describe a colour value
OUTSIDE = 256  # the value of all colours beyond the border


@dataclass
class Config:
    width: int = 192  # features per pixel
    depth: int = 4  # blocks
    heads: int = 6  # attention heads
    label_dropout: float = 0.1  # fraction of training images whose label is hidden, for guidance
    size: int = 16  # side of the images in pixels: the chain has size^2 pixels of 3 values
    classes: int = 10  # number of labels

    def __post_init__(self):
        check_transformer(self)


class PixelAR(Method):
    """A causal Transformer over pixels, with three chained heads for red, green and blue."""

    encodes, exact_likelihood, samples_to_judge = True, True, 200

    def __init__(self, config: Config, base: None = None):
        super().__init__()
        self.config, width = config, config.width
        self.inp = nn.Linear(4 * 3 * FEATURES, width)  # four neighbours of three colours
        self.label = ConditionEmbedding(config.classes, width)
        self.transformer = transformer.Transformer(width, config.depth, config.heads)
        self.colours = nn.ModuleList(nn.Linear(FEATURES, width) for _ in range(2))  # red, green
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        codes = value_features(torch.arange(256))[:, :-1]
        self.heads = nn.ModuleList(CodeEmbedding(codes, width, zero=True) for _ in range(3))
        angles = transformer.grid_angles(config.size, config.size, head=width // config.heads)
        self.register_buffer("angles", angles, persistent=False)

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> their values, "pixels" uint8 (B, H W, 3); the labels stay."""
        values = ((batch["images"] + 1) * 127.5).round().byte()
        return {"pixels": values.flatten(2).transpose(1, 2), "labels": batch["labels"]}

    def embed(self, pixels: Tensor, last: bool = False) -> Tensor:
        """Pixels so far, int64 (B, P, 3) -> inputs of positions 0..P, (B, P + 1, width), from the
        colours of their four neighbours. last: of position P alone, (B, 1, width)."""
        seen = raster_neighbours(pixels, self.config.size, OUTSIDE, last)  # (B, P + 1, 4, 3)
        return self.inp(value_features(seen).flatten(2)).float()

    def colour_logits(self, h: Tensor, pixels: Tensor, tables: list | None = None) -> list[Tensor]:
        """h: (B, T, width); pixels: (B, T, up to 3), the colours known so far -> logits of these
        and of the next colour, (B, T, 256) each. tables: the heads' vectors, computed before."""
        tables, logits = tables or [head() for head in self.heads], []
        for i in range(min(pixels.shape[-1] + 1, 3)):
            if i:
                h = h + self.colours[i - 1](value_features(pixels[..., i - 1]))
            logits.append((F.gelu(self.mix[i](h)) @ tables[i].mT).float())
        return logits

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "pixels" uint8 (B, H W, 3), "labels" (B,). Nats per value; chance is log 256."""
        labels = drop_labels(batch["labels"], self.config.classes, self.config.label_dropout)
        likelihood = self.log_likelihood({"pixels": batch["pixels"], "labels": labels})
        nats = -likelihood.mean() / batch["pixels"][0].numel()
        return nats, {"bits_per_dim": nats.detach() / math.log(2)}

    def log_likelihood(self, batch: dict[str, Tensor]) -> Tensor:
        """Exact log p(pixels | label) in nats, (B,), of a batch that `prepare` made."""
        pixels, condition = batch["pixels"].long(), self.label(batch["labels"])
        h = self.embed(pixels[:, :-1])
        h = self.transformer(h, self.angles, causal=True, condition=condition)
        nats = [F.cross_entropy(logits.flatten(0, 1), pixels[..., i].flatten(), reduction="none")
                for i, logits in enumerate(self.colour_logits(h, pixels))]
        return -sum(nats).view(len(pixels), -1).sum(1)

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, guidance: float = 1.0,
               temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, cached: bool = True,
               seed: int = 0, frames: bool = False) -> dict:
        """Images of these "labels" (B,): {"images": (B, 3, H, W) in [-1, 1]}, perhaps "frames".
        Settings: see blocks/sampling.py. cached=False computes the past anew for every pixel."""
        labels, side, count = conditions["labels"], self.config.size, self.config.size**2
        generator = torch.Generator(labels.device).manual_seed(seed)
        pixels = torch.empty(len(labels), 0, 3, dtype=torch.long, device=labels.device)
        labels = with_and_without(labels, self.config.classes, guidance)
        modulation = self.transformer.modulate(self.label(labels))  # the same for all pixels
        tables, images, copies = [head() for head in self.heads], [], len(labels) // len(pixels)
        cache = None if not cached else transformer.Cache(
            self.transformer, len(labels), count, modulation[0].dtype)
        for i in range(count):
            x = self.embed(pixels.repeat(copies, 1, 1), last=cached)
            angles = self.angles[i : i + 1] if cached else self.angles[: i + 1]
            h = self.transformer(x, angles, causal=not cached, modulation=modulation, cache=cache)
            pixel = pixels[:, :0].new_empty(len(pixels), 1, 0)
            for _ in range(3):
                logits = self.colour_logits(h[:, -1:], pixel.repeat(copies, 1, 1), tables)[-1]
                value = draw(apply_guidance(logits, guidance), generator, temperature, top_k, top_p)
                pixel = torch.cat([pixel, value[..., None]], dim=-1)
            pixels = torch.cat([pixels, pixel], dim=1)
            if (frames and (i + 1) % side == 0) or i + 1 == count:  # a frame for each row
                known = F.pad(pixels.float() / 127.5 - 1, (0, 0, 0, count - i - 1))  # the rest grey
                images.append(known.transpose(1, 2).unflatten(2, (side, side)))
        return {"images": images[-1]} | ({"frames": images} if frames else {})


def value_features(values: Tensor) -> Tensor:
    """Values 0..255 or OUTSIDE, (...) -> (..., FEATURES): cosines of the brightness, from coarse to
    fine, so that similar values have similar features; and a mark for OUTSIDE."""
    outside = (values == OUTSIDE)[..., None]
    frequencies = torch.arange(1, FEATURES, device=values.device) * (math.pi / 256)
    waves = torch.cos((values[..., None] + 0.5) * frequencies)
    return torch.cat([waves.masked_fill(outside, 0.0), outside.float()], dim=-1)


Model = PixelAR
