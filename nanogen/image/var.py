"""VAR: a picture as people paint it, the whole thing roughly and then finer, one scale after another.

    scale 1x1     one token: about the mean colour
    scale 2x2     four tokens, all in one pass, knowing the first
    scale 4x4     16 tokens, all in one pass, knowing the five before
    scale 8x8     64 tokens, all in one pass, knowing the 21 before: 4 passes for the whole picture

It is a chain again, but its unit is a whole scale: "next scale" instead of "next token". Within a scale nothing has an
order, and a coarse scale never depends on a finer one, as in a picture. Two things are trained:

    the tokenizer     `--bottleneck multiscale` of tokenizer.py; its heart is blocks/multiscale.py
    the Transformer   here. Its input at scale k is the picture so far (the sum of what all coarser scales added), shrunk
                      to that grid; its output, a token for each cell. A cell sees its own scale and all coarser ones.

    python -m nanogen train var --data cifar10 --minutes 10      # trains the tokenizer first, if it is missing

Source: Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction".
Different from the paper: the class enters through AdaLN and as the start, positions are rotary, at the true place of each
cell in the picture, so that a cell and the coarse cell over it are neighbours; a 3x3 convolution over each scale's input;
the scales double, which at equal bits kept more of these small pictures than 1, 2, 3, 4, 6, 8 (TRIED.md).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.multiscale import shrink
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


@dataclass
class Config:
    width: int = 192  # features per token
    depth: int = 6  # blocks
    heads: int = 3  # attention heads
    dropout: float = 0.0  # on every residual branch
    label_dropout: float = 0.1  # share of training pictures whose label is hidden, for guidance
    codes: int = 184  # vocabulary of the tokenizer: 85 tokens of 7.5 bits say as much as 64 of 10
    size: int = 32  # side of the pictures in pixels
    classes: int = 10  # number of labels


def stands_on(config: Config) -> tuple[str, dict]:
    """The chapter underneath, and what it must be: fields of its Config."""
    return "tokenizer", {"bottleneck": "multiscale", "codes": config.codes}


class VAR(nn.Module):
    """A Transformer over scales. `tokenizer` is frozen, and no part of the saved weights."""

    def __init__(self, config: Config, tokenizer: nn.Module):
        super().__init__()
        self.config = config
        self.tokenizer = [tokenizer]  # in a list: not a sub-module
        scales = tokenizer.quantizer.scales
        self.scales, self.vocabulary = scales, tokenizer.vocabulary
        self.label = ConditionEmbedding(config.classes, config.width)
        self.start = nn.Linear(config.width, config.width)  # scale 1 has no picture yet: it starts from the class
        self.embed = nn.Conv2d(tokenizer.config.code_dim, config.width, 3, padding=1)
        self.scale = nn.Embedding(len(scales), config.width)
        self.transformer = Transformer(config.width, config.depth, config.heads, dropout=config.dropout)
        self.head = WordVectors(tokenizer.codes(), config.width, zero=True)  # the first guess is uniform: loss = log(vocabulary)
        which = torch.cat([torch.full((side * side,), k) for k, side in enumerate(scales)])  # scale of each token
        places = torch.cat([(grid_positions(side, side) + 0.5) * (scales[-1] / side) for side in scales])
        self.register_buffer("which", which, persistent=False)
        self.register_buffer("mask", which[:, None] >= which, persistent=False)  # (T, T): own scale and coarser
        self.register_buffer("angles", rotary_angles(places, config.width // config.heads), persistent=False)

    def prepare(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Encode a batch of pictures once, before training: (B, 3, H, W) -> what `loss` wants."""
        return {"tokens": self.tokenizer[0].encode(images), "labels": labels}

    def inputs(self, sums: list[Tensor], condition: Tensor) -> list[Tensor]:
        """The sums after the scales that are known, (B, code_dim, h, h) each -> the inputs of those scales' successors,
        (B, scale^2, width) each, the first scale's before them."""
        first = self.start(condition)[:, None] + self.scale.weight[0]
        return [first.expand(-1, self.scales[0] ** 2, -1)] + [self.input(total, k + 1) for k, total in enumerate(sums)]

    def input(self, total: Tensor, k: int) -> Tensor:
        """The sum of all scales before k -> the input of scale k: (B, scale^2, width)."""
        return self.embed(shrink(total, self.scales[k])).flatten(2).transpose(1, 2) + self.scale.weight[k]

    def logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """All tokens (B, T) at once -> log-odds of each, given the scales before its own: (B, T, vocabulary)."""
        condition = self.label(labels)
        with torch.no_grad():
            sums = self.tokenizer[0].quantizer.sums(tokens[:, : -self.scales[-1] ** 2])
        x = torch.cat(self.inputs(sums, condition), dim=1)
        x = self.transformer(x, self.angles, mask=self.mask, condition=condition)
        return (x @ self.head().mT).float()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "tokens" (B, T), "labels" (B,). Cross-entropy in nats per token; chance is log(vocabulary)."""
        labels = drop_labels(batch["labels"], self.config.classes, self.config.label_dropout)
        logits = self.logits(batch["tokens"], labels)
        each = F.cross_entropy(logits.flatten(0, 1), batch["tokens"].flatten(), reduction="none").view_as(batch["tokens"])
        by_scale = [part.detach().mean() for part in each.split([side**2 for side in self.scales], dim=1)]
        return each.mean(), {f"loss_{side}x{side}": value for side, value in zip(self.scales, by_scale, strict=True)}

    @torch.no_grad()
    def draw_tokens(self, labels: Tensor, guidance: float = 1.0, temperature: float = 1.0, seed: int = 0, top_k: int = 0,
                    top_p: float = 1.0, cached: bool = True, prefix: Tensor | None = None) -> Tensor:
        """The tokens of pictures of these labels (B,): (B, T), the scales one after another, one pass each.

        Guidance grows evenly over the scales, from none at the first to all of it at the last: the coarse scales decide
        what is varied, the fine ones how clear it is. cached=False computes the coarser scales anew at every pass.
        prefix: tokens (B, n) of the first scales, whole ones, to be kept: only the finer scales are drawn.
        """
        generator = torch.Generator(labels.device).manual_seed(seed)
        quantizer, count = self.tokenizer[0].quantizer, len(labels)
        kept = [] if prefix is None else quantizer.split(prefix)
        condition = self.label(with_and_without(labels, self.config.classes, guidance))
        modulation, head = self.transformer.modulate(condition), self.head()  # the same for the whole chain
        cache = Cache(self.transformer, len(condition), len(self.angles), modulation.dtype) if cached else None
        tokens, inputs, total, start = [], self.inputs([], condition), 0, 0
        for k, side in enumerate(self.scales):
            end = start + side**2
            if cached:
                h = self.transformer(inputs[-1], self.angles[start:end], modulation=modulation, cache=cache)
            else:
                h = self.transformer(torch.cat(inputs, dim=1), self.angles[:end], self.mask[:end, :end], modulation=modulation)
            ramp = 1 + (guidance - 1) * k / max(len(self.scales) - 1, 1)
            logits = (h[:, -(side**2) :] @ head.mT).float()
            logits = logits[:count] if ramp == 1 else apply_guidance(logits, ramp)
            tokens.append(kept[k] if k < len(kept) else draw(logits, generator, temperature, top_k, top_p))
            if k + 1 < len(self.scales):
                total = total + quantizer.enlarge(F.embedding(tokens[-1], quantizer.book.vectors), k)
                both = total if guidance == 1 else torch.cat([total, total])
                inputs.append(self.input(both, k + 1))
            start = end
        return torch.cat(tokens, dim=1)

    @torch.no_grad()
    def sample(self, labels: Tensor, steps: int | None = None, guidance: float = 1.0, temperature: float = 1.0, seed: int = 0,
               frames: bool = False, top_k: int = 0, top_p: float = 1.0, cached: bool = True):
        """Pictures of these labels (B,): (B, 3, H, W) in [-1, 1]; with `frames`, also the pictures after each scale.

        There is one step per scale: `steps` may only say the same. The others: `draw_tokens`, and `blocks/sampling.py`.
        """
        if steps not in (None, 0, len(self.scales)):
            raise ValueError(f"var takes one step per scale: steps must be {len(self.scales)}, got {steps}")
        tokens = self.draw_tokens(labels, guidance, temperature, seed, top_k, top_p, cached)
        images = self.tokenizer[0].decode(tokens)
        ends = self.which.bincount().cumsum(0).tolist()
        return (images, [self.tokenizer[0].decode(tokens[:, :end]) for end in ends]) if frames else images


Model = VAR
