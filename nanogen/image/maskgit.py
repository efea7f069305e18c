"""MaskGIT: all tokens at once, the surest first.

    start    ? ? ? ?        every token is masked
    step     ? 7 ? ?        guess all of them in one pass; keep the guesses the network is surest of
    step     3 7 ? 9        mask the rest again; repeat: 8 to 12 passes for 64 tokens
    end      3 7 1 9

Raster order is an accident of how pictures are stored. The network is the same Transformer without the causal mask,
trained to fill in a random share of masked tokens. Tokens that are drawn in the same step do not know of each other:
that is the price of few steps, and why the first steps reveal few (cosine schedule).

    python -m nanogen train maskgit --data cifar10 --minutes 10

Sources: Chang et al. 2022 (MaskGIT: masking cos(pi r / 2), confidence); Besnier et al. 2025 (Halton order: reveal in a
sequence that covers the picture evenly, so that tokens of one step are far apart and hardly depend on each other).
Different from the paper: class through AdaLN; a 3x3 convolution over the embedded grid in front of the Transformer; words
that look alike have vectors alike (`WordVectors`).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.sampling import apply_guidance, draw, halton_ranks, reveal_schedule, with_and_without
from nanogen.blocks.transformer import (
    ConditionEmbedding,
    Transformer,
    WordVectors,
    drop_labels,
    grid_positions,
    rotary_angles,
)
from nanogen.image.tokenizer import show_partial


@dataclass
class Config:
    width: int = 192  # features per token
    depth: int = 6  # blocks
    heads: int = 3  # attention heads
    dropout: float = 0.0  # on every residual branch
    label_dropout: float = 0.1  # share of training pictures whose label is hidden, for guidance
    smoothing: float = 0.1  # label smoothing of the cross-entropy
    order: str = "confidence"  # the sampler's default order: confidence or halton
    gumbel: float = 4.5  # tau, how much chance there is in the order by confidence; falls to 0 at the last step
    bottleneck: str = "vq"  # the tokenizer to stand on: vq or fsq
    size: int = 32  # side of the pictures in pixels
    classes: int = 10  # number of labels


def stands_on(config: Config) -> tuple[str, dict]:
    """The chapter underneath, and what it must be: fields of its Config. ValueError for a bottleneck without words in a grid."""
    if config.bottleneck not in ("vq", "fsq"):
        raise ValueError(f"bottleneck must be vq or fsq, got {config.bottleneck!r}")
    return "tokenizer", {"bottleneck": config.bottleneck}


class MaskGIT(nn.Module):
    """A Transformer that fills in masked tokens. `tokenizer` is frozen, and no part of the saved weights."""

    def __init__(self, config: Config, tokenizer: nn.Module):
        super().__init__()
        self.config = config
        self.tokenizer = [tokenizer]  # in a list: not a sub-module
        self.grid, self.vocabulary = tokenizer.grid, tokenizer.vocabulary
        self.mask = self.vocabulary  # an extra word: "not known yet"
        self.embedding = WordVectors(tokenizer.codes(), config.width, extra=1)
        self.local = nn.Conv2d(config.width, config.width, 3, padding=1)
        self.label = ConditionEmbedding(config.classes, config.width)
        self.transformer = Transformer(config.width, config.depth, config.heads, dropout=config.dropout)
        self.head = WordVectors(tokenizer.codes(), config.width, zero=True)  # the first guess is uniform: loss = log(vocabulary)
        angles = rotary_angles(grid_positions(self.grid, self.grid), config.width // config.heads)
        self.register_buffer("angles", angles, persistent=False)

    def prepare(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Encode a batch of pictures once, before training: (B, 3, H, W) -> what `loss` wants."""
        return {"tokens": self.tokenizer[0].encode(images), "labels": labels}

    def words(self) -> tuple[Tensor, Tensor]:
        """The tables of the words' vectors, going in and coming out: a sampler needs them only once."""
        return self.embedding(), self.head()

    def logits(self, tokens: Tensor, labels: Tensor, words: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens (B, T), some masked -> logits for every place (B, T, vocabulary)."""
        vectors, head = words or self.words()
        x = F.embedding(tokens, vectors)
        square = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B, width, h, w)
        x = x + self.local(square).flatten(2).transpose(1, 2)
        return (self.transformer(x, self.angles, condition=self.label(labels)) @ head.mT).float()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "tokens" (B, T), "labels" (B,). Cross-entropy on the masked tokens, in nats per token."""
        tokens = batch["tokens"]
        labels = drop_labels(batch["labels"], self.config.classes, self.config.label_dropout)
        share = torch.cos(math.pi / 2 * torch.rand(len(tokens), 1, device=tokens.device))
        order = torch.rand(tokens.shape, device=tokens.device).argsort(1).argsort(1)  # a random rank for each token
        masked = order < (share * tokens.shape[1]).ceil().clamp(min=1)
        logits = self.logits(torch.where(masked, self.mask, tokens), labels)
        each = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=self.config.smoothing, reduction="none")
        return (each * masked.flatten()).sum() / masked.sum(), {"masked": masked.float().mean()}

    @torch.no_grad()
    def reveal(self, labels: Tensor, steps: int, guidance: float, temperature: float, seed: int, order: str | None = None,
               truth: Tensor | None = None) -> list[Tensor]:
        """The tokens after every step, a list of (B, T) in which -1 means masked.

        truth: tokens (B, T) to reveal instead of the network's draws: which ones it would choose first on real pictures.
        """
        order = order or self.config.order
        if order not in ("confidence", "halton"):
            raise ValueError(f"order must be confidence or halton, got {order!r}")
        count = self.grid**2
        if not 1 <= steps <= count:
            raise ValueError(f"steps must be from 1 to the {count} tokens of a picture, got {steps}")
        generator = torch.Generator(labels.device).manual_seed(seed)
        tokens = torch.full((len(labels), count), -1, device=labels.device)
        labels = with_and_without(labels, self.config.classes, guidance)
        halton = halton_ranks(self.grid).to(labels.device)
        words, history = self.words(), []
        for step, known in enumerate(reveal_schedule(count, steps)):
            inputs = torch.where(tokens < 0, self.mask, tokens)
            logits = self.logits(inputs if guidance == 1 else torch.cat([inputs, inputs]), labels, words)
            logits = apply_guidance(logits, guidance)
            drawn = draw(logits, generator, temperature) if truth is None else truth
            if order == "halton":
                priority = -halton.float().expand(tokens.shape)
            else:
                confidence = logits.log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
                uniform = torch.rand(confidence.shape, generator=generator, device=confidence.device).clamp(1e-9, 1 - 1e-7)
                gumbel = -(-uniform.log()).log()
                priority = confidence + self.config.gumbel * (1 - (step + 1) / steps) * gumbel
            priority = priority.masked_fill(tokens >= 0, float("inf"))  # what is committed stays
            chosen = priority.argsort(dim=1, descending=True)[:, :known]  # (B, known)
            keep = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, chosen, True)
            tokens = torch.where(keep & (tokens < 0), drawn, tokens)
            history.append(tokens)
        return history

    @torch.no_grad()
    def sample(self, labels: Tensor, steps: int | None = None, guidance: float = 1.0, temperature: float = 1.0, seed: int = 0,
               frames: bool = False, order: str | None = None):
        """Pictures of these labels (B,): (B, 3, H, W) in [-1, 1]; with `frames`, also a list of the pictures on the way.

        steps: passes of the network, 12 unless told; order: confidence or halton; others: `blocks/sampling.py`.
        """
        history = self.reveal(labels, steps or 12, guidance, temperature, seed, order)
        images = self.tokenizer[0].decode(history[-1])
        return (images, [show_partial(self.tokenizer[0], tokens) for tokens in history]) if frames else images


Model = MaskGIT
