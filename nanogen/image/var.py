"""VAR: an image as people paint it, the whole thing roughly and then finer, scale by scale.

    scale 1x1     one token: about the mean colour
    scale 2x2     4 tokens in one pass, given the first
    scale 4x4     16 tokens in one pass, given the 5 before
    scale 8x8     64 tokens in one pass (as published), given the 21 before

One step of this autoregressive model is a whole scale: "next scale" instead of "next token". The
tokenizer is `--bottleneck multiscale` (blocks/multiscale.py). The Transformer gets the features so
far (the sum of what all earlier scales added), shrunk to the present scale, and gives a token for
each cell. The mask is block-causal: a cell sees its own scale and all before. Guidance grows from
scale to scale. FD-nano is explained in the README; lower is better.

    python -m nanogen train var --data cifar10      # FD-nano 13.6

Ours, on top of the paper:
    passes=(3,)       three passes for the last scale: 16, 16 and 32 tokens, spread evenly. Tokens
                      of one pass do not see each other's choice: with 64 of them, they do not
                      fit together. passes=(1,) is VAR as published.
    hide_scale=True   the unconditional prediction of guidance sees neither the label nor the
                      earlier passes of its own scale. hide_scale=False hides only the label.

Sources: Tian et al. 2024, "Visual Autoregressive Modeling". For ours: Kumbong et al. 2025, "HMAR"
(several passes for a scale; there with random masks); Song et al. 2025, "History-Guided Video
Diffusion", Liao et al. 2026, "Visual Prefix Guidance" (guidance that hides what has been drawn).
Different from VAR: class through AdaLN alone; rotary positions, where a cell truly is in the image;
a 3x3 convolution over the input; scales double.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.multiscale import shrink
from nanogen.blocks.sampling import apply_guidance, draw, with_and_without
from nanogen.blocks.transformer import (
    Cache,
    CodeEmbedding,
    ConditionEmbedding,
    Transformer,
    drop_labels,
    grid_positions,
    rotary_angles,
)
from nanogen.image import check_transformer
from nanogen.image.tokenizer import split_known
from nanogen.method import Method, Requirement, check


@dataclass
class Config:
    width: int = 192  # features per token
    depth: int = 6  # blocks
    heads: int = 3  # attention heads
    dropout: float = 0.0  # on every residual branch
    label_dropout: float = 0.1  # fraction of training images whose label is hidden, for guidance
    codebook_size: int = 184  # 85 tokens x 7.5 bits = the 64 x 10 bits of the one-scale tokenizer
    passes: tuple[int, ...] = (3,)  # for the last scale, or the last few; earlier scales take one
    size: int = 32  # side of the images in pixels
    classes: int = 10  # number of labels

    def __post_init__(self):
        check_transformer(self)
        check(self, passes=(min(self.passes, default=0) > 0, "numbers of at least 1"))


class VAR(Method):
    """A Transformer over the scales of a frozen multi-scale tokenizer."""

    encodes = True

    def __init__(self, config: Config, base: nn.Module):
        super().__init__()
        self.config, width, self.codebook_size = config, config.width, base.codebook_size
        self.freeze(tokenizer=base)
        self.scales = scales = base.quantizer.scales  # sides: 1, 2, 4, 8
        pass_of, self.scale_of_pass = plan(scales, config.passes)
        self.pass_sizes = pass_of.bincount().tolist()  # tokens of each pass
        self.scale_ends = list(accumulate(side**2 for side in scales))
        self.label = ConditionEmbedding(config.classes, width)
        self.embed = nn.Conv2d(base.config.code_dim, width, 3, padding=1)
        self.pass_embedding = nn.Embedding(len(self.pass_sizes), width)
        self.transformer = Transformer(width, config.depth, config.heads, dropout=config.dropout)
        self.head = CodeEmbedding(base.code_vectors(), width, zero=True)  # vectors of the K codes
        centres = [(grid_positions(side, side) + 0.5) * (scales[-1] / side) for side in scales]
        order = pass_of.argsort(stable=True)  # (T,): the token at each place, pass by pass
        angles = rotary_angles(torch.cat(centres)[order], width // config.heads)
        i, k = pass_of[order], torch.tensor(self.scale_of_pass)[pass_of[order]]  # pass, scale (T,)
        blind = (i[:, None] == i) | (k[:, None] > k)  # its own pass, coarser scales, nothing else
        for name, buffer in {"angles": angles, "pass_of": pass_of, "order": order,
                             "mask": i[:, None] >= i, "blind_mask": blind}.items():  # (T, T)
            self.register_buffer(name, buffer, persistent=False)

    @staticmethod
    def requires(config: Config) -> Requirement:
        return Requirement("tokenizer", {"bottleneck": "multiscale", "size": config.size,
                                         "codebook_size": config.codebook_size})

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> their "tokens" (B, T), coarse to fine; the labels stay."""
        return {"tokens": self.tokenizer.encode(batch["images"]), "labels": batch["labels"]}

    def known_part(self, images: Tensor, seen: Tensor) -> Tensor:
        """See `Method.known_part`: features (B, code_dim, h, h), NaN where they are to be drawn."""
        images, known = split_known(images, seen, self.scales[-1])
        features = self.tokenizer.encoder(images).permute(0, 2, 3, 1)
        features = self.tokenizer.quantizer.features(features)
        return features.where(known.view(features.shape[-2:]), torch.nan)

    def input(self, tokens: Tensor, i: int, sums: list[Tensor], blind: bool = False) -> Tensor:
        """Input of pass i: (B, its tokens, width), from the features so far (B, code_dim, 8, 8).
        tokens: (B, T). Those of pass i and later are not used: their cells get the mean of their
        scale. So pass 0 sees only a mean: there is no start token. sums: the features after each
        finished scale, a cache of the caller: [] before pass 0, then the same list for every pass;
        what is missing is appended. blind: see the mask above."""
        scale, quantizer = self.scale_of_pass[i], self.tokenizer.quantizer
        side, end = self.scales[scale], self.scale_ends[scale]
        own = slice(end - side**2, end)  # tokens of this scale
        cells = self.order.split(self.pass_sizes)[i] - own.start  # numbered in their scale
        # A blind pass gets what the first pass of its scale gets in training, for other cells.
        i = self.scale_of_pass.index(scale) if blind else i
        with torch.no_grad():
            parts = quantizer.split(tokens[:, :end])
            while len(sums) < scale:
                sums.append(quantizer.add(sums, parts[len(sums)]))
            so_far = quantizer.add(sums, parts[scale], self.pass_of[own] < i)
        x = self.embed(shrink(so_far, side)).flatten(2).transpose(1, 2)  # (B, side^2, width)
        return x[:, cells] + self.pass_embedding.weight[i]

    def logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """All tokens (B, T) -> logits of each, given the passes before its own: (B, T, K)."""
        sums: list[Tensor] = []
        x = torch.cat([self.input(tokens, i, sums) for i in range(len(self.pass_sizes))], dim=1)
        x = self.transformer(x, self.angles, mask=self.mask, condition=self.label(labels))
        return (x[:, self.order.argsort()] @ self.head().mT).float()  # pass order -> token order

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "tokens" (B, T), "labels" (B,). Cross-entropy in nats per token."""
        tokens = batch["tokens"]
        labels = drop_labels(batch["labels"], self.config.classes, self.config.label_dropout)
        logits = self.logits(tokens, labels).flatten(0, 1)
        each = F.cross_entropy(logits, tokens.flatten(), reduction="none").view_as(tokens)
        parts = zip(self.scales, self.tokenizer.quantizer.split(each.detach()), strict=True)
        return each.mean(), {f"loss_{side}x{side}": part.mean() for side, part in parts}

    @torch.no_grad()
    def draw_tokens(self, labels: Tensor, guidance: float = 1.0, temperature: float = 1.0,
                    seed: int = 0, top_k: int = 0, top_p: float = 1.0, hide_scale: bool = True,
                    cached: bool = True, known: Tensor | None = None,
                    prefix: Tensor | None = None) -> Tensor:
        """The tokens of images of these labels (B,): (B, T). Settings: see `sample`. prefix: tokens
        (B, n) of the first scales, which stay; ValueError if the last of these is incomplete."""
        count, finest, ends = len(labels), len(self.scales) - 1, self.scale_ends
        prefix = labels.new_zeros(count, 0) if prefix is None else prefix
        if (given := prefix.shape[1]) not in (0, *ends):
            raise ValueError(f"prefix must be whole scales, {ends} tokens, got {given}")
        generator = torch.Generator(labels.device).manual_seed(seed)
        tokens = F.pad(prefix, (0, len(self.pass_of) - given))
        labels = with_and_without(labels, self.config.classes, guidance)
        modulation, head = self.transformer.modulate(self.label(labels)), self.head()
        cache = Cache(self.transformer, len(labels), len(self.pass_of), modulation[0].dtype)
        mask, inputs, sums, end = self.mask, [], [], 0
        if guidance != 1 and hide_scale:  # (2 B, 1, T, T)
            mask = torch.stack([mask, self.blind_mask]).repeat_interleave(count, 0)[:, None]
        for i, positions in enumerate(self.order.split(self.pass_sizes)):
            x, scale = self.input(tokens, i, sums), self.scale_of_pass[i]
            if guidance != 1:  # the first pass of a scale has nothing to hide
                hide = hide_scale and i > self.scale_of_pass.index(scale)
                x = torch.cat([x, self.input(tokens, i, sums, blind=True) if hide else x])
            inputs.append(x)
            start, end = (end if cached else 0), end + len(positions)
            x = x if cached else torch.cat(inputs, dim=1)
            x = self.transformer(x, self.angles[start:end], mask[..., start:end, :end],
                                 modulation=modulation, cache=cache if cached else None)
            logits = (x[:, -len(positions) :] @ head.mT).float()
            strength = 1 + (guidance - 1) * scale / finest if finest else guidance  # as VAR does
            logits = logits[:count] if strength == 1 else apply_guidance(logits, strength)
            if ends[scale] > given:  # given scales only fill the cache
                tokens[:, positions] = draw(logits, generator, temperature, top_k, top_p)
            if known is not None:  # what its features still lack, where a cell is known as a whole
                rest = known - (sums[scale - 1] if scale else 0)
                whole = ~shrink(rest, self.scales[scale]).isnan().any(1).flatten(1)
                own = slice(ends[scale] - self.scales[scale]**2, ends[scale])
                codes = self.tokenizer.quantizer.code(rest, scale)
                tokens[:, own] = torch.where(whole, codes, tokens[:, own])
        return tokens

    def sample(self, conditions: dict[str, Tensor], *, guidance: float = 1.0,
               temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, cached: bool = True,
               hide_scale: bool = True, known: Tensor | None = None, seed: int = 0,
               frames: bool = False) -> dict:
        """Images of these "labels" (B,): {"images": (B, 3, H, W) in [-1, 1]}, perhaps "frames".
        hide_scale: see the top. cached=False computes the past anew. known: features (B, code_dim,
        h, h) that stay, NaN: to draw. Others: blocks/sampling.py."""
        tokens, images = self.draw_tokens(
            conditions["labels"], guidance, temperature, seed, top_k=top_k, top_p=top_p,
            hide_scale=hide_scale, cached=cached, known=known), []
        for i in range(0 if frames else len(self.pass_sizes) - 1, len(self.pass_sizes)):
            end = self.scale_ends[self.scale_of_pass[i]]
            images.append(self.tokenizer.decode(tokens[:, :end], known=self.pass_of[:end] <= i))
        return {"images": images[-1]} | ({"frames": images} if frames else {})


# ---- Ours: several passes for a scale
def plan(scales: tuple[int, ...], passes: tuple[int, ...]) -> tuple[Tensor, list[int]]:
    """The pass that draws each token, (T,), scale after scale; and the scale of each pass.
    passes: for the last scale, or the last few; earlier scales take one. ValueError if too many."""
    if len(passes) > len(scales):
        raise ValueError(f"passes must be for at most {len(scales)} scales, got {passes}")
    passes = (1,) * (len(scales) - len(passes)) + tuple(passes)
    scale_of_pass = [k for k, count in enumerate(passes) for _ in range(count)]
    parts = [scale_of_pass.index(k) + spread(side, passes[k]) for k, side in enumerate(scales)]
    if sum(len(part.unique()) for part in parts) < len(scale_of_pass):  # some pass draws no cell
        raise ValueError(f"passes {passes} are more than the cells of the scales {scales} allow")
    return torch.cat(parts), scale_of_pass


def spread(side: int, passes: int) -> Tensor:
    """The pass that draws each cell of a grid, (side^2,). Each pass after the first doubles the
    known cells, evenly, in Bayer's dithering order (1973): the last draws one chessboard colour."""
    ranks = torch.zeros(1, 1)
    while len(ranks) < side:
        top = torch.cat([4 * ranks, 4 * ranks + 2], 1)
        ranks = torch.cat([top, torch.cat([4 * ranks + 3, 4 * ranks + 1], 1)])
    ranks = ranks[:side, :side].flatten().argsort().argsort()
    # 3 passes of 8x8 draw 16, 16, 32 cells: floor(log2) is -1 for ranks 32 to 63, -2 for 16 to 31.
    return (passes + ((ranks + 0.5) / side**2).log2().floor()).clamp(min=0).long()


Model = VAR
