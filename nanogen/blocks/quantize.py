"""Quantizers: turn a continuous feature into a token, and a token back into a feature.

For features (..., dim); a fourth quantizer is in multiscale.py:

    VectorQuantizer   a codebook of K learned vectors; the token is the index of the nearest one
    FSQ               round a few bounded channels: the codebook is a fixed grid
    ResidualVQ        several codebooks in turn: each codes the error that the ones before it left

The gradient of rounding is zero almost everywhere, so the backward pass treats it as the identity
(straight-through). All arithmetic is float32, because bfloat16 cannot tell 1,024 codes apart.

A learned codebook tends to leave most of its codes unused. Four measures against it:
  - codes of few dimensions on the unit sphere: in 8 dimensions every code is near some features;
  - k-means on the first batch, so that the codebook starts where the features are;
  - moving averages (EMA), not gradients: each code is the mean of the features that chose it;
  - dead codes, those much rarer than 1/K, move onto features of the batch.

Sources: van den Oord et al. 2017 (VQ-VAE; EMA in appendix A); Yu et al. 2021, "Improved VQGAN"
(normalised codes of few dimensions); Mentzer et al. 2023, "Finite Scalar Quantization"; Zeghidour
et al. 2021, "SoundStream"; Défossez et al. 2022, "EnCodec"; Kumar et al. 2023, "DAC" (dropout).
Different here: normalised codes with EMA (Yu et al. use gradients); FSQ's even levels lie
symmetrically about 0; one straight-through around the whole residual chain.
"""

from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    codes: Tensor  # (..., dim): the features after quantization; gradients pass straight through
    indices: Tensor  # int64 (...); ResidualVQ: (..., depth); MultiScaleVQ: (B, sum of scale^2)
    loss: Tensor  # scalar: distance of the features from their codes (commitment); 0 for FSQ


class Quantizer(nn.Module):
    """Linear maps to the space of the codes and back; a subclass has `quantize` and `lookup`."""

    lowest = 0  # the smallest index

    def __init__(self, dim: int, code_dim: int | None):
        super().__init__()
        self.project_in = nn.Identity() if code_dim is None else nn.Linear(dim, code_dim)
        self.project_out = nn.Identity() if code_dim is None else nn.Linear(code_dim, dim)

    def forward(self, x: Tensor, **options) -> Quantized:
        """x: (..., dim), at least 2 axes -> Quantized. options: of `quantize`."""
        with torch.autocast(x.device.type, enabled=False):
            q, indices, loss = self.quantize(self.project_in(x.float()), **options)
            return Quantized(self.project_out(q).to(x.dtype), indices, loss)

    @torch.no_grad()
    def encode(self, x: Tensor, **options) -> Tensor:
        """The indices of features x (..., dim) alone. In training mode, too, nothing is learned."""
        training = self.training
        try:
            return self.eval()(x, **options).indices
        finally:
            self.train(training)

    def decode(self, indices: Tensor, **options) -> Tensor:
        """The codes of these indices, as forward gives them: int64 (...) -> float32 (..., dim).
        IndexError for an index outside the codebook. options: of `lookup`."""
        wrong = indices[(indices < self.lowest) | (indices >= self.codebook_size)]
        if len(wrong):
            raise IndexError(f"{int(wrong[0])} is none of the {self.codebook_size} codes")
        with torch.autocast(indices.device.type, enabled=False):
            return self.project_out(self.lookup(indices, **options))


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """The value of q (exactly, as z - z is 0) with the gradient of z."""
    return q.detach() + (z - z.detach())


class VectorQuantizer(Quantizer):
    """The nearest of K learned vectors. code_dim: the codes lie on the unit sphere in so many
    dimensions; None: anywhere in `dim` dimensions. commitment: weight of the loss (z - code)^2,
    which keeps features near codes. decay, dead_below: see `Codebook`."""

    def __init__(self, dim: int, codebook_size: int, code_dim: int | None = 8,
                 commitment: float = 0.25, decay: float = 0.99, dead_below: float = 0.05):
        super().__init__(dim, code_dim)
        self.codebook_size, self.commitment = codebook_size, commitment
        sphere = code_dim is not None
        self.codebook = Codebook(code_dim or dim, codebook_size, sphere, decay, dead_below)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z: (..., code_dim) -> codes (..., code_dim), indices (...), commitment loss."""
        z = F.normalize(z, dim=-1) if self.codebook.normalise else z
        q, indices = self.codebook(z)
        return straight_through(z, q), indices, self.commitment * F.mse_loss(z, q)

    def lookup(self, indices: Tensor, known: Tensor | None = None) -> Tensor:
        """Indices (...) -> vectors of the codebook (..., code_dim). known: bool (...), where to
        look; the others get the mean of the codebook."""
        codes, vectors = F.embedding(indices, self.codebook.vectors), self.codebook.vectors
        return codes if known is None else torch.where(known[..., None], codes, vectors.mean(0))


class FSQ(Quantizer):
    """Finite scalar quantization: channel i, in [-1, 1], is rounded to one of levels[i] values, at
    least 2. These digits, read as one number of mixed base, are the index: levels (8, 5, 5, 5) give
    1,000 codes. There is no codebook to learn, no loss, and no dead code."""

    def __init__(self, dim: int, levels: tuple[int, ...] = (8, 5, 5, 5)):
        super().__init__(dim, len(levels))
        self.codebook_size = prod(levels)
        strides = [prod(levels[:i]) for i in range(len(levels))]  # 1, 8, 40, 200
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)
        # Channels of unit variance, which tanh spreads over all levels. With PyTorch's smaller
        # default the outer levels would stay empty.
        nn.init.orthogonal_(self.project_in.weight)
        nn.init.zeros_(self.project_in.bias)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z: (..., channels) -> codes (..., channels), indices (...), loss 0."""
        z = z.tanh()
        digits = torch.round((z + 1) / 2 * (self.levels - 1)).long()
        indices = (digits * self.strides).sum(-1)
        return straight_through(z, self.lookup(indices)), indices, z.new_zeros(())

    def lookup(self, indices: Tensor, known: Tensor | None = None) -> Tensor:
        """Indices (...) -> channels (..., channels), each of levels[i] values from -1 to 1. known:
        bool (...), where to look; the others get 0, the mean of the codes."""
        digits = indices[..., None] // self.strides % self.levels
        codes = 2 * digits / (self.levels - 1) - 1
        return codes if known is None else codes * known[..., None]


class ResidualVQ(Quantizer):
    """`depth` codebooks in turn, each for the error that those before it left; the sum is the code.
    Sound needs it: one codebook of 2^64 codes is impossible, 8 codebooks of 256 have 8 x 8 bits.

    dropout: in training, this fraction of the samples (first axis of x) uses only the first n
    codebooks, n random, so that the decoder also works at lower bit rates. Codes that are not sent
    have index -1, and do not move their codebook after the first batch. code_dim: size of a code
    (None: dim). Codes are not normalised, since late residuals are small.

    The codes are constants, with one straight-through around the whole chain: every commitment loss
    reaches z, and the decoder's gradient reaches it once. With a straight-through in each codebook
    (EnCodec), z - q_1 has no gradient, so only the first commitment loss reaches the encoder."""

    lowest = -1

    def __init__(self, dim: int, codebook_size: int, depth: int, code_dim: int | None = None,
                 commitment: float = 0.25, dropout: float = 0.5, decay: float = 0.99,
                 dead_below: float = 0.05):
        super().__init__(dim, code_dim)
        self.codebook_size, self.depth = codebook_size, depth
        self.commitment, self.dropout = commitment, dropout
        options = code_dim or dim, codebook_size, False, decay, dead_below
        self.codebooks = nn.ModuleList(Codebook(*options) for _ in range(depth))

    def quantize(self, z: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """z: (B, ..., code_dim) -> codes of that shape, indices (B, ..., depth), commitment loss.
        depth: use only the first so many codebooks; ValueError if there are fewer."""
        depth = self.depth if depth is None else depth
        if not 1 <= depth <= self.depth:
            raise ValueError(f"depth must be from 1 to {self.depth}, got {depth}")
        depths = self.draw_depths(len(z), depth, z.device).view(-1, *[1] * (z.dim() - 2))
        total, indices, losses, weights = torch.zeros_like(z), [], [], []
        for k, codebook in enumerate(self.codebooks[:depth]):
            sent = (depths > k).expand(z.shape[:-1])  # (B, ...)
            residual = z - total  # total is a constant: the gradient of every residual is that of z
            q, index = codebook(residual, learn=sent)
            losses.append((residual - q).square().mean(-1) * sent)
            weights.append(sent)
            total = total + q * sent[..., None]
            indices.append(torch.where(sent, index, -1))
        loss = torch.stack(losses).sum() / torch.stack(weights).sum()
        return straight_through(z, total), torch.stack(indices, dim=-1), self.commitment * loss

    def draw_depths(self, count: int, depth: int, device: torch.device) -> Tensor:
        """How many codebooks each of `count` samples is sent with: int64 (count,)."""
        full = torch.full((count,), depth, device=device)
        if not self.training or self.dropout == 0:
            return full
        drawn = torch.randint(1, depth + 1, (count,), device=device)
        return torch.where(torch.rand(count, device=device) < self.dropout, drawn, full)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (..., d), d <= depth, -1 if not sent -> sum of the vectors (..., code_dim)."""
        sent = zip(indices.unbind(-1), self.codebooks, strict=False)
        return sum(F.embedding(index.clamp(min=0), codebook.vectors) * (index >= 0)[..., None]
                   for index, codebook in sent)


def usage(indices: Tensor, codebook_size: int) -> tuple[float, float]:
    """(fraction of the codes that occur, perplexity) of indices of any shape; -1 is ignored.
    Perplexity exp(-sum p log p) is the number of equally likely codes with the same entropy, K at
    best. Measure an epoch: a batch of 256 tokens shows at most 256 of 1,024 codes. Of a ResidualVQ,
    pass one codebook: `indices[..., k]`. ValueError for no indices."""
    flat = indices[indices >= 0].cpu()  # MPS has no float64
    if flat.numel() == 0:
        raise ValueError("usage needs at least one index")
    p = torch.bincount(flat, minlength=codebook_size).double() / flat.numel()
    entropy = -torch.special.xlogy(p, p).sum()
    return (p > 0).double().mean().item(), entropy.exp().item()


# ---- how a codebook learns, with one process or several

class Codebook(nn.Module):
    """K vectors, each the moving average of the features that choose it: buffers, not parameters.
    decay: of the averages. dead_below: a code is dead if it is chosen less often than this fraction
    of the average code. Processes that train together keep one codebook (see `gather`)."""

    def __init__(self, dim: int, size: int, normalise: bool, decay: float, dead_below: float):
        super().__init__()
        self.normalise, self.decay, self.dead_below = normalise, decay, dead_below
        vectors = torch.randn(size, dim)
        self.register_buffer("vectors", F.normalize(vectors, dim=-1) if normalise else vectors)
        self.register_buffer("counts", torch.zeros(size))  # EMA: how often a batch chose each code
        self.register_buffer("sums", torch.zeros(size, dim))  # EMA: sum of the features that did
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x: Tensor, learn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (..., dim) -> vectors (..., dim) without gradient, indices (...). In training, the
        first batch starts the codebook; later ones move it. learn: bool (...), which x move it."""
        x = x.detach().float()
        first = self.training and not self.initialised
        if first:
            self.start(x.flatten(0, -2))
        indices = nearest(x, self.vectors)
        vectors = self.vectors[indices]
        if self.training and not first:
            use = ... if learn is None else learn
            self.update(x[use].flatten(0, -2), indices[use].flatten())
        return vectors, indices

    @torch.no_grad()
    def start(self, features: Tensor, lloyd_steps: int = 10) -> None:
        """k-means on (a random part of) the first batch, features (N, dim). With fewer features
        than codes, the other codes stay as they are until they count as dead."""
        features, size = gather(features), len(self.vectors)
        points = features[torch.randperm(len(features), device=features.device)[: 32 * size]]
        self.vectors[: len(points)] = points[:size]
        self.counts[:], self.sums[:] = self.totals(points, nearest(points, self.vectors))
        for _ in range(lloyd_steps):
            self.move_to_means()
            self.counts[:], self.sums[:] = self.totals(points, nearest(points, self.vectors))
        self.synchronise()
        self.initialised.fill_(True)

    @torch.no_grad()
    def update(self, features: Tensor, indices: Tensor) -> None:
        """Move the averages by features (N, dim) and their codes (N,), and revive dead codes."""
        counts, sums = (gather(part[None]).sum(0) for part in self.totals(features, indices))
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.move_to_means()
        average = self.counts.mean()
        dead = (self.counts < self.dead_below * average).nonzero().squeeze(1)
        if len(dead) > 0:
            # A small batch may have too few features; then some dead codes wait for the next batch.
            # Counts restart at the average: at decay 0.99 the code has 300 steps to be chosen.
            new = features[torch.randperm(len(features), device=features.device)[: len(dead)]]
            dead = dead[: len(new)]
            self.vectors[dead], self.counts[dead], self.sums[dead] = new, average, new * average
            self.synchronise()

    def totals(self, features: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How many features chose each code (K,), and their sum (K, dim)."""
        counts = torch.bincount(indices, minlength=len(self.vectors)).to(self.vectors.dtype)
        return counts, torch.zeros_like(self.vectors).index_add_(0, indices, features)

    def move_to_means(self) -> None:
        """Each vector becomes sums / counts; codes that were never chosen stay."""
        means = self.sums / self.counts[:, None].clamp(min=1e-12)
        means = torch.where(self.counts[:, None] > 0, means, self.vectors)
        self.vectors.copy_(F.normalize(means, dim=-1) if self.normalise else means)

    def synchronise(self) -> None:
        """After random choices, which differ from process to process: take those of process 0."""
        for buffer in (self.vectors, self.counts, self.sums):
            buffer.copy_(gather(buffer[None])[0])


@torch.no_grad()
def nearest(points: Tensor, vectors: Tensor, rows: int = 1024) -> Tensor:
    """For each of `points` (..., dim), the index of the nearest of `vectors` (K, dim): int64 (...).
    |p - v|^2 = |p|^2 - 2 (p.v - |v|^2 / 2): one matrix product and an argmax, for `rows` points at
    a time, so that the scores fit into the processor's cache."""
    with torch.autocast(points.device.type, enabled=False):
        half, parts = -0.5 * vectors.square().sum(-1), points.float().flatten(0, -2).split(rows)
        found = torch.cat([torch.addmm(half, part, vectors.T).argmax(-1) for part in parts])
    return found.view(points.shape[:-1])


def gather(x: Tensor) -> Tensor:
    """x (N, ...) of all processes of this training, one after another; N is the same in each."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
