"""VAR: a picture as people paint it, the whole thing roughly and then finer, one scale after another.

    scale 1x1     one token: about the mean colour
    scale 2x2     four tokens, all in one pass, knowing the first
    scale 4x4     16 tokens, all in one pass, knowing the five before
    scale 8x8     64 tokens in three passes, knowing the 21 before: 16 of them, spread evenly; 16 more that know those;
                  and the 32 between them. 6 passes for the whole picture

It is a chain again, but its unit is a whole scale: "next scale" instead of "next token". A coarse scale never depends on a
finer one, as in a picture. Two things are trained:

    the tokenizer     `--bottleneck multiscale` of tokenizer.py; its heart is blocks/multiscale.py
    the Transformer   here. What goes in is the picture so far, the sum of what all passes before have added, at the places
                      that are drawn now; what comes out, a token for each of them. A cell sees those of its own pass and
                      of all earlier ones.

Tokens of one pass are drawn without knowing each other. The paper draws every scale in one pass, and for a large network a
blurred picture may settle its details; for this one, 64 tokens at once are too many (FD-nano 23.6 instead of 15.3). HMAR found
the same. And what they cannot ask each other, they can at least ask those before them: guidance leads away from a guess that
knows neither the label nor the passes of its own scale (away from one that lacks the label alone: 17.3). So on CIFAR-10 six
passes are as good as the 64 of token_ar; on drawn scenes they are not (TRIED.md).

    python -m nanogen train var --data cifar10 --minutes 10      # trains the tokenizer first, if it is missing

Sources: Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction"; Kumbong et
al. 2025, "HMAR" (several passes within a scale; there under random masks, here in one fixed order); guidance that also hides
what has been drawn: Song et al. 2025, "History-Guided Video Diffusion", and Liao et al. 2026, "Visual Prefix Guidance".
Different from VAR: the class enters through AdaLN alone; positions are rotary, at the true place of each cell in the
picture, so that a cell and the coarse cell over it are neighbours; a 3x3 convolution over each pass's input; and the
scales double, which at equal bits keeps more of these small pictures than 1, 2, 3, 4, 6, 8 (TRIED.md).
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
    passes: tuple[int, ...] = (3,)  # how many draw each of the tokenizer's last scales; 1 draws each of those before
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
        steps, self.scale_of = plan(scales, config.passes)  # the step of each token; the scale of each step
        self.label = ConditionEmbedding(config.classes, config.width)
        self.embed = nn.Conv2d(tokenizer.config.code_dim, config.width, 3, padding=1)
        self.step = nn.Embedding(len(self.scale_of), config.width)
        self.transformer = Transformer(config.width, config.depth, config.heads, dropout=config.dropout)
        self.head = WordVectors(tokenizer.codes(), config.width, zero=True)  # the first guess is uniform: loss = log(vocabulary)
        places = torch.cat([(grid_positions(side, side) + 0.5) * (scales[-1] / side) for side in scales])
        self.counts = steps.bincount().tolist()  # tokens of each step
        self.ends = torch.tensor([side**2 for side in scales]).cumsum(0).tolist()  # tokens up to the end of each scale
        self.register_buffer("steps", steps, persistent=False)  # (T,) the step that draws each token
        self.register_buffer("order", steps.argsort(stable=True), persistent=False)  # (T,) tokens, step by step
        self.register_buffer("mask", steps[:, None] >= steps, persistent=False)  # (T, T): own step and earlier ones
        scale = torch.tensor(self.scale_of)[steps]  # (T,)
        alone = (steps[:, None] == steps) | (scale[:, None] > scale)
        self.register_buffer("alone", alone, persistent=False)  # (T, T): own step and coarser scales; not its own scale so far
        self.register_buffer("angles", rotary_angles(places, config.width // config.heads), persistent=False)

    def prepare(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Encode a batch of pictures once, before training: (B, 3, H, W) -> what `loss` wants."""
        return {"tokens": self.tokenizer[0].encode(images), "labels": labels}

    def input(self, tokens: Tensor, step: int, alone: bool = False) -> Tensor:
        """tokens (B, T), of which only those of earlier steps are looked at -> what a step starts from: (B, its tokens, width),
        the picture so far at each of its cells. What is still to come in this scale counts as its mean. alone: as if the
        step were the first of its scale."""
        k = self.scale_of[step]
        side, end, since = self.scales[k], self.ends[k], self.scale_of.index(k) if alone else step
        with torch.no_grad():
            total = self.tokenizer[0].quantizer.sums(tokens[:, :end], self.steps[:end] < since)[-1]
        cells = self.order.split(self.counts)[step] - (end - side**2)
        return self.embed(shrink(total, side)).flatten(2).transpose(1, 2)[:, cells] + self.step.weight[since]

    def logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """All tokens (B, T) at once -> logits of each, given those of the steps before its own: (B, T, vocabulary)."""
        x = torch.cat([self.input(tokens, step) for step in range(len(self.counts))], dim=1)[:, self.order.argsort()]
        x = self.transformer(x, self.angles, mask=self.mask, condition=self.label(labels))
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
        """The tokens of pictures of these labels (B,): (B, T), drawn step by step.

        Guidance leads away from a guess that knows neither the label nor what its own scale has drawn so far: label and
        neighbours both count for more. It grows evenly over the scales, from none at the first to all of it at the last: the
        coarse ones decide what is varied, the fine ones how clear it is. cached=False computes all earlier steps anew at
        every step. prefix: tokens (B, n) of the first scales, whole ones, to be kept: only the finer scales are drawn.
        """
        generator = torch.Generator(labels.device).manual_seed(seed)
        count, given = len(labels), 0 if prefix is None else prefix.shape[1]
        tokens = labels.new_zeros(count, len(self.steps))
        if given:
            tokens[:, :given] = prefix
        modulation = self.transformer.modulate(self.label(with_and_without(labels, self.config.classes, guidance)))
        head = self.head()  # both are the same for the whole chain
        cache = Cache(self.transformer, len(modulation), len(self.steps), modulation.dtype) if cached else None
        mask = self.mask if guidance == 1 else torch.stack([self.mask, self.alone]).repeat_interleave(count, 0)[:, None]
        mask, angles = mask[..., self.order, :][..., self.order], self.angles[self.order]  # (T, T) or (2 B, 1, T, T), by step
        inputs, end, finest = [], 0, len(self.scales) - 1
        for step, cells in enumerate(self.order.split(self.counts)):
            x = self.input(tokens, step)
            inputs.append(x if guidance == 1 else torch.cat([x, self.input(tokens, step, alone=True)]))
            end += len(cells)
            start = end - len(cells) if cached else 0
            x = inputs[-1] if cached else torch.cat(inputs, dim=1)
            h = self.transformer(x, angles[start:end], mask[..., start:end, :end], modulation=modulation, cache=cache)
            ramp = 1 + (guidance - 1) * self.scale_of[step] / finest if finest else guidance
            logits = (h[:, -len(cells) :] @ head.mT).float()
            logits = logits[:count] if ramp == 1 else apply_guidance(logits, ramp)
            if cells[0] >= given:
                tokens[:, cells] = draw(logits, generator, temperature, top_k, top_p)
        return tokens

    @torch.no_grad()
    def sample(self, labels: Tensor, steps: int | None = None, guidance: float = 1.0, temperature: float = 1.0, seed: int = 0,
               frames: bool = False, top_k: int = 0, top_p: float = 1.0, cached: bool = True):
        """Pictures of these labels (B,): (B, 3, H, W) in [-1, 1]; with `frames`, also the pictures after each pass.

        The number of steps was trained in: `steps` may only say the same. The others: `draw_tokens`, and `blocks/sampling.py`.
        """
        if steps not in (None, 0, len(self.counts)):
            raise ValueError(f"var has learned its steps: steps must be {len(self.counts)}, got {steps}")
        tokens = self.draw_tokens(labels, guidance, temperature, seed, top_k, top_p, cached)
        images = self.tokenizer[0].decode(tokens)
        if not frames:
            return images
        ends = [self.ends[k] for k in self.scale_of]
        known = [self.steps[:end] <= step for step, end in enumerate(ends)]
        return images, [self.tokenizer[0].decode(tokens[:, :end], known=here) for end, here in zip(ends, known, strict=True)]


def plan(scales: tuple[int, ...], passes: tuple[int, ...]) -> tuple[Tensor, list[int]]:
    """(T,) the step that draws each token, scale after scale, and the scale that each step belongs to.

    passes: how many steps draw each of the last scales; 1 draws each of those before. ValueError where they do not fit.
    """
    if not 1 <= len(passes) <= len(scales) or min(passes) < 1:
        raise ValueError(f"passes must be 1 to {len(scales)} numbers from 1 on, for the last scales, got {passes}")
    passes = (1,) * (len(scales) - len(passes)) + tuple(passes)
    scale_of = [k for k, count in enumerate(passes) for _ in range(count)]
    steps = torch.cat([scale_of.index(k) + doubling(side, passes[k]) for k, side in enumerate(scales)])
    if len(steps.unique()) < len(scale_of):
        raise ValueError(f"passes {passes} are more than the cells of the scales {scales} allow")
    return steps, scale_of


def doubling(side: int, passes: int) -> Tensor:
    """The pass in which each cell of a grid is drawn, (side^2,): spread evenly, and each pass doubles what is known.

    Bayer 1973's order, in which dithering fills a square. The last half, for one, are the white cells of a chessboard.
    """
    ranks = torch.zeros(1, 1)
    while len(ranks) < side:
        ranks = torch.cat([torch.cat([4 * ranks, 4 * ranks + 2], 1), torch.cat([4 * ranks + 3, 4 * ranks + 1], 1)])
    ranks = ranks[:side, :side].flatten().argsort().argsort()
    return (passes + ((ranks + 0.5) / side**2).log2().floor()).clamp(min=0).long()


Model = VAR
