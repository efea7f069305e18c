"""The Transformer, one for all methods: pixels, tokens in any order, scales, latents, sound.

    x = x + attention(norm(x))        tokens exchange information
    x = x + mlp(norm(x))              each token is processed by itself

What differs between methods is passed in, never built in:
    positions   coordinates of any dimension (chains, grids, several scales), as rotary angles
    mask        which token sees which: causal for a chain, none for MaskGIT, any boolean matrix
    condition   a vector (class, time) that shifts, scales and gates every layer
    cache       keys and values of earlier tokens, so that they need not be computed again

Sources: Vaswani et al. 2017 (the block); Zhang & Sennrich 2019 (RMSNorm); Su et al. 2021 (rotary
positions); Peebles & Xie 2023 (AdaLN-zero); Henry et al. 2020, "Query-Key Normalization" (norms of
q and k, and a learned scale for each head: no attention logit exceeds scale * sqrt(head size));
Dehghani et al. 2023 (so attention stays stable at high learning rates).
Different from the papers: no biases; one matrix makes the modulations of all layers, so that a
sampler computes them only once; norms without gains, since a matrix follows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Transformer(nn.Module):
    """width: features of a token; depth: blocks; heads: attention heads, of width / heads features
    (an even number); expansion: an MLP has expansion * width inside; dropout: on every branch."""

    def __init__(self, width: int, depth: int, heads: int, expansion: int = 4,
                 dropout: float = 0.0):
        super().__init__()
        self.width, self.depth, self.heads = width, depth, heads
        self.blocks = nn.ModuleList(Block(width, heads, expansion, dropout) for _ in range(depth))
        # Zeroed, so that every block starts as the identity.
        self.modulation = zeroed(nn.Linear(width, (6 * depth + 2) * width), adamw=True)

    def modulate(self, condition: Tensor) -> list[Tensor]:
        """(B, width) or (B, T, width) -> shift, scale and gate of each attention and each MLP, then
        shift and scale of the end: (B, 1 or T, width) each. A scale is 1 plus what is learned."""
        condition = condition[:, None] if condition.ndim == 2 else condition
        parts = self.modulation(F.silu(condition)).split(self.width, dim=-1)
        return [1 + part if i % 3 == 1 else part for i, part in enumerate(parts)]

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None = None, causal: bool = False,
                condition: Tensor | None = None, modulation: list[Tensor] | None = None,
                cache: "Cache | None" = None) -> Tensor:
        """x: (B, T, width) -> (B, T, width), normalised at the end. angles: (T, width / heads / 2)
        from `rotary_angles`, of these T tokens. mask: boolean, fits (B, heads, T, S), True where a
        token may look; S includes the cached tokens. causal=True instead: each token sees itself
        and those before it. condition: see `modulate`; or pass its result as `modulation`."""
        if condition is not None:
            modulation = self.modulate(condition)
        cos, sin = angles.cos(), angles.sin()
        rotation = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # (T, head) each
        for i, block in enumerate(self.blocks):
            x = block(x, modulation[6 * i : 6 * i + 6], rotation, mask, causal, cache, i)
        if cache:
            cache.length += x.shape[1]
        return torch.addcmul(modulation[-2], norm(x), modulation[-1])


class Block(nn.Module):
    """Attention and an MLP, each after a norm and added to the residual stream."""

    def __init__(self, width: int, heads: int, expansion: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(dropout)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.scale = nn.Parameter(torch.ones(heads))  # of the logits: larger, more peaked
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, expansion * width, bias=False)
        self.down = nn.Linear(expansion * width, width, bias=False)

    def forward(self, x: Tensor, modulation: list[Tensor], *context) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (B, 1 or T, width) each
        y = torch.addcmul(shift1, norm(x), scale1)  # shift + norm * scale, in one pass over memory
        x = torch.addcmul(x, gate1, self.drop(self.attend(y, *context)))
        y = torch.addcmul(shift2, norm(x), scale2)
        return torch.addcmul(x, gate2, self.drop(self.mlp(y)))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def attend(self, x: Tensor, rotation, mask, causal: bool, cache, layer: int) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        qk, v = qkv.split((2, 1))  # q and k together: half as many calls
        q, k = rotate(norm(qk), rotation)  # (B, heads, T, head) each
        q, k, v = (q * self.scale.view(-1, 1, 1)).to(v.dtype), k.to(v.dtype), v.squeeze(0)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return self.out(attention(q, k, v, mask, causal).transpose(1, 2).flatten(2))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
              causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(head)) v, with q (B, heads, T, head) and k, v (B, heads, S, head).
    The fused kernel is slow for short chains on a CPU in bfloat16 (torch 2.13): plain products are
    5 times as fast in the backward pass of T = S = 64, and 20 times for one query of 1,024 keys."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[2] * k.shape[2] > 256**2:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, heads, T, S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def zeroed(layer: nn.Module, adamw: bool = False) -> nn.Module:
    """The layer, with weights and bias 0. adamw: train it by AdamW, not by Muon."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    layer.adamw = adamw
    return layer


def norm(x: Tensor) -> Tensor:
    """RMSNorm without a gain: every vector to a mean square of 1."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x * torch.rsqrt(length.square() / x.shape[-1] + 1e-6).to(x.dtype)


def rotary_angles(positions: Tensor, head: int, base: float = 100.0) -> Tensor:
    """Coordinates (T, axes) -> angles (T, head / 2), the same number of pairs for each axis. Pair i
    of an axis turns by position * base^(-i / pairs): the first pairs tell neighbours apart, the
    last ones distant positions. Pairs that are left over do not turn."""
    axes = positions.shape[1]
    pairs = head // 2 // axes
    frequencies = base ** -(torch.arange(pairs, device=positions.device) / pairs)
    angles = (positions[:, :, None].float() * frequencies).flatten(1)  # (T, axes * pairs)
    return F.pad(angles, (0, head // 2 - axes * pairs))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of features (i, i + head/2) of x (..., T, head): (a, b) becomes
    (a cos - b sin, b cos + a sin). rotation, (T, head) each: (cos, cos) and (-sin, sin)."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def grid_positions(*sizes: int) -> Tensor:
    """Coordinates of a raster, last axis fastest: grid_positions(8, 8) -> (64, 2)."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes))


def grid_angles(*sizes: int, head: int) -> Tensor:
    """`rotary_angles` of all cells of such a raster."""
    return rotary_angles(grid_positions(*sizes), head)


class Cache:
    """Keys and values of all layers, for `capacity` tokens, of which `length` are known. Without a
    mask, new tokens see the cached ones and each other, as in a scale that is drawn at once."""

    def __init__(self, transformer: Transformer, batch: int, capacity: int,
                 dtype: torch.dtype = torch.float32):
        weight, heads = transformer.blocks[0].out.weight, transformer.heads
        shape = (2, transformer.depth, batch, heads, capacity, transformer.width // heads)
        both = torch.zeros(shape, device=weight.device, dtype=dtype)
        self.k, self.v = (layers.unbind() for layers in both)  # a tensor for each layer
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v of new tokens (B, heads, T, head) -> those of all tokens, (B, heads, S, head)."""
        k_all, v_all, end = self.k[layer], self.v[layer], self.length + k.shape[2]
        k_all[:, :, self.length : end] = k
        v_all[:, :, self.length : end] = v
        return k_all[:, :, :end], v_all[:, :, :end]


class CodeEmbedding(nn.Module):
    """One vector for each code of a codebook: an MLP of the code, plus an ordinary embedding. The
    MLP gives similar codes similar vectors, so what is learned about one helps with the others.
    codes: (K, dim). extra: number of further vectors without a code, such as "masked". zero: all
    vectors start at 0, for an output layer."""

    def __init__(self, codes: Tensor, width: int, extra: int = 0, zero: bool = False):
        super().__init__()
        codes = (codes - codes.mean(0)) / codes.std(0).clamp(min=1e-5)  # 0 if all are alike
        self.register_buffer("codes", codes, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(codes.shape[1], width), nn.GELU(), nn.Linear(width, width, bias=False))
        self.free = nn.Embedding(len(codes) + extra, width)
        nn.init.normal_(self.mlp[0].weight)  # large enough to tell neighbours apart
        nn.init.normal_(self.mlp[2].weight, std=0 if zero else width**-0.5)
        nn.init.normal_(self.free.weight, std=0 if zero else 0.2)

    def forward(self) -> Tensor:
        """All vectors: (K + extra, width)."""
        extra = len(self.free.weight) - len(self.codes)
        return F.pad(self.mlp(self.codes), (0, 0, 0, extra)) + self.free.weight


class ConditionEmbedding(nn.Module):
    """A class label (and, for flows, a time) -> one vector. Index `classes` is the null class, for
    guidance (Ho & Salimans 2022, "Classifier-Free Diffusion Guidance")."""

    def __init__(self, classes: int, width: int, time: bool = False):
        super().__init__()
        self.label = nn.Embedding(classes + 1, width)
        self.time = TimeEmbedding(width) if time else None
        nn.init.normal_(self.label.weight, std=0.5)

    def forward(self, labels: Tensor, t: Tensor | None = None) -> Tensor:
        """labels: (B,) int64, t: (B,) in [0, 1] -> (B, width)."""
        vector = self.label(labels)
        return vector if self.time is None else vector + self.time(t)


def drop_labels(labels: Tensor, null: int, fraction: float = 0.1) -> Tensor:
    """Replace a random fraction of the labels by the null class: training for guidance."""
    return torch.where(torch.rand(labels.shape, device=labels.device) < fraction, null, labels)


class TimeEmbedding(nn.Module):
    """sin(w t) and cos(w t) for many w from 1 to 1,000, then a small MLP: (N,) -> (N, width)."""

    def __init__(self, width: int, count: int = 64):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 3, count), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * count, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))
