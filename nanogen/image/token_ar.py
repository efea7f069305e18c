"""Token AR: a language model whose words are patches of a picture.

    tokens, row by row:   p(picture) = p(t1) p(t2 | t1) p(t3 | t1, t2) ...

The network is GPT: a causal Transformer that looks at the tokens so far and answers with a probability for each word of the
vocabulary. To sample, draw a token, append it, repeat, 64 times for an 8x8 grid. The cache keeps what attention needs of
the past, so each step costs one token's work.

    python -m nanogen train token_ar --data cifar10 --minutes 10

Sources: Esser et al. 2021 (VQGAN's second stage); Sun et al. 2024 (LlamaGen: class condition, guidance, 2-D rotary
positions). Different here: the class enters through AdaLN in every layer, as in the flow chapters, not as a first token, so
that chapters share one backbone; and every token also sees its neighbours above directly, by a table, because locality
is worth more than depth when the budget is ten minutes.
"""

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
from nanogen.image.tokenizer import show_partial


@dataclass
class Config:
    width: int = 192  # features per token
    depth: int = 6  # blocks
    heads: int = 3  # attention heads
    dropout: float = 0.0  # on every residual branch; full recipes, which see each picture often, need some
    label_dropout: float = 0.1  # share of training pictures whose label is hidden, for guidance
    bottleneck: str = "vq"  # the tokenizer to stand on: vq or fsq
    size: int = 32  # side of the pictures in pixels
    classes: int = 10  # number of labels


def stands_on(config: Config) -> tuple[str, dict]:
    """The chapter underneath, and what it must be: fields of its Config. ValueError for a bottleneck without words in a grid."""
    if config.bottleneck not in ("vq", "fsq"):
        raise ValueError(f"bottleneck must be vq or fsq, got {config.bottleneck!r}")
    return "tokenizer", {"bottleneck": config.bottleneck}


class TokenAR(nn.Module):
    """A causal Transformer over a raster of tokens. `tokenizer` is frozen, and no part of the saved weights."""

    def __init__(self, config: Config, tokenizer: nn.Module):
        super().__init__()
        self.config = config
        self.tokenizer = [tokenizer]  # in a list: not a sub-module
        self.grid, self.vocabulary = tokenizer.grid, tokenizer.vocabulary
        self.start = self.vocabulary  # an extra word: "nothing yet", also used beyond the border
        # How far back in the chain the previous token, above, above right and above left are, and the column where the
        # last two do not exist. (In the left column the previous token is the end of the row above: still worth telling.)
        self.neighbours = ((1, -1), (self.grid, -1), (self.grid - 1, self.grid - 1), (self.grid + 1, 0))
        self.embeddings = nn.ModuleList(WordVectors(tokenizer.codes(), config.width, extra=1) for _ in self.neighbours)
        self.label = ConditionEmbedding(config.classes, config.width)
        self.transformer = Transformer(config.width, config.depth, config.heads, dropout=config.dropout)
        self.head = WordVectors(tokenizer.codes(), config.width, zero=True)  # the first guess is uniform: loss = log(vocabulary)
        angles = rotary_angles(grid_positions(self.grid, self.grid), config.width // config.heads)
        self.register_buffer("angles", angles, persistent=False)

    def prepare(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Encode a batch of pictures once, before training: (B, 3, H, W) -> what `loss` wants."""
        return {"tokens": self.tokenizer[0].encode(images), "labels": labels}

    def words(self) -> list[Tensor]:
        """The tables of the words' vectors, one for each neighbour and one for the head: a sampler needs them only once."""
        return [vectors() for vectors in (*self.embeddings, self.head)]

    def embed(self, tokens: Tensor, last: bool = False, words: list[Tensor] | None = None) -> Tensor:
        """Tokens so far (B, P) -> inputs of positions 0..P (B, P + 1, width), or of position P alone: the sum of what
        stands to the left, above, above right and above left."""
        past = tokens.shape[1]
        positions = torch.arange(past if last else 0, past + 1, device=tokens.device)
        column = positions % self.grid
        padded = F.pad(tokens, (self.grid + 1, 0), value=self.start)  # nothing stands before the first token
        x = 0
        for table, (back, outside) in zip((words or self.words())[:-1], self.neighbours, strict=True):
            word = padded[:, positions + self.grid + 1 - back]
            x = x + F.embedding(torch.where(column == outside, self.start, word), table)
        return x

    def logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """All tokens (B, T) at once -> logits of each, given those before it: (B, T, vocabulary)."""
        words = self.words()
        x = self.embed(tokens[:, :-1], words=words)
        x = self.transformer(x, self.angles[: x.shape[1]], causal=True, condition=self.label(labels))
        return (x @ words[-1].mT).float()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "tokens" (B, T), "labels" (B,). Cross-entropy in nats per token; chance is log(vocabulary)."""
        labels = drop_labels(batch["labels"], self.config.classes, self.config.label_dropout)
        logits = self.logits(batch["tokens"], labels)
        return F.cross_entropy(logits.flatten(0, 1), batch["tokens"].flatten()), {}

    @torch.no_grad()
    def sample(self, labels: Tensor, steps: int | None = None, guidance: float = 1.0, temperature: float = 1.0, seed: int = 0,
               frames: bool = False, top_k: int = 0, top_p: float = 1.0, cached: bool = True):
        """Pictures of these labels (B,): (B, 3, H, W) in [-1, 1]; with `frames`, also a list of the pictures on the way.

        There is one step per token: `steps` may only say the same. cached=False recomputes the past at every step, to
        show what the cache saves. The others: `blocks/sampling.py`.
        """
        count = self.grid**2
        if steps not in (None, 0, count):
            raise ValueError(f"token_ar takes one step per token: steps must be {count}, got {steps}")
        generator = torch.Generator(labels.device).manual_seed(seed)
        tokens = torch.empty(len(labels), 0, dtype=torch.long, device=labels.device)
        labels = with_and_without(labels, self.config.classes, guidance)
        words, modulation = self.words(), self.transformer.modulate(self.label(labels))  # the same for the whole chain
        cache = Cache(self.transformer, len(labels), count, modulation.dtype) if cached else None
        pictures = []
        for i in range(count):
            x = self.embed(tokens if guidance == 1 else torch.cat([tokens, tokens]), cached, words)
            angles = self.angles[i : i + 1] if cached else self.angles[: i + 1]
            h = self.transformer(x, angles, causal=not cached, modulation=modulation, cache=cache)
            logits = apply_guidance((h[:, -1] @ words[-1].mT).float(), guidance)
            token = draw(logits, generator, temperature, top_k, top_p)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            if frames and ((i + 1) % max(count // 16, 1) == 0 or i + 1 == count):
                pictures.append(show_partial(self.tokenizer[0], F.pad(tokens, (0, count - i - 1), value=-1)))
        images = self.tokenizer[0].decode(tokens)
        return (images, pictures) if frames else images


Model = TokenAR
