"""Quantizers: turn a continuous feature into a token, and a token back into a feature.

A chain of tokens needs a vocabulary. Three ways to get one, all on features (..., dim); a fourth is in multiscale.py:

    VectorQuantizer   a learned list of K vectors; the nearest one's number is the token (tokenizer)
    FSQ               round a handful of bounded channels; the vocabulary is the grid itself, nothing to learn
    ResidualVQ        several lists in turn, each coding what the ones before left over (codec)

Each returns `Quantized(codes, indices, loss)`, and `decode(indices)` gives the same codes from the indices
alone. Rounding has gradient zero almost everywhere, so backward pretends that it was the identity
(straight-through): codes = q + (z - z.detach()), whose value is q exactly and whose gradient is that of z.

What goes wrong with a learned list is that most of it is never used. Four habits against it, all here:
  - low-dimensional codes on the unit sphere: in 8 dimensions every code has neighbours to win (Yu et al.);
  - k-means on the first batch, so that the list starts where the features are;
  - moving averages (EMA) instead of gradients: each code is the mean of the features that chose it;
  - dead codes are moved onto features of the batch. Dead is meant *relative* to the uniform share 1/K: an
    absolute bound such as EnCodec's "fewer than 2 hits a batch" declares most codes dead as soon as the batch
    is small.

All arithmetic here is float32, also under bf16 autocast: among 1,024 codes, 8 bits confuse neighbours.

Sources: van den Oord et al. 2017 (VQ-VAE; EMA in appendix A); Yu et al. 2021, "Vector-quantized Image
Modeling with Improved VQGAN" (low-dimensional normalised codes); Mentzer et al. 2023, "Finite Scalar
Quantization"; Zeghidour et al. 2021, "SoundStream"; Défossez et al. 2022, "EnCodec"; Kumar et al. 2023, "DAC"
(dropout for half).
Different here: normalised codes with EMA (Yu et al. use gradients); FSQ's even levels lie symmetrically about
0; one straight-through around the whole residual chain.
"""

from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    codes: Tensor  # (..., dim): the features after quantization; gradients pass straight through
    indices: Tensor  # int64 (...); ResidualVQ: (..., depth), -1 for "not sent"; MultiScaleVQ: (B, sum of scale^2)
    loss: Tensor  # scalar: how far the features are from their codes (commitment); 0 for FSQ


def usage(indices: Tensor, num_codes: int) -> tuple[float, float]:
    """(share of the codes that occur, perplexity) of indices of any shape; negative ones are ignored.

    Perplexity exp(-sum p log p) is the number of equally likely codes with the same entropy: K at best. Give
    it the indices of a whole *epoch*. A batch of 256 tokens cannot show more than 256 of 1,024 codes, so a
    batch's numbers look bad for a healthy codebook, and change with the batch size. Of a ResidualVQ, ask for
    each book: `usage(indices[..., k], num_codes)`. Raises ValueError where there is nothing to count.
    """
    flat = indices[indices >= 0]
    if flat.numel() == 0:
        raise ValueError("usage needs at least one index")
    share = torch.bincount(flat, minlength=num_codes).double() / flat.numel()
    entropy = -torch.special.xlogy(share, share).sum()
    return (share > 0).double().mean().item(), entropy.exp().item()


class Codebook(nn.Module):
    """K vectors, each the moving average of the features that choose it. Buffers only, no parameters.

    So a checkpoint resumes it bit for bit. The processes of one training (torch.distributed) keep one book
    between them: they add up their hits, and process 0 draws whatever is drawn at random.
    """

    def __init__(self, dim: int, num_codes: int, normalise: bool, decay: float, dead_below: float):
        super().__init__()
        self.normalise, self.decay, self.dead_below = normalise, decay, dead_below
        vectors = torch.randn(num_codes, dim)
        self.register_buffer("vectors", F.normalize(vectors, dim=-1) if normalise else vectors)  # (K, dim)
        self.register_buffer("counts", torch.zeros(num_codes))  # moving average of the hits of a batch
        self.register_buffer("sums", torch.zeros(num_codes, dim))  # moving average of the sum of what hit it
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x: Tensor, learn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (..., dim) -> vectors (..., dim) without gradient, indices (...). In training the first batch
        starts the codebook, every later one moves it; `learn`: bool (...), the features that may move it."""
        x = x.detach().float()
        first = self.training and not self.initialised
        if first:
            self.start(x.flatten(0, -2))
        indices = self.nearest(x)
        vectors = self.vectors[indices]
        if self.training and not first:
            if learn is None:
                self.update(x.flatten(0, -2), indices.flatten())
            else:
                self.update(x[learn], indices[learn])
        return vectors, indices

    def nearest(self, x: Tensor) -> Tensor:
        """Index of the nearest vector: (..., dim) -> int64 (...)."""
        return nearest(x.flatten(0, -2), self.vectors).view(x.shape[:-1])

    @torch.no_grad()
    def start(self, features: Tensor, lloyd_steps: int = 10) -> None:
        """k-means on (a random part of) the first batch, features (N, dim). The same seed, the same start.

        With fewer features than codes, the surplus codes stay where they are; unless hit, they count as dead
        and move to features of later batches.
        """
        features, num_codes = gather(features), len(self.vectors)
        points = features[torch.randperm(len(features), device=features.device)[: 32 * num_codes]]
        vectors = torch.cat([points[:num_codes].to(self.vectors.dtype), self.vectors[len(points) :]])
        for _ in range(lloyd_steps):
            counts, sums = self.totals(points, nearest(points, vectors))
            vectors = self.means(counts, sums, vectors)
        counts, sums = self.totals(points, nearest(points, vectors))
        self.keep(vectors, counts, sums)
        self.initialised.fill_(True)

    @torch.no_grad()
    def update(self, features: Tensor, indices: Tensor) -> None:
        """One step of the moving averages on features (N, dim), indices (N,); then revive dead codes."""
        counts, sums = self.totals(features, indices)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.vectors.copy_(self.means(self.counts, self.sums, self.vectors))

        average = self.counts.mean()  # that of a code with the uniform share 1/K
        dead = (self.counts < self.dead_below * average).nonzero().squeeze(1)
        if len(dead) > 0:
            # Distinct features: two codes at one place would leave one of them unused. What a small batch
            # cannot revive waits for the next. An average count is a time of grace: 300 steps at decay 0.99.
            chosen = torch.randperm(len(features), device=features.device)[: len(dead)]
            dead = dead[: len(chosen)]
            vectors, counts, sums = self.vectors.clone(), self.counts.clone(), self.sums.clone()
            vectors[dead] = features[chosen].to(vectors.dtype)
            counts[dead] = average
            sums[dead] = vectors[dead] * average
            self.keep(vectors, counts, sums)

    def totals(self, features: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Hits of each code (K,) and the sum of what hit it (K, dim), without an N x K one-hot matrix."""
        counts = torch.bincount(indices, minlength=len(self.vectors)).to(self.vectors.dtype)
        return counts, torch.zeros_like(self.vectors).index_add_(0, indices, features.to(self.vectors.dtype))

    def means(self, counts: Tensor, sums: Tensor, vectors: Tensor) -> Tensor:
        """sums / counts, and where nothing was counted the vectors as they are."""
        means = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1e-12), vectors)
        return F.normalize(means, dim=-1) if self.normalise else means

    def keep(self, vectors: Tensor, counts: Tensor, sums: Tensor) -> None:
        """Store what was drawn at random, process 0's draw for all of them."""
        for buffer, value in ((self.vectors, vectors), (self.counts, counts), (self.sums, sums)):
            buffer.copy_(value)
            if dist.is_initialized():
                dist.broadcast(buffer, 0)


@torch.no_grad()
def nearest(points: Tensor, vectors: Tensor, rows: int = 1024) -> Tensor:
    """Index of the nearest of `vectors` (K, dim) for each of `points` (N, dim) -> int64 (N,).

    |p - v|^2 = |p|^2 - 2 (p.v - |v|^2 / 2): one matrix product and an argmax. `rows` at a time: the scores
    then stay in the processor's cache, and 10^6 points do not ask for a matrix of 10^6 x K.
    """
    with torch.autocast(points.device.type, enabled=False):
        half = -0.5 * vectors.square().sum(-1)
        parts = [torch.addmm(half, part.float(), vectors.T).argmax(-1) for part in points.split(rows)]
    return torch.cat(parts)


def gather(features: Tensor) -> Tensor:
    """The features (N, dim) of all processes, one below the other; every process has the same N."""
    if not dist.is_initialized():
        return features
    parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, features.contiguous())
    return torch.cat(parts)


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """The value of q (exactly: z - z is 0) with the gradient of z."""
    return q.detach() + (z - z.detach())


class Quantizer(nn.Module):
    """What all of them share: linear maps from features to the space of the codes and back, in float32."""

    def __init__(self, dim: int, code_dim: int | None):
        super().__init__()
        self.dim = dim
        self.project_in = nn.Identity() if code_dim is None else nn.Linear(dim, code_dim)
        self.project_out = nn.Identity() if code_dim is None else nn.Linear(code_dim, dim)

    def forward(self, x: Tensor, **options) -> Quantized:
        """x: (..., dim), at least one dimension before the last -> Quantized, its codes in the dtype of x.
        Raises ValueError for another shape."""
        if x.dim() < 2 or x.shape[-1] != self.dim:
            raise ValueError(f"features must have the shape (..., {self.dim}), got {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            q, indices, loss = self.quantize(self.project_in(x.float()), **options)
            return Quantized(self.project_out(q).to(x.dtype), indices, loss)

    def decode(self, indices: Tensor, **options) -> Tensor:
        """The codes of these indices, as forward gives them, in float32: int64 (...) -> (..., dim). options: of `lookup`.
        An index outside a codebook raises IndexError (on a CPU)."""
        with torch.autocast(indices.device.type, enabled=False):
            return self.project_out(self.lookup(indices, **options))


class VectorQuantizer(Quantizer):
    """The nearest of K learned vectors.

    code_dim: dimension in which the codes live, on the unit sphere; None for Euclidean codes of size dim.
    commitment: weight of (z - code)^2, which keeps the features near codes that can only follow them.
    decay: of the moving averages. dead_below: a code with a smaller part of the uniform share is dead.
    """

    def __init__(
        self,
        dim: int,
        num_codes: int,
        code_dim: int | None = 8,
        commitment: float = 0.25,
        decay: float = 0.99,
        dead_below: float = 0.05,
    ):
        super().__init__(dim, code_dim)
        self.num_codes, self.commitment, self.normalise = num_codes, commitment, code_dim is not None
        self.book = Codebook(code_dim or dim, num_codes, self.normalise, decay, dead_below)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z: (..., code_dim) -> codes (..., code_dim) straight-through, indices (...), commitment loss."""
        if self.normalise:
            z = F.normalize(z, dim=-1)
        q, indices = self.book(z)
        return straight_through(z, q), indices, self.commitment * F.mse_loss(z, q)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (...) -> vectors of the codebook (..., code_dim)."""
        return F.embedding(indices, self.book.vectors)


class FSQ(Quantizer):
    """Finite scalar quantization: channel i, squashed into [-1, 1], is rounded to one of levels[i] values.

    The digits of the channels, read as a mixed-radix number, are the index. No codebook, no loss, no dead
    codes: (8, 5, 5, 5) is a vocabulary of 1,000. Raises ValueError for fewer than two levels.
    """

    def __init__(self, dim: int, levels: tuple[int, ...] = (8, 5, 5, 5)):
        super().__init__(dim, len(levels))
        if len(levels) == 0 or min(levels) < 2:
            raise ValueError(f"levels must be at least one number, each at least 2, got {levels}")
        self.num_codes = prod(levels)
        place = [prod(levels[:i]) for i in range(len(levels))]  # worth of each digit: 1, 8, 40, 200
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("place", torch.tensor(place), persistent=False)
        # Rows of length 1: features of unit variance give channels of unit variance, which tanh spreads over
        # all levels from the first step. PyTorch's smaller default would leave the outer levels empty.
        nn.init.orthogonal_(self.project_in.weight)
        nn.init.zeros_(self.project_in.bias)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z: (..., channels) -> codes (..., channels) straight-through, indices (...), loss 0."""
        z = z.tanh()
        digits = torch.round((z + 1) / 2 * (self.levels - 1)).long()
        indices = (digits * self.place).sum(-1)
        return straight_through(z, self.lookup(indices)), indices, z.new_zeros(())

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (...) -> channels (..., channels), each of levels[i] values from -1 to 1."""
        digits = indices[..., None] // self.place % self.levels
        return 2 * digits / (self.levels - 1) - 1


class ResidualVQ(Quantizer):
    """`depth` codebooks in turn, each on what the books before it left over; the code is the sum.

    Sound needs it: one list of 2^64 codes is out of the question, 8 books of 256 are 8 x 8 bits. The first
    books say the most, so leaving out the last ones lowers the bit rate gracefully, provided that the decoder
    has heard short versions in training: `dropout` is the share of samples (first dimension of x) sent with a
    random number of books, uniform from 1 to depth. What is not sent has index -1 and moves no codebook
    (the first batch, on which all of them start, apart).

    code_dim: dimension of all books, with one pair of projections around the chain; None for dim itself. The
    codes are Euclidean: on the unit sphere none could be as small as a late residual.

    Where to detach. If every book is straight-through by itself, q_1 has the gradient of z, so the residual
    z - q_1 has none, and the commitment of books 2, 3, ... never reaches the encoder: EnCodec starves them.
    Detach q_1 in the residual and it does, but now every q_k carries the gradient of z, and their sum passes
    on the decoder's gradient `depth` times. Here all codes are constants inside the chain, and one
    straight-through stands around it: every commitment reaches z, and the decoder's gradient passes once.
    """

    def __init__(
        self,
        dim: int,
        num_codes: int,
        depth: int,
        code_dim: int | None = None,
        commitment: float = 0.25,
        dropout: float = 0.5,
        decay: float = 0.99,
        dead_below: float = 0.05,
    ):
        super().__init__(dim, code_dim)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.num_codes, self.depth, self.commitment, self.dropout = num_codes, depth, commitment, dropout
        self.books = nn.ModuleList(
            Codebook(code_dim or dim, num_codes, False, decay, dead_below) for _ in range(depth)
        )

    def quantize(self, z: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """z: (B, ..., code_dim) -> codes straight-through, indices (B, ..., depth), commitment averaged over
        what was sent. depth: use only the first so many books; ValueError if there are not so many."""
        depth = self.depth if depth is None else depth
        if not 1 <= depth <= self.depth:
            raise ValueError(f"depth must be from 1 to {self.depth}, got {depth}")
        books_sent = self.draw_depths(len(z), depth, z.device)  # (B,)
        total, indices, losses, weights = torch.zeros_like(z), [], [], []
        for k, book in enumerate(self.books[:depth]):
            sent = (books_sent > k).view(-1, *[1] * (z.dim() - 2)).expand(z.shape[:-1])  # (B, ...)
            residual = z - total  # total is a constant: the gradient of every residual is that of z
            q, index = book(residual, learn=sent)
            losses.append((residual - q).square().mean(-1) * sent)
            weights.append(sent)
            total = total + q * sent[..., None]
            indices.append(torch.where(sent, index, -1))
        loss = torch.stack(losses).sum() / torch.stack(weights).sum()
        return straight_through(z, total), torch.stack(indices, dim=-1), self.commitment * loss

    def draw_depths(self, count: int, depth: int, device: torch.device) -> Tensor:
        """How many books each of `count` samples is sent with: int64 (count,)."""
        full = torch.full((count,), depth, device=device)
        if not self.training or self.dropout == 0:
            return full
        drawn = torch.randint(1, depth + 1, (count,), device=device)
        return torch.where(torch.rand(count, device=device) < self.dropout, drawn, full)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (..., d) with d <= depth, -1 for "not sent" -> the sum of the vectors (..., code_dim)."""
        parts = [
            F.embedding(indices[..., k].clamp(min=0), book.vectors) * (indices[..., k] >= 0)[..., None]
            for k, book in enumerate(self.books[: indices.shape[-1]])
        ]
        return sum(parts)
