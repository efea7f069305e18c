"""MAR: masked autoregression on vectors. A Transformer sees all tokens, a head draws each new one.

    tokens        ? x ? x    vectors, not indices: nothing is rounded away
    Transformer              sees the known tokens and gives a hidden state z for each masked one
    head                     draws the token from p(token | z) in many cheap steps

MaskGIT needs a codebook because it answers with probabilities. A network trained to give a vector
by squared error gives the average of all plausible ones. A generation head (blocks/heads.py) draws
one of the plausible vectors: it is a diffusion model of a single token. As in MaskGIT, training
masks a random number of tokens; sampling starts with all masked and draws some in each pass, first
few and then more (cosine schedule), in an order you choose. In training, all numbers of masked
tokens are equally likely, from 1 to all of them. Guidance grows with the fraction of known tokens.
FD-nano is explained in the README; lower is better.

    python -m nanogen train mar --data cifar10      # FD-nano 23.8

Source: Li et al. 2024, "Autoregressive Image Generation without Vector Quantization".
Different from the paper: one Transformer, not an encoder and a decoder; class through AdaLN, not as
tokens; a 3x3 convolution over the grid; masks hide any number of tokens (paper: 70% or more).
Ours: a flow head, and two simpler ones to compare with; other tokens than latents; Halton order
(Besnier et al. 2025: any first n cells lie evenly), in the sampler and half of the training masks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.heads import HEADS, make_head
from nanogen.blocks.quantize import nearest
from nanogen.blocks.sampling import halton_ranks, reveal_schedule, with_and_without
from nanogen.blocks.standardize import Standardizer
from nanogen.blocks.transformer import ConditionEmbedding, Transformer, drop_labels, grid_angles
from nanogen.image import check_transformer
from nanogen.image.tokenizer import show_partial, split_known
from nanogen.method import Method, Requirement, check, choose, unused

PATCH = 4  # pixels on a side of a patch
TOKENS = {"latents": "kl", "codes": "vq", "patches": None}  # what a token is -> its bottleneck
UNUSED_FIELDS = {"mse": ("head_depth", "head_repeat"),  # head -> Config fields without effect
                 "categorical": ("head_width", "head_depth", "head_repeat")}


@dataclass
class Config:
    width: int = 192  # features per token
    depth: int = 6  # blocks
    heads: int = 3  # attention heads
    head: str = "flow"  # generation head: flow, diffusion, mse or categorical (for codes only)
    head_width: int = 192  # flow, diffusion, mse: features inside the head
    head_depth: int = 2  # flow, diffusion: layers of the head
    head_repeat: int = 4  # flow, diffusion: noises for each token of a training batch
    tokens: str = "latents"  # latents (of a KL tokenizer), codes (of a VQ tokenizer) or patches
    order: str = "halton"  # the sampler's default order: halton or random
    ordered: float = 0.5  # fraction of training masks that follow the Halton order; others: random
    dropout: float = 0.0  # on every residual branch
    label_dropout: float = 0.1  # fraction of training images whose label is hidden, for guidance
    size: int = 32  # side of the images in pixels
    classes: int = 10  # number of labels

    def __post_init__(self):
        choose(self, head=HEADS, tokens=tuple(TOKENS), order=("halton", "random"))
        check_transformer(self)
        unused(self, *UNUSED_FIELDS.get(self.head, ()), when=f"with head {self.head}")
        codes, patches = self.tokens == "codes", self.tokens == "patches"
        check(self, ordered=(self.ordered <= 1, "at most 1"),
              tokens=(codes or self.head != "categorical", "codes with head categorical"),
              size=(not patches or self.size % PATCH == 0, f"a multiple of {PATCH} for patches"))


class MAR(Method):
    """A Transformer over vectors, some of them masked, and a generation head."""

    def __init__(self, config: Config, base: nn.Module | None = None):
        super().__init__()
        if base is None and config.tokens != "patches":
            raise ValueError(f"tokens {config.tokens} require a {TOKENS[config.tokens]} tokenizer")
        self.config, self.encodes = config, config.tokens != "patches"
        self.freeze(tokenizer=base)
        width, codes, std = config.width, None, 1.0
        self.grid = base.grid if self.encodes else config.size // PATCH
        if config.tokens == "latents":
            dim = base.config.channels
        elif config.tokens == "codes":
            codes = base.code_vectors()  # below: the head expects mean 0 and std 1
            codes = (codes - codes.mean(0)) / codes.std(0).clamp(min=1e-5)  # 0 if all are alike
            dim = codes.shape[1]
        else:
            dim, std = 3 * PATCH**2, 3**-0.5  # as if pixels were uniform in [-1, 1]
        self.token_dim, self.standardize = dim, Standardizer(dim)  # latents: see `measure`
        self.standardize.std.fill_(std)
        self.register_buffer("codes", codes, persistent=False)  # (K, token_dim) or None
        self.embedding = nn.Linear(dim, width)
        self.mask = nn.Parameter(0.2 * torch.randn(width))  # learned, for masked tokens
        self.local = nn.Conv2d(width, width, 3, padding=1)
        self.label = ConditionEmbedding(config.classes, width)
        self.transformer = Transformer(width, config.depth, config.heads, dropout=config.dropout)
        self.head = make_head(config.head, dim, width, config.head_width, config.head_depth,
                              config.head_repeat, codes)
        angles = grid_angles(self.grid, self.grid, head=width // config.heads)
        self.register_buffer("angles", angles, persistent=False)
        self.register_buffer("halton", halton_ranks(self.grid), persistent=False)  # (T,)

    @staticmethod
    def requires(config: Config) -> Requirement | None:
        fields = {"bottleneck": TOKENS[config.tokens], "size": config.size}
        return None if config.tokens == "patches" else Requirement("tokenizer", fields)

    def hidden_states(self, tokens: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """tokens (B, T, token_dim), masked bool (B, T), labels (B,) -> z of all positions,
        (B, T, width); only those of masked tokens are used."""
        x = torch.where(masked[..., None], self.mask, self.embedding(tokens))
        square = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B, width, h, w)
        x = x + self.local(square).flatten(2).transpose(1, 2)
        return self.transformer(x, self.angles, condition=self.label(labels))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """The loss of the head on masked tokens, for a batch that `prepare` made."""
        tokens = self.to_tokens(batch)
        labels = drop_labels(batch["labels"], self.config.classes, self.config.label_dropout)
        masked, total = self.draw_masks(len(tokens))
        z = self.hidden_states(tokens, masked, labels)
        # positions of the masked tokens: topk, unlike nonzero, has a known shape
        index = masked.flatten().int().topk(total).indices
        return self.head.loss(tokens.flatten(0, 1)[index], z.flatten(0, 1)[index]), {}

    def draw_masks(self, batch: int) -> tuple[Tensor, int]:
        """(bool (B, T), the number of masked tokens in all). A mask puts the tokens in an order
        (Halton for a fraction `ordered`, else random) and hides the last n; n is uniform from 1 to
        T. Masks come in pairs of n and T + 1 - n, so every batch hides equally many tokens:
        compiled code needs this, and easy and hard masks balance."""
        count, device, pairs, odd = self.grid**2, self.angles.device, batch // 2, batch % 2
        half = (count + 1) // 2  # what a mask without a partner hides
        hidden = torch.randint(1, count + 1, (pairs,), device=device)
        hidden = torch.cat([hidden, count + 1 - hidden, hidden.new_full((odd,), half)])
        ranks = torch.rand(batch, count, device=device).argsort(1).argsort(1)  # (B, T) random
        ordered = torch.rand(batch, 1, device=device) < self.config.ordered
        masked = torch.where(ordered, self.halton, ranks) >= count - hidden[:, None]
        return masked, pairs * (count + 1) + odd * half

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, steps: int = 12, guidance: float = 1.0,
               temperature: float = 1.0, order: str | None = None, head_steps: int | None = None,
               known: Tensor | None = None, seed: int = 0, frames: bool = False) -> dict:
        """Images of these "labels" (B,): {"images": (B, 3, H, W) in [-1, 1]}, perhaps "frames".
        steps: Transformer passes; if there are fewer tokens, one for each. head_steps, temperature:
        of the head (None: flow 8, diffusion 16 steps). order: halton or random. known: vectors
        (B, T, token_dim) that stay, NaN: to draw."""
        labels, count, order = conditions["labels"], self.grid**2, order or self.config.order
        if order not in ("halton", "random"):
            raise ValueError(f"order must be halton or random, got {order!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        batch, generator = len(labels), torch.Generator(labels.device).manual_seed(seed)
        keys = torch.rand(batch, count, generator=generator, device=labels.device)
        keys = self.halton.expand(batch, count) if order == "halton" else keys
        tokens = torch.full((batch, count, self.token_dim), torch.nan, device=labels.device)
        tokens = tokens if known is None else known.to(tokens)
        given = ~tokens.isnan().any(2)  # (B, T)
        keys = keys.masked_fill(given, -1)  # what is given comes first
        before = int(given.sum(1).min())  # the image with the fewest sets the pace
        positions = keys.argsort(1)  # (B, T) in the order of drawing
        ranks = positions.argsort(1)  # (B, T) when each one is drawn
        labels = with_and_without(labels, self.config.classes, guidance)
        copies, images, left = 1 if guidance == 1 else 2, [], count - before
        for new in reveal_schedule(left, min(steps, left)):  # how many are drawn after a pass
            after = count - left + new
            now, masked = positions[:, before:after], (ranks >= before) & ~given  # to draw; (B, T)
            # z of all tokens (copies B, T, width), then of those to draw: (copies B n, width)
            z = self.hidden_states(tokens.repeat(copies, 1, 1), masked.repeat(copies, 1), labels)
            z = z.take_along_dim(now.repeat(copies, 1)[..., None], 1).flatten(0, 1)
            z, z_uncond = (z, None) if guidance == 1 else z.chunk(2)  # (B n, width)
            strength = 1 + (guidance - 1) * after / count
            drawn = self.head.sample(z, head_steps, temperature, generator, z_uncond, strength)
            if self.codes is not None:  # a flow head may miss the codes: take the nearest
                drawn = self.codes[nearest(drawn, self.codes)]
            drawn = drawn.view(batch, -1, self.token_dim).to(tokens.dtype)
            drawn = tokens.scatter(1, now[..., None].expand_as(drawn), drawn)
            tokens, before = torch.where(given[..., None], tokens, drawn), after
            if frames:
                images.append(self.to_images(tokens, (ranks < after) | given))
        images = images or [self.to_images(tokens, torch.ones_like(given))]
        return {"images": images[-1]} | ({"frames": images} if frames else {})

    def known_part(self, images: Tensor, seen: Tensor) -> Tensor:
        """See `Method.known_part`: vectors (B, T, token_dim), NaN where they are to be drawn."""
        images, cells = split_known(images, seen, self.grid)
        batch = {"images": images, "labels": None}
        tokens = self.to_tokens(self.prepare(batch) if self.encodes else batch)
        return tokens.masked_fill(~cells[:, None], torch.nan)

    # ---- tokens: latents of a KL tokenizer as in the paper; ours: codes, patches
    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> their "latents" (B, C, h, w) or "tokens" (B, T); labels stay."""
        name = {"latents": "latents", "codes": "tokens"}[self.config.tokens]  # patches: unused
        return {name: self.tokenizer.encode(batch["images"]), "labels": batch["labels"]}

    def measure(self, data: dict[str, Tensor]) -> None:
        """Store mean and std of each channel of "latents" (N, C, h, w)."""
        if self.config.tokens == "latents":
            self.standardize.measure(data["latents"].movedim(1, -1))

    def to_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """A prepared batch -> vectors of about mean 0 and std 1: (B, T, token_dim)."""
        if self.config.tokens == "codes":
            return F.embedding(batch["tokens"], self.codes)
        grid = batch["latents"] if self.encodes else F.pixel_unshuffle(batch["images"], PATCH)
        return self.standardize(grid.float().flatten(2).transpose(1, 2))

    @torch.no_grad()
    def to_images(self, tokens: Tensor, known: Tensor) -> Tensor:
        """Vectors (B, T, token_dim) -> images (B, 3, H, W); grey where not known, bool (B, T)."""
        if self.config.tokens == "codes":
            indices = nearest(tokens.flatten(0, 1), self.codes).view(known.shape)
            return show_partial(self.tokenizer, indices.masked_fill(~known, -1))
        x = self.standardize.inverse(tokens.where(known[..., None], 0))  # the mean where not known
        x = x.mT.unflatten(2, (self.grid, self.grid))
        x = self.tokenizer.decode(x) if self.encodes else F.pixel_shuffle(x, PATCH).clamp(-1, 1)
        cells = known.float().view(-1, 1, self.grid, self.grid)
        return x * F.interpolate(cells, self.config.size)


Model = MAR
