"""Multi-scale residual VQ: a thumbnail of the features, then scale by scale what is still missing.

    total = 0
    for scale in 1, 2, 4, 8:
        residual = features - total
        tokens   = nearest codes of the residual, shrunk to scale x scale
        total    = total + phi(codes, enlarged to the full grid)

One codebook serves all scales. phi, a 3x3 convolution averaged with the identity, repairs the blur
of enlarging. The codes are constants, with one `straight_through` around the whole sum. Two losses,
averaged over the scales: one moves the sum towards the features (it trains phi), the other moves
the features towards the sum (commitment).

Source: Tian et al. 2024, "Visual Autoregressive Modeling" (VAR).
Different from the paper: the codebook learns by moving averages with revival, in few dimensions, as
in `quantize.py`; features lie on a sphere; running statistics bring the residual of each scale to
mean 0 and std 1 (whitening), or the small ones of fine scales would all get the same few codes.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.quantize import Codebook, Quantizer, gather, nearest, straight_through


class MultiScaleVQ(Quantizer):
    """Square grids of features (B, h, h, dim), coded at each of `scales`, which rise to h.
    code_dim: size of a code; others: as for VectorQuantizer. Notebook 04 takes parts away: `phi`,
    `measure` (whitening), `codes` and `output` (straight-through). ValueError for bad scales."""

    def __init__(self, dim: int, codebook_size: int, scales: tuple[int, ...], code_dim: int = 8,
                 commitment: float = 0.25, decay: float = 0.99, dead_below: float = 0.05):
        super().__init__(dim, code_dim)
        if list(scales) != sorted(set(scales)) or not scales or scales[0] < 1:
            raise ValueError(f"scales must rise, got {scales}")
        self.codebook_size, self.scales = codebook_size, tuple(scales)
        self.commitment, self.decay = commitment, decay
        self.codebook = Codebook(code_dim, codebook_size, False, decay, dead_below)
        self.phi = nn.ModuleList(nn.Conv2d(code_dim, code_dim, 3, padding=1) for _ in scales)
        for conv in self.phi:  # the identity at first: random ones give about 0, half of a scale
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.register_buffer("mean", torch.zeros(len(scales), code_dim))  # of residuals
        self.register_buffer("std", torch.ones(len(scales), code_dim))

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z: (B, h, h, code_dim) -> codes of the same shape; indices (B, sum of scale^2), one scale
        after another; the sum of the two losses."""
        z = sphere(z)  # else small features have small losses
        features = z.permute(0, 3, 1, 2)  # (B, code_dim, h, h)
        if self.training and not self.codebook.initialised:
            self.start(features.detach())
        total, residuals, indices, loss = torch.zeros_like(features), [], [], 0.0
        for k, scale in enumerate(self.scales):
            residual = cells(shrink(features - total.detach(), scale))  # (B, scale^2, code_dim)
            if self.training:
                self.measure(k, residual.detach(), self.decay)
            residual = self.whiten(residual, k)
            index = nearest(residual.detach(), self.codebook.vectors)
            total = total + self.enlarge(self.codes(residual, index), k)
            loss = loss + F.mse_loss(total, features.detach())
            loss = loss + self.commitment * F.mse_loss(total.detach(), features)
            residuals.append(residual.detach().flatten(0, 1))
            indices.append(index)
        if self.training:
            self.codebook.update(torch.cat(residuals), torch.cat([i.flatten() for i in indices]))
        q = self.output(z, total.permute(0, 2, 3, 1))
        return q, torch.cat(indices, dim=1), loss / len(self.scales)

    def codes(self, residual: Tensor, index: Tensor) -> Tensor:
        """Indices (B, scale^2) -> their codes (B, scale^2, code_dim), constants; `residual` is for
        notebook 04, which puts a straight-through estimator here."""
        return F.embedding(index, self.codebook.vectors)

    def output(self, z: Tensor, total: Tensor) -> Tensor:
        """The quantized z: the value of the sum, with the gradient of z."""
        return straight_through(z, total)

    def enlarge(self, codes: Tensor, k: int) -> Tensor:
        """Codes of scale k (B, scale^2, code_dim) -> their part of the sum (B, code_dim, h, h)."""
        square = (codes * self.std[k].clone() + self.mean[k]).transpose(1, 2)
        square = square.unflatten(2, (self.scales[k], self.scales[k]))
        if self.scales[k] < self.scales[-1]:
            square = F.interpolate(square, self.scales[-1], mode="bicubic")
        return 0.5 * self.phi[k](square) + 0.5 * square

    def split(self, indices: Tensor) -> list[Tensor]:
        """Indices (B, L), of all scales or of the first ones -> (B, scale^2) for each of them."""
        counts = [scale**2 for scale in self.scales]
        ends = zip(counts, accumulate(counts), strict=True)
        return list(indices.split([n for n, end in ends if end <= indices.shape[1]], dim=1))

    def add(self, sums: list[Tensor], indices: Tensor, known: Tensor | None = None) -> Tensor:
        """`sums` are the sums after the first scales. The sum after one more, with indices
        (B, scale^2): (B, code_dim, h, h). known: bool (scale^2,), which indices to use, all unless
        told; the other cells get the mean of their scale."""
        codes = F.embedding(indices, self.codebook.vectors)
        codes = codes if known is None else codes * known[:, None]
        part = self.enlarge(codes, len(sums))
        return sums[-1] + part if sums else part

    def sums(self, indices: Tensor, known: Tensor | None = None) -> list[Tensor]:
        """The sum after each of the scales in `indices` (B, L): a list of (B, code_dim, h, h).
        known: bool (L,), as in `add`."""
        sums: list[Tensor] = []
        masks = self.split(torch.ones_like(indices[:1]) if known is None else known[None])
        for part, mask in zip(self.split(indices), masks, strict=True):
            sums.append(self.add(sums, part, mask[0]))
        return sums

    def features(self, x: Tensor) -> Tensor:
        """Features (B, h, h, dim) as they are coded: (B, code_dim, h, h), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return sphere(self.project_in(x.float())).permute(0, 3, 1, 2)

    def whiten(self, residual: Tensor, k: int) -> Tensor:
        """Residuals of scale k (B, scale^2, code_dim), with mean 0 and std 1. Clones, for notebook
        04: the next `measure` changes both before the backward pass."""
        return (residual - self.mean[k].clone()) / self.std[k].clone()

    def code(self, rest: Tensor, k: int) -> Tensor:
        """What is still missing (B, code_dim, h, h) -> its indices in scale k, (B, scale^2)."""
        residual = self.whiten(cells(shrink(rest, self.scales[k])), k)
        return nearest(residual, self.codebook.vectors)

    def lookup(self, indices: Tensor, known: Tensor | None = None) -> Tensor:
        """Indices (B, L) as in `sums` -> the last sum, (B, h^2, code_dim)."""
        return cells(self.sums(indices, known)[-1])

    @torch.no_grad()
    def measure(self, k: int, residual: Tensor, decay: float) -> None:
        """Move the running mean and std of scale k towards those of residuals (B, n, code_dim)."""
        flat = gather(residual.flatten(0, 1))
        self.mean[k].lerp_(flat.mean(0), 1 - decay)
        self.std[k].lerp_(flat.std(0, correction=0).clamp(min=1e-4), 1 - decay)

    @torch.no_grad()
    def start(self, features: Tensor) -> None:
        """Start the codebook on the first batch, shrunk to every scale: no residuals exist yet."""
        pool = []
        for k, scale in enumerate(self.scales):
            flat = cells(shrink(features, scale))
            self.measure(k, flat, decay=0.0)
            pool.append(((flat - self.mean[k]) / self.std[k]).flatten(0, 1))
        self.codebook.start(torch.cat(pool))


def sphere(z: Tensor) -> Tensor:
    return F.normalize(z, dim=-1) * z.shape[-1] ** 0.5  # (..., dim), of mean square 1


def cells(square: Tensor) -> Tensor:
    return square.flatten(2).transpose(1, 2)  # (B, C, h, h) -> (B, h^2, C)


def shrink(square: Tensor, size: int) -> Tensor:
    """(B, C, h, h) -> (B, C, size, size), each cell the mean of the area that it covers."""
    if square.device.type == "mps" and square.shape[-1] % size:  # MPS needs areas of whole cells
        return shrink(square.cpu(), size).to(square.device)
    return square if square.shape[-1] == size else F.interpolate(square, size, mode="area")
