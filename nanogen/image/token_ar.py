"""Token AR: GPT over the tokens of an image.

    tokens, row by row:   p(image) = p(t1) p(t2 | t1) p(t3 | t1, t2) ...

A causal Transformer sees the tokens so far and answers with a probability for each entry of the
codebook. To sample: draw a token, append it, repeat, 64 times for an 8x8 grid. The cache keeps the
keys and values of the past, so that each step computes one token only. Training and sampling take
the same order, and each training image trains all 64 steps; but its past is real, never drawn.

    python -m nanogen train token_ar --data cifar10      # FD-nano 12.7

Sources: Esser et al. 2021, "Taming Transformers" (VQGAN's second stage); Sun et al. 2024,
"LlamaGen" (class condition, guidance, 2-D rotary positions). Different here: class through AdaLN as
in all methods, not as a first token; every token also sees its neighbours directly.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks import transformer
from nanogen.blocks.neighbours import raster_neighbours
from nanogen.blocks.sampling import apply_guidance, draw, with_and_without
from nanogen.blocks.transformer import CodeEmbedding, ConditionEmbedding, drop_labels
from nanogen.image import check_transformer
from nanogen.image.tokenizer import known_tokens, show_partial
from nanogen.method import Method, Requirement, choose


@dataclass
class Config:
    width: int = 192  # features per token
    depth: int = 6  # blocks
    heads: int = 3  # attention heads
    dropout: float = 0.0  # on every residual branch; only the gpu recipe uses it
    label_dropout: float = 0.1  # fraction of training images whose label is hidden, for guidance
    bottleneck: str = "vq"  # of the tokenizer: vq or fsq
    size: int = 32  # side of the images in pixels
    classes: int = 10  # number of labels

    def __post_init__(self):
        choose(self, bottleneck=("vq", "fsq"))
        check_transformer(self)


class TokenAR(Method):
    """A causal Transformer over the tokens of a frozen tokenizer, in raster order."""

    encodes = True

    def __init__(self, config: Config, base: nn.Module):
        super().__init__()
        self.config = config
        self.freeze(tokenizer=base)
        self.grid, self.codebook_size = base.grid, base.codebook_size
        self.outside = self.codebook_size  # an extra token: no neighbour there
        width, codes = config.width, base.code_vectors()
        self.embeddings = nn.ModuleList(CodeEmbedding(codes, width, extra=1) for _ in range(4))
        self.label = ConditionEmbedding(config.classes, width)
        self.transformer = transformer.Transformer(width, config.depth, config.heads,
                                                   dropout=config.dropout)
        self.head = CodeEmbedding(codes, width, zero=True)  # first guess: uniform, loss log(K)
        angles = transformer.grid_angles(self.grid, self.grid, head=width // config.heads)
        self.register_buffer("angles", angles, persistent=False)

    @staticmethod
    def requires(config: Config) -> Requirement:
        return Requirement("tokenizer", {"bottleneck": config.bottleneck, "size": config.size})

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> their "tokens" (B, T); the labels stay."""
        return {"tokens": self.tokenizer.encode(batch["images"]), "labels": batch["labels"]}

    def known_part(self, images: Tensor, seen: Tensor) -> Tensor:
        """See `Method.known_part`: tokens (B, T), -1 where they are to be drawn."""
        return known_tokens(self.tokenizer, images, seen)

    def tables(self) -> list[Tensor]:
        """The vectors of all tokens, for each neighbour and the head; a sampler needs them once."""
        return [embedding() for embedding in (*self.embeddings, self.head)]

    def embed(self, tokens: Tensor, tables: list[Tensor], last: bool = False) -> Tensor:
        """Tokens so far (B, P) -> inputs of positions 0..P, (B, P + 1, width). last: only of P."""
        seen = raster_neighbours(tokens, self.grid, self.outside, last).unbind(-1)
        return sum(F.embedding(token, table) for token, table in zip(seen, tables[:4], strict=True))

    def logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """All tokens (B, T) -> logits of each, given those before it: (B, T, codebook_size)."""
        tables = self.tables()
        x = self.embed(tokens[:, :-1], tables)
        x = self.transformer(x, self.angles, causal=True, condition=self.label(labels))
        return (x @ tables[-1].mT).float()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "tokens" (B, T), "labels" (B,). Cross-entropy in nats per token."""
        labels = drop_labels(batch["labels"], self.config.classes, self.config.label_dropout)
        logits = self.logits(batch["tokens"], labels)
        return F.cross_entropy(logits.flatten(0, 1), batch["tokens"].flatten()), {}

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, guidance: float = 1.0,
               temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, cached: bool = True,
               known: Tensor | None = None, seed: int = 0, frames: bool = False) -> dict:
        """Images of these "labels" (B,): {"images": (B, 3, H, W) in [-1, 1]}, perhaps "frames".
        known: tokens (B, T) that stay, -1: to draw; a drawn token sees only those before it.
        Others: see blocks/sampling.py. cached=False computes the past anew for every token."""
        labels, count = conditions["labels"], self.grid**2
        generator = torch.Generator(labels.device).manual_seed(seed)
        tokens = torch.empty(len(labels), 0, dtype=torch.long, device=labels.device)
        labels = with_and_without(labels, self.config.classes, guidance)
        tables, modulation = self.tables(), self.transformer.modulate(self.label(labels))
        cache = None if not cached else transformer.Cache(
            self.transformer, len(labels), count, modulation[0].dtype)
        images = []
        for i in range(count):
            both = tokens if guidance == 1 else torch.cat([tokens, tokens])
            x = self.embed(both, tables, last=cached)
            angles = self.angles[i : i + 1] if cached else self.angles[: i + 1]
            x = self.transformer(x, angles, causal=not cached, modulation=modulation, cache=cache)
            logits = apply_guidance((x[:, -1] @ tables[-1].mT).float(), guidance)
            token = draw(logits, generator, temperature, top_k, top_p)
            if known is not None:
                token = torch.where(known[:, i] >= 0, known[:, i], token)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            if frames and ((i + 1) % max(count // 16, 1) == 0 or i + 1 == count):
                so_far = F.pad(tokens, (0, count - i - 1), value=-1)
                images.append(show_partial(self.tokenizer, so_far))
        return {"images": self.tokenizer.decode(tokens)} | ({"frames": images} if frames else {})


Model = TokenAR
