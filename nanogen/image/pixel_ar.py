"""Pixel AR: the simplest chain. A picture is a list of numbers from 0 to 255; predict the next one.

    p(picture) = product over pixels, row by row, of p(red | past) p(green | past, red) p(blue | past, red, green)

Every factor is a 256-way choice, so the likelihood is exact: in bits per dimension it says how many bits a perfect
compressor built on this model would need for each colour value, and can be compared with PNG. The Transformer walks from pixel
to pixel; three small heads then chain the colours within the pixel. Beautiful and slow: one pass per pixel, and a chain that
grows with the area. That is why the next chapter invents tokens.

    python -m nanogen train pixel_ar --data cifar10 --size 16

Sources: van den Oord et al. 2016 (PixelRNN: 256-way choices, colours in turn); Chen et al. 2020 (iGPT: a Transformer).
Different here: the colours are chained in the heads, so the Transformer's chain is 3 times shorter than one over sub-pixels;
every pixel also sees its four neighbours in the past directly; and 200 is known to lie beside 201, going in and coming out.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.sampling import apply_guidance, draw, with_and_without
from nanogen.blocks.transformer import (
    Cache,
    ConditionEmbedding,
    Transformer,
    WordVectors,
    drop_labels,
    grid_positions,
    rotary_angles,
)

FEATURES = 25  # numbers that describe a colour value


@dataclass
class Config:
    width: int = 192  # features per pixel
    depth: int = 4  # blocks
    heads: int = 6  # attention heads
    label_dropout: float = 0.1  # share of training pictures whose label is hidden, for guidance
    size: int = 16  # side of the pictures in pixels: the chain has size^2 pixels of 3 values
    classes: int = 10  # number of labels


class PixelAR(nn.Module):
    """A causal Transformer over pixels, with three chained heads for red, green and blue."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.inp = nn.Linear(4 * 3 * FEATURES, config.width)  # four neighbours of three colours
        self.label = ConditionEmbedding(config.classes, config.width)
        self.transformer = Transformer(config.width, config.depth, config.heads)
        self.colours = nn.ModuleList(nn.Linear(FEATURES, config.width) for _ in range(2))  # red, green: told to the next heads
        self.mix = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(3))
        codes = value_features(torch.arange(256))[:, :-1]
        self.heads = nn.ModuleList(WordVectors(codes, config.width, zero=True) for _ in range(3))  # at first 8 bits per dimension
        angles = rotary_angles(grid_positions(config.size, config.size), config.width // config.heads)
        self.register_buffer("angles", angles, persistent=False)

    def prepare(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> colour values: "pixels" uint8 (B, H W, 3)."""
        return {"pixels": ((images + 1) * 127.5).round().byte().flatten(2).transpose(1, 2), "labels": labels}

    def embed(self, pixels: Tensor, last: bool = False) -> Tensor:
        """Pixels so far, int64 (B, P, 3) -> inputs of positions 0..P (B, P + 1, width), or of position P alone: the colours
        of the previous pixel, and of those above, above right and above left."""
        past, side = pixels.shape[1], self.config.size
        positions = torch.arange(past if last else 0, past + 1, device=pixels.device)
        column = (positions % side)[:, None]
        padded = F.pad(pixels, (0, 0, side + 1, 0), value=256)  # 256: "outside the picture"
        seen = []
        # How far back each neighbour is, and the column where it does not exist.
        for back, outside in ((1, -1), (side, -1), (side - 1, side - 1), (side + 1, 0)):
            seen.append(torch.where(column == outside, 256, padded[:, positions + side + 1 - back]))
        return self.inp(value_features(torch.cat(seen, dim=-1)).flatten(2)).float()

    def colour_logits(self, h: Tensor, pixels: Tensor, tables: list[Tensor] | None = None) -> list[Tensor]:
        """h: (B, T, width); pixels: (B, T, up to 3), as many colours as known -> logits of those and the next colour.
        tables: of the heads, if a sampler has them already."""
        tables, logits = tables or [head() for head in self.heads], []
        for i in range(min(pixels.shape[-1] + 1, 3)):
            if i:
                h = h + self.colours[i - 1](value_features(pixels[..., i - 1]))
            logits.append((F.gelu(self.mix[i](h)) @ tables[i].mT).float())
        return logits

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "pixels" uint8 (B, H W, 3), "labels" (B,). Nats per colour value; chance is log 256 = 8 bits."""
        labels = drop_labels(batch["labels"], self.config.classes, self.config.label_dropout)
        nats = -self.log_likelihood(batch["pixels"], labels).mean() / batch["pixels"][0].numel()
        return nats, {"bits_per_dim": nats.detach() / math.log(2)}

    def log_likelihood(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Exact log p(pixels | label) in nats: uint8 (B, H W, 3), (B,) -> (B,)."""
        pixels = pixels.long()
        h = self.transformer(self.embed(pixels[:, :-1]), self.angles, causal=True, condition=self.label(labels))
        each = [F.cross_entropy(logits.flatten(0, 1), pixels[..., i].flatten(), reduction="none").view(len(pixels), -1)
                for i, logits in enumerate(self.colour_logits(h, pixels))]
        return -sum(each).sum(1)

    @torch.no_grad()
    def sample(self, labels: Tensor, steps: int | None = None, guidance: float = 1.0, temperature: float = 1.0, seed: int = 0,
               frames: bool = False, top_k: int = 0, top_p: float = 1.0, cached: bool = True):
        """Pictures of these labels (B,): (B, 3, H, W) in [-1, 1]; with `frames`, also a list of the pictures on the way.

        One pass per pixel: `steps` may only say the same. cached=False recomputes the past at every step.
        """
        side, count = self.config.size, self.config.size**2
        if steps not in (None, 0, count):
            raise ValueError(f"pixel_ar takes one step per pixel: steps must be {count}, got {steps}")
        generator = torch.Generator(labels.device).manual_seed(seed)
        batch = len(labels)
        pixels = torch.empty(batch, 0, 3, dtype=torch.long, device=labels.device)
        labels = with_and_without(labels, self.config.classes, guidance)
        modulation, tables = self.transformer.modulate(self.label(labels)), [head() for head in self.heads]  # once for all
        cache = Cache(self.transformer, len(labels), count, modulation.dtype) if cached else None
        pictures = []

        def picture(pixels: Tensor) -> Tensor:
            known = F.pad(pixels.float() / 127.5 - 1, (0, 0, 0, count - pixels.shape[1]))
            return known.transpose(1, 2).reshape(batch, 3, side, side)

        for i in range(count):
            x = self.embed(pixels.repeat(len(labels) // batch, 1, 1), last=cached)
            angles = self.angles[i : i + 1] if cached else self.angles[: i + 1]
            h = self.transformer(x, angles, causal=not cached, modulation=modulation, cache=cache)[:, -1:]
            colour = torch.empty(batch, 1, 0, dtype=torch.long, device=labels.device)
            for _ in range(3):
                logits = self.colour_logits(h, colour.repeat(len(labels) // batch, 1, 1), tables)[-1]
                value = draw(apply_guidance(logits, guidance), generator, temperature, top_k, top_p)
                colour = torch.cat([colour, value[..., None]], dim=-1)
            pixels = torch.cat([pixels, colour], dim=1)
            if frames and (i + 1) % side == 0:  # a frame a row
                pictures.append(picture(pixels))
        return (picture(pixels), pictures) if frames else picture(pixels)


def value_features(values: Tensor) -> Tensor:
    """Colour values (...), 0 to 255 or 256 for "outside the picture" -> (..., FEATURES): waves over the brightness, coarse
    to fine, so that values near each other look alike; and a mark for "outside"."""
    outside = (values == 256)[..., None]
    waves = torch.cos((values[..., None] + 0.5) * torch.arange(1, FEATURES, device=values.device) * (math.pi / 256))
    return torch.cat([waves.masked_fill(outside, 0.0), outside.float()], dim=-1)


Model = PixelAR
