"""MAR: masked autoregression over continuous tokens. A Transformer chains, a small head draws.

    tokens     ? x ? x      vectors, not words: nothing is rounded away
    Transformer             sees what is there and says for every gap where things are heading: z
    head                    draws the token from p(token | z) in many cheap steps; several gaps at a time, until none is left

MaskGIT needs a vocabulary because its answer is a list of probabilities. Ask for a vector instead, and the obvious loss
(squared error) answers with the average of everything plausible. A generation head (blocks/heads.py) lifts the ban: it is
a tiny flow or diffusion of its own, one token large. So a token may be anything: the latents of a KL tokenizer, the codes
of a VQ tokenizer (to tell what the head does from what the vocabulary does), or 4x4 pixels as they are, with no tokenizer.

    python -m nanogen train mar --data cifar10 --minutes 10

Sources: Li et al. 2024 (MAR: heads, masking, cosine schedule, guidance that grows with the share revealed); Besnier et al.
2025 (Halton order). Different from the paper: one Transformer, not an encoder for what is known and a decoder for the rest;
class through AdaLN, not as tokens; a 3x3 convolution over the grid; masked shares from 0 to 1, not from 0.7; half of the
training masks follow the Halton order of the sampler, and a flow head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.heads import make_head
from nanogen.blocks.quantize import nearest
from nanogen.blocks.sampling import halton_ranks, reveal_schedule, with_and_without
from nanogen.blocks.transformer import Cache, ConditionEmbedding, Transformer, drop_labels, grid_positions, rotary_angles

PATCH = 4  # pixels on a side of a raw patch
TOKENS = {"latents": "kl", "codes": "vq", "patches": None}  # what a token is -> the bottleneck it comes from
ORDERS = ("random", "halton", "raster")


@dataclass
class Config:
    width: int = 192  # features per token
    depth: int = 6  # blocks
    heads: int = 3  # attention heads
    head: str = "flow"  # generation head: flow, diffusion, mse or categorical (for codes only)
    head_width: int = 192  # features inside the generation head; not of a categorical one
    head_depth: int = 2  # layers of a flow or diffusion head
    head_repeat: int = 4  # flow and diffusion: noises for each token of a training batch
    tokens: str = "latents"  # latents (of a KL tokenizer), codes (of a VQ tokenizer) or patches (raw 4x4 pixels)
    order: str = "halton"  # the sampler's default order, halton or random; raster: another network, causal, token by token
    ordered: float = 0.5  # share of training masks that leave the beginning of the Halton order; the others are random
    dropout: float = 0.0  # on every residual branch
    label_dropout: float = 0.1  # share of training pictures whose label is hidden, for guidance
    size: int = 32  # side of the pictures in pixels
    classes: int = 10  # number of labels


def stands_on(config: Config) -> tuple[str, dict] | None:
    """The chapter underneath, and what it must be: fields of its Config; None: there is none."""
    bottleneck = TOKENS.get(config.tokens)
    return ("tokenizer", {"bottleneck": bottleneck}) if bottleneck else None


class MAR(nn.Module):
    """A Transformer over vectors, some of them masked, and a head. `tokenizer` is frozen, and no part of the saved weights."""

    def __init__(self, config: Config, tokenizer: nn.Module | None = None):
        super().__init__()
        check(config, tokenizer)
        self.config, self.causal = config, config.order == "raster"
        self.tokenizer = [tokenizer]  # in a list: not a sub-module
        codes, width = None, config.width
        if config.tokens == "patches":
            self.grid, self.token_dim = config.size // PATCH, 3 * PATCH**2
            mean, std = torch.zeros(self.token_dim), torch.full((self.token_dim,), 3**-0.5)  # as if uniform in [-1, 1]
        elif config.tokens == "codes":
            codes = tokenizer.codes()
            self.grid, self.token_dim = tokenizer.grid, codes.shape[1]
            mean, std = codes.mean(0), codes.std(0)
            codes = (codes - mean) / std
        else:
            self.grid, self.token_dim = tokenizer.grid, tokenizer.config.channels
            mean, std = torch.zeros(self.token_dim), torch.ones(self.token_dim)  # until `measure`
        self.register_buffer("token_mean", mean)
        self.register_buffer("token_std", std)
        self.register_buffer("codes", codes, persistent=False)  # (K, token_dim) or None
        self.embedding = nn.Linear(self.token_dim, width)
        self.mask = nn.Parameter(0.2 * torch.randn(width))  # stands where a token is not known yet
        # With gaps, a token hears of all its neighbours; in a chain, of the three above. The one before it comes by `embed`.
        self.local = nn.Conv2d(width, width, (1, 3) if self.causal else 3, padding=1)
        self.label = ConditionEmbedding(config.classes, width)
        self.transformer = Transformer(width, config.depth, config.heads, dropout=config.dropout)
        self.head = make_head(config.head, self.token_dim, width, config.head_width, config.head_depth, config.head_repeat, codes)
        angles = rotary_angles(grid_positions(self.grid, self.grid), width // config.heads)
        self.register_buffer("angles", angles, persistent=False)
        self.register_buffer("halton", halton_ranks(self.grid), persistent=False)

    # --- Pictures and tokens

    def prepare(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Encode a batch of pictures once, before training: (B, 3, H, W) -> what `loss` wants. Patches need none of it."""
        if self.config.tokens == "patches":
            return {"images": images, "labels": labels}
        name = "latents" if self.config.tokens == "latents" else "tokens"
        return {name: self.tokenizer[0].encode(images), "labels": labels}

    def measure(self, latents: Tensor) -> None:
        """Remember mean and std of each channel of some latents (N, C, h, w): network and head see them as N(0, 1)."""
        self.token_mean.copy_(latents.mean((0, 2, 3)))
        self.token_std.copy_(latents.std((0, 2, 3)))

    def to_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """What `prepare` gave -> normalised vectors (B, T, token_dim)."""
        if self.config.tokens == "codes":
            return F.embedding(batch["tokens"], self.codes)
        patches = self.config.tokens == "patches"
        grid = F.pixel_unshuffle(batch["images"], PATCH) if patches else batch["latents"]  # (B, C, h, w)
        return (grid.float().flatten(2).transpose(1, 2) - self.token_mean) / self.token_std

    def to_pictures(self, tokens: Tensor) -> Tensor:
        """Normalised vectors (B, T, token_dim) -> pictures (B, 3, H, W) in [-1, 1]. Not a number: not known, painted grey."""
        known = ~tokens.isnan().any(-1)  # (B, T)
        tokens = tokens.nan_to_num()
        if self.config.tokens == "codes":
            images = self.tokenizer[0].decode(self.nearest_code(tokens))
        else:
            grid = (tokens * self.token_std + self.token_mean).transpose(1, 2).unflatten(2, (self.grid, self.grid))
            patches = self.config.tokens == "patches"
            images = F.pixel_shuffle(grid, PATCH).clamp(-1, 1) if patches else self.tokenizer[0].decode(grid)
        return images * F.interpolate(known.float().view(-1, 1, self.grid, self.grid), self.config.size)

    def nearest_code(self, tokens: Tensor) -> Tensor:
        """Vectors (..., token_dim) -> the index of the code nearest to each (...)."""
        return nearest(tokens.flatten(0, -2), self.codes).view(tokens.shape[:-1])

    # --- The network

    def embed(self, tokens: Tensor) -> Tensor:
        """Whole rows of tokens (B, rows x grid, token_dim), not a number where masked -> inputs, (B, rows x grid, width).

        In a chain the input of a place is made of the token before it and the three above, never of its own.
        """
        x = torch.where(tokens.isnan()[..., :1], self.mask, self.embedding(tokens.nan_to_num()))
        square = x.transpose(1, 2).unflatten(2, (-1, self.grid))  # (B, width, rows, grid)
        local = self.local(square)[:, :, : square.shape[2]]  # in a chain, the padding above moves all rows down by one
        x = F.pad(x, (0, 0, 1, -1)) if self.causal else x
        return x + local.flatten(2).transpose(1, 2)

    def directions(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Tokens (B, T, token_dim), not a number where masked -> z for every place (B, T, width)."""
        return self.transformer(self.embed(tokens), self.angles, causal=self.causal, condition=self.label(labels))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "labels" (B,) and "latents" (B, C, h, w), "tokens" (B, T) or "images" (B, 3, H, W). The loss of the head
        on masked tokens; in a chain, on all."""
        tokens, config = self.to_tokens(batch), self.config
        labels = drop_labels(batch["labels"], config.classes, config.label_dropout)
        if self.causal:
            return self.head.loss(tokens.flatten(0, 1), self.directions(tokens, labels).flatten(0, 1)), {}
        masked, count = self.draw_masks(len(tokens))
        z = self.directions(tokens.masked_fill(masked[..., None], float("nan")), labels)
        index = masked.flatten().int().topk(count).indices  # where they are, by a function whose result has a fixed shape
        return self.head.loss(tokens.flatten(0, 1)[index], z.flatten(0, 1)[index]), {}

    def draw_masks(self, batch: int) -> tuple[Tensor, int]:
        """(masks (B, T), the number of masked places in all of them). A mask hides 1 to T places, each number as likely.

        Pictures go in pairs: where one hides n places, its partner hides T + 1 - n. So every batch hides the same number,
        which compiled code likes, and the loss varies less. Without a partner: (T + 1) / 2.
        """
        places, device = self.grid**2, self.angles.device
        pairs, odd = batch // 2, batch % 2
        hidden = torch.randint(1, places + 1, (pairs,), device=device)
        hidden = torch.cat([hidden, places + 1 - hidden, hidden.new_full((odd,), (places + 1) // 2)])
        ranks = torch.rand(batch, places, device=device).argsort(1).argsort(1)  # the step at which a place is revealed
        ordered = torch.rand(batch, 1, device=device) < self.config.ordered
        ranks = torch.where(ordered, self.halton, ranks)
        return ranks >= places - hidden[:, None], pairs * (places + 1) + odd * ((places + 1) // 2)

    # --- Sampling

    def plan(self, batch: int, steps: int | None, order: str, generator: torch.Generator) -> tuple[Tensor, list[int]]:
        """(places (B, T) in the order in which they are revealed, how many are known after each step)."""
        count = self.grid**2
        if order not in ORDERS or (order == "raster") != self.causal:
            allowed = "raster" if self.causal else "random or halton"
            raise ValueError(f"order must be {allowed} for this network, got {order!r}")
        steps = steps or (count if self.causal else min(12, count))
        if not 1 <= steps <= count or (self.causal and steps != count):
            raise ValueError(f"steps must be {'' if self.causal else 'from 1 to '}the {count} tokens of a picture, got {steps}")
        ranks = {"random": torch.rand(batch, count, generator=generator, device=generator.device),
                 "halton": self.halton, "raster": torch.arange(count, device=generator.device)}[order]
        return ranks.argsort(-1).expand(batch, count), reveal_schedule(count, steps)

    @torch.no_grad()
    def reveal(self, labels: Tensor, steps: int | None = None, guidance: float = 1.0, temperature: float = 1.0, seed: int = 0,
               order: str | None = None, head_steps: int | None = None, cached: bool = True) -> list[Tensor]:
        """The tokens after every step, a list of (B, T, token_dim), not a number where masked. Arguments: see `sample`."""
        count, batch, generator = self.grid**2, len(labels), torch.Generator(labels.device).manual_seed(seed)
        places, schedule = self.plan(batch, steps, order or self.config.order, generator)
        labels = with_and_without(labels, self.config.classes, guidance)
        modulation = self.transformer.modulate(self.label(labels))  # the same at every step
        cache = Cache(self.transformer, len(labels), count, modulation.dtype) if self.causal and cached else None
        tokens = self.embedding.weight.new_full((batch, count, self.token_dim), float("nan"))
        before, history = 0, []
        for known in schedule:
            now = places[:, before:known]  # (B, n)
            inputs = tokens if guidance == 1 else torch.cat([tokens, tokens])
            if cache:
                first = max(before // self.grid - 1, 0) * self.grid  # the row above has all that a place hears of directly
                x = self.embed(inputs[:, first : first + 2 * self.grid])[:, before - first : known - first]
                z = self.transformer(x, self.angles[before:known], modulation=modulation, cache=cache)
            else:
                z = self.transformer(self.embed(inputs), self.angles, causal=self.causal, modulation=modulation)
                z = z.take_along_dim(now.repeat(len(z) // batch, 1)[..., None], 1)  # (B or 2 B, n, width)
            z, z_uncond = z.flatten(0, 1), None
            growing = 1 + (guidance - 1) * known / count  # at first, a picture's composition is left to chance
            if guidance != 1:
                z, z_uncond = z.chunk(2)
            drawn = self.head.sample(z, head_steps, temperature, generator, z_uncond, growing)
            if self.codes is not None:
                drawn = self.codes[self.nearest_code(drawn)]  # so that the network sees nothing but codes, as in training
            drawn = drawn.view(batch, known - before, self.token_dim).to(tokens.dtype)
            tokens = tokens.scatter(1, now[..., None].expand_as(drawn), drawn)
            before = known
            history.append(tokens)
        return history

    @torch.no_grad()
    def sample(self, labels: Tensor, steps: int | None = None, guidance: float = 1.0, temperature: float = 1.0, seed: int = 0,
               frames: bool = False, order: str | None = None, head_steps: int | None = None, cached: bool = True):
        """Pictures of these labels (B,): (B, 3, H, W) in [-1, 1]; with `frames`, also a list of the pictures on the way.

        steps: passes of the Transformer, 12 unless told (in a chain, one for each token); head_steps: passes of the head
        for each token (flow: 8 unless told, an odd one is left out; diffusion: 16); guidance: reached with the last token;
        temperature: of the head; order: random or halton; cached: in a chain, keep keys and values of the past. Raises
        ValueError for what cannot be.
        """
        history = self.reveal(labels, steps, guidance, temperature, seed, order, head_steps, cached)
        images = self.to_pictures(history[-1])
        return (images, [self.to_pictures(tokens) for tokens in history]) if frames else images


def check(config: Config, tokenizer: nn.Module | None) -> None:
    """Refuse, by name, what does not exist or does not go together."""
    for name, allowed in (("tokens", tuple(TOKENS)), ("order", ORDERS)):
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
    if config.head == "categorical" and config.tokens != "codes":
        raise ValueError(f"a categorical head chooses from a list: tokens must be codes, got {config.tokens!r}")
    if not 0 <= config.ordered <= 1:
        raise ValueError(f"ordered must be from 0 to 1, got {config.ordered}")
    if config.tokens == "patches":
        if config.size % PATCH:
            raise ValueError(f"size must be a multiple of {PATCH} pixels, got {config.size}")
    elif tokenizer is None:
        raise ValueError(f"tokens={config.tokens!r} needs a tokenizer with the bottleneck {TOKENS[config.tokens]!r}")


Model = MAR
