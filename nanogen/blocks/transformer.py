"""The Transformer, one for every chapter: chains of pixels, tokens in any order, scales, latents in noise, sound.

    x = x + attention(norm(x))        tokens exchange what they know
    x = x + mlp(norm(x))              each token thinks by itself

What differs between chapters is passed in, never built in:
    positions   coordinates of any dimension (1-D chains, 2-D grids, clips, several scales), as rotary angles
    mask        who may look at whom: causal for a chain, none for MaskGIT and flows, any boolean matrix
    condition   a vector that shifts, scales and gates every layer (class, time), or nothing
    cache       keys and values of the past, so that a new token costs one token's work

    python -m nanogen bench           # how near this comes to the machine's own limits

Sources: Vaswani et al. 2017 (the block); Zhang & Sennrich 2019 (RMSNorm); Su et al. 2021 (rotary positions);
Dehghani et al. 2023 (norms on queries and keys keep attention stable at high learning rates); Peebles & Xie 2023
(AdaLN-zero). Different from the papers: no biases, norms without gains (the next matrix can hold them), and one
matrix computes the modulations of all layers, so that a sampler may compute them once for a whole chain.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Transformer(nn.Module):
    """width: features of a token; depth: blocks; heads: attention heads, width / heads features each.

    condition: whether forward takes a condition vector of size `width`. expansion: features inside an MLP, times width.
    dropout: on every residual branch.
    """

    def __init__(self, width: int, depth: int, heads: int, condition: bool = True, expansion: int = 4, dropout: float = 0.0):
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} must split into {heads} heads of an even size")
        self.width, self.depth, self.heads = width, depth, heads
        self.blocks = nn.ModuleList(Block(width, heads, expansion, dropout) for _ in range(depth))
        self.modulation = nn.Linear(width, depth * 6 * width + 2 * width) if condition else None
        if condition:
            self.modulation.adamw = True  # its rows are many small vectors, not one map
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)  # gates start at 0: every block starts as the identity

    def modulate(self, condition: Tensor) -> Tensor:
        """(B, width) or (B, T, width) -> shifts, scales and gates for all layers, (B, 1 or T, 6 depth width + ...)."""
        modulation = self.modulation(F.silu(condition))
        return modulation[:, None] if modulation.ndim == 2 else modulation

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None = None, causal: bool = False,
                condition: Tensor | None = None, modulation: Tensor | None = None, cache: "Cache | None" = None) -> Tensor:
        """x: (B, T, width) -> (B, T, width), normalised at the end.

        angles: (T, width / heads / 2) from `rotary_angles`, of these T tokens.
        mask: boolean, broadcastable to (B, heads, T, S), True where a token may look; or causal=True; or neither.
        condition: see `modulate`; or its result as `modulation`. cache: then S counts the cached tokens too.
        """
        if condition is not None:
            modulation = self.modulate(condition)
        chunks = modulation.split(self.width, dim=-1) if modulation is not None else None
        rotation = torch.cat([angles.cos(), angles.sin()]).chunk(2)  # (T, head / 2) each
        for i, block in enumerate(self.blocks):
            parts = chunks[6 * i : 6 * i + 6] if chunks else None
            x = block(x, rotation, mask, causal, parts, cache.layers[i] if cache else None)
        x = norm(x)
        return x * (1 + chunks[-1]) + chunks[-2] if chunks else x


class Block(nn.Module):
    """Attention and MLP on a residual stream, each behind a norm."""

    def __init__(self, width: int, heads: int, expansion: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, expansion * width, bias=False)
        self.down = nn.Linear(expansion * width, width, bias=False)

    def forward(self, x: Tensor, rotation, mask, causal: bool, modulation, cache: "LayerCache | None") -> Tensor:
        if modulation is None:
            x = x + self.drop(self.attend(norm(x), rotation, mask, causal, cache))
            return x + self.drop(self.down(F.gelu(self.up(norm(x)))))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.drop(self.attend(norm(x) * (1 + scale1) + shift1, rotation, mask, causal, cache))
        return x + gate2 * self.drop(self.down(F.gelu(self.up(norm(x) * (1 + scale2) + shift2))))

    def attend(self, x: Tensor, rotation, mask, causal: bool, cache: "LayerCache | None") -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, T, head) each
        q, k = rotate(norm(q), rotation).to(v.dtype), rotate(norm(k), rotation).to(v.dtype)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.out(attention(q, k, v, mask, causal).transpose(1, 2).reshape(batch, tokens, width))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(head)) v, with q (B, heads, T, head) and k, v (B, heads, S, head).

    The fused kernel, except for little work on a CPU: in bfloat16 its backward pass takes five times as long as two plain
    products (T = S = 64), and a single query over a cache of 1,024 keys takes it 16 ms instead of 0.8 (torch 2.13).
    """
    tokens, seen = q.shape[2], k.shape[2]
    if q.device.type != "cpu" or tokens * seen > 256 * 256:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, heads, T, S)
    if causal:
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def norm(x: Tensor) -> Tensor:
    """RMSNorm without a gain: every vector to a mean square of 1."""
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)


def rotary_angles(positions: Tensor, head: int, base: float = 100.0) -> Tensor:
    """Coordinates (T, axes) -> angles (T, head / 2), the axes sharing the head's pairs of features evenly.

    Pair i of an axis turns by position * base^(-i / pairs): the first tell neighbours apart, the last see far.
    Pairs that are left over do not turn.
    """
    axes = positions.shape[1]
    pairs = head // 2 // axes
    frequencies = base ** -(torch.arange(pairs, device=positions.device) / pairs)
    angles = (positions[:, :, None].float() * frequencies).flatten(1)  # (T, axes * pairs)
    return F.pad(angles, (0, head // 2 - axes * pairs))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of features (i, i + head/2) of x (B, heads, T, head) by the angles whose (cos, sin) is `rotation`."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def grid_positions(*sizes: int) -> Tensor:
    """Coordinates of a raster, last axis fastest: grid_positions(8, 8) -> (64, 2)."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes))


class LayerCache:
    """Keys and values of one layer, (B, heads, capacity, head), written in place."""

    def __init__(self, shape: tuple[int, ...], device, dtype):
        self.k, self.v = torch.zeros(2, *shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class Cache:
    """Everything the past leaves behind: allocated once, filled token by token.

    Without a mask, new tokens see all cached ones and each other: right for one token at a time, and for a scale
    that is drawn in one go.
    """

    def __init__(self, transformer: Transformer, batch: int, capacity: int, dtype: torch.dtype = torch.float32):
        device = transformer.blocks[0].out.weight.device
        shape = (batch, transformer.heads, capacity, transformer.width // transformer.heads)
        self.layers = [LayerCache(shape, device, dtype) for _ in transformer.blocks]


class WordVectors(nn.Module):
    """A vector for each word of a vocabulary, and for `extra` further ones such as "masked": () -> (K + extra, width).

    The words of a language are unrelated signs. Ours look like something: a token stands for a patch, a number for a
    brightness, and `codes` (K, dim) say what. So a vector is a small function of the code plus a free part of its own, and
    what is learned about one word is learned about those like it too. `zero`: all start at 0, for an output layer.
    """

    def __init__(self, codes: Tensor, width: int, extra: int = 0, zero: bool = False):
        super().__init__()
        self.register_buffer("codes", (codes - codes.mean(0)) / codes.std(0), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(codes.shape[1], width), nn.GELU(), nn.Linear(width, width, bias=False))
        self.free = nn.Embedding(len(codes) + extra, width)
        nn.init.normal_(self.mlp[0].weight)  # large enough to tell neighbours apart
        nn.init.normal_(self.mlp[2].weight, std=0 if zero else width**-0.5)
        nn.init.normal_(self.free.weight, std=0 if zero else 0.2)

    def forward(self) -> Tensor:
        extra = len(self.free.weight) - len(self.codes)
        return F.pad(self.mlp(self.codes), (0, 0, 0, extra)) + self.free.weight


class ConditionEmbedding(nn.Module):
    """A class label (and, for flows, a time) -> one vector. The last label means "no label", for guidance.

    Ho & Salimans 2022, "Classifier-Free Diffusion Guidance": in training a tenth of the labels is hidden.
    """

    def __init__(self, classes: int, width: int, time: bool = False):
        super().__init__()
        self.label = nn.Embedding(classes + 1, width)
        self.time = TimeEmbedding(width) if time else None
        nn.init.normal_(self.label.weight, std=0.5)

    def forward(self, labels: Tensor, t: Tensor | None = None) -> Tensor:
        """labels: (B,) int64, t: (B,) in [0, 1] -> (B, width)."""
        vector = self.label(labels)
        return vector if self.time is None else vector + self.time(t)


def drop_labels(labels: Tensor, null: int, share: float = 0.1) -> Tensor:
    """Hide a share of the labels behind the label `null`."""
    return torch.where(torch.rand(labels.shape, device=labels.device) < share, null, labels)


class TimeEmbedding(nn.Module):
    """Sines and cosines of t at many frequencies, then a small MLP: (N,) -> (N, width)."""

    def __init__(self, width: int, frequencies: int = 64):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 3, frequencies), persistent=False)  # radians per unit
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))
