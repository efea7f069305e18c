"""MaskGIT: all tokens at once, the surest first.

    start     ? ? ? ?      every token is masked
    pass 1    ? 7 ? ?      predict all of them; keep the tokens that the network is surest of
    pass 2    3 7 ? 9      mask the others again and repeat: 8 to 12 passes for 64 tokens

The Transformer, without the causal mask, learns to fill in masked tokens: a fraction cos(pi/2 r) of
the image, r uniform, at random positions. The sampler asks for the same fractions, r = 0, 1/12 ...
11/12 for 12 passes, but it chooses the positions by confidence. Tokens of one pass are drawn
independently: the price of few passes.

Ours: the order "halton" is the same for all images. If it is chosen, training masks three of four
images as the sampler does: the tokens that come last in this order. The fourth image is masked at
random, so that the model can also complete a partial image. Every number of masked tokens, from 1
to 64, is equally likely, because the sampler draws each token once.

    python -m nanogen train maskgit --data cifar10      # FD-nano 22.0

Sources: Chang et al. 2022, "MaskGIT" (masking, schedule, confidence with Gumbel noise); Besnier et
al. 2025, "Halton scheduler" (tokens of one pass lie far apart and hardly depend on each other).
Different here: class through AdaLN; a 3x3 convolution before the Transformer; `CodeEmbedding`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks import sampling, transformer
from nanogen.blocks.transformer import CodeEmbedding, ConditionEmbedding, drop_labels
from nanogen.image import check_transformer
from nanogen.image.tokenizer import known_tokens, show_partial
from nanogen.method import Method, Requirement, check, choose

HALTON = 0.75  # with the order "halton": fraction of training images that are masked in it


@dataclass
class Config:
    width: int = 192  # features per token
    depth: int = 6  # blocks
    heads: int = 3  # attention heads
    dropout: float = 0.0  # on every residual branch
    label_dropout: float = 0.1  # fraction of training images whose label is hidden, for guidance
    smoothing: float = 0.1  # label smoothing of the cross-entropy
    order: str = "confidence"  # of sampling: confidence or halton; training masks accordingly
    gumbel: float = 4.5  # size of the noise in the order by confidence; it falls to 0 at the end
    bottleneck: str = "vq"  # of the tokenizer: vq or fsq
    size: int = 32  # side of the images in pixels
    classes: int = 10  # number of labels

    def __post_init__(self):
        choose(self, bottleneck=("vq", "fsq"), order=("confidence", "halton"))
        check(self, smoothing=(self.smoothing < 1, "below 1"))
        check_transformer(self)


class MaskGIT(Method):
    """A Transformer that fills in masked tokens of a frozen tokenizer."""

    encodes = True

    def __init__(self, config: Config, base: nn.Module):
        super().__init__()
        self.config = config
        self.freeze(tokenizer=base)
        self.grid, self.codebook_size = base.grid, base.codebook_size
        self.mask = self.codebook_size  # an extra token: not known yet
        width, codes = config.width, base.code_vectors()
        self.embedding = CodeEmbedding(codes, width, extra=1)
        self.local = nn.Conv2d(width, width, 3, padding=1)
        self.label = ConditionEmbedding(config.classes, width)
        self.transformer = transformer.Transformer(width, config.depth, config.heads,
                                                   dropout=config.dropout)
        self.head = CodeEmbedding(codes, width, zero=True)  # first guess: uniform, loss log(K)
        angles = transformer.grid_angles(self.grid, self.grid, head=width // config.heads)
        self.register_buffer("angles", angles, persistent=False)
        self.register_buffer("halton", sampling.halton_ranks(self.grid), persistent=False)  # (T,)

    @staticmethod
    def requires(config: Config) -> Requirement:
        return Requirement("tokenizer", {"bottleneck": config.bottleneck, "size": config.size})

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> their "tokens" (B, T); the labels stay."""
        return {"tokens": self.tokenizer.encode(batch["images"]), "labels": batch["labels"]}

    def known_part(self, images: Tensor, seen: Tensor) -> Tensor:
        """See `Method.known_part`: tokens (B, T), -1 where they are to be drawn."""
        return known_tokens(self.tokenizer, images, seen)

    def logits(self, tokens: Tensor, labels: Tensor, tables: tuple | None = None) -> Tensor:
        """Tokens (B, T), some of them `mask` -> logits of all positions (B, T, codebook_size)."""
        vectors, head = tables or (self.embedding(), self.head())
        x = F.embedding(tokens, vectors)
        square = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B, width, h, w)
        x = x + self.local(square).flatten(2).transpose(1, 2)
        return (self.transformer(x, self.angles, condition=self.label(labels)) @ head.mT).float()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "tokens" (B, T), "labels" (B,). Cross-entropy in nats per masked token."""
        tokens = batch["tokens"]
        labels = drop_labels(batch["labels"], self.config.classes, self.config.label_dropout)
        batch, count, device = *tokens.shape, tokens.device
        fraction = torch.rand(batch, 1, device=device)  # of the tokens to mask, at least one
        ranks = torch.rand(batch, count, device=device).argsort(1).argsort(1)  # random positions
        if self.config.order == "confidence":
            fraction = torch.cos(math.pi / 2 * fraction)
        else:  # the first ones to mask are the last ones to draw
            ordered = torch.rand(batch, 1, device=device) < HALTON
            ranks = torch.where(ordered, count - 1 - self.halton, ranks)
        masked = ranks < (fraction * count).ceil().clamp(min=1)
        logits = self.logits(torch.where(masked, self.mask, tokens), labels)
        each = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none",
                               label_smoothing=self.config.smoothing)
        return (each * masked.flatten()).sum() / masked.sum(), {"masked": masked.float().mean()}

    @torch.no_grad()
    def reveal(self, labels: Tensor, steps: int = 12, guidance: float = 1.0,
               temperature: float = 1.0, seed: int = 0, order: str | None = None,
               truth: Tensor | None = None, known: Tensor | None = None) -> list[Tensor]:
        """The tokens after every pass: a list of (B, T), -1 where masked. Settings: see `sample`.
        truth: tokens (B, T) to keep instead of drawn ones: which of them come first?"""
        order = order or self.config.order
        if order not in ("confidence", "halton"):
            raise ValueError(f"order must be confidence or halton, got {order!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        generator = torch.Generator(labels.device).manual_seed(seed)
        empty = torch.full((len(labels), self.grid**2), -1, device=labels.device)
        tokens = empty if known is None else known.to(empty)
        given = int((tokens >= 0).sum(1).min())  # the image with the fewest sets the pace
        count = max(self.grid**2 - given, 1)  # to draw; if none is left, one pass changes nothing
        steps = min(steps, count)
        labels = sampling.with_and_without(labels, self.config.classes, guidance)
        tables, history = (self.embedding(), self.head()), []  # tables: once for all passes
        for step, new in enumerate(sampling.reveal_schedule(count, steps), start=1):
            inputs = torch.where(tokens < 0, self.mask, tokens)
            inputs = inputs if guidance == 1 else torch.cat([inputs, inputs])
            logits = sampling.apply_guidance(self.logits(inputs, labels, tables), guidance)
            drawn = sampling.draw(logits, generator, temperature) if truth is None else truth
            if order == "halton":
                priority = -self.halton.float().expand(tokens.shape)
            else:
                confidence = logits.log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
                u = torch.rand(confidence.shape, generator=generator, device=labels.device)
                gumbel = -(-u.clamp(1e-9, 1 - 1e-7).log()).log()
                priority = confidence + self.config.gumbel * (1 - step / steps) * gumbel
            priority = priority.masked_fill(tokens >= 0, float("inf"))  # what is known stays
            best = priority.argsort(dim=1, descending=True)[:, : given + new]  # (B, known)
            tokens = tokens.scatter(1, best, torch.where(tokens < 0, drawn, tokens).gather(1, best))
            history.append(tokens)
        return history

    def sample(self, conditions: dict[str, Tensor], *, steps: int = 12,
               guidance: float = 1.0, temperature: float = 1.0, order: str | None = None,
               known: Tensor | None = None, seed: int = 0, frames: bool = False) -> dict:
        """Images of these "labels" (B,): {"images": (B, 3, H, W) in [-1, 1]}, perhaps "frames".
        steps: passes; if there are fewer tokens to draw, one for each. order: confidence or halton.
        known: tokens (B, T) that stay, -1: to draw. guidance, temperature: blocks/sampling.py."""
        history = self.reveal(conditions["labels"], steps, guidance, temperature, seed, order,
                              known=known)
        shown = [show_partial(self.tokenizer, tokens) for tokens in history[0 if frames else -1 :]]
        return {"images": shown[-1]} | ({"frames": shown} if frames else {})


Model = MaskGIT
