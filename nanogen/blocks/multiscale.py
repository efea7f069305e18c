"""Multi-scale residual VQ: features as a thumbnail, and then, scale by scale, what the picture so far still lacks.

    total = 0
    for scale in 1, 2, 4, 8:
        residual = features - total
        tokens   = nearest codes of the residual, shrunk to scale x scale
        total    = total + phi(codes, enlarged to the full grid)

One codebook serves all scales. The tokens of scale k say nothing that is not needed once the scales before it are known,
so a picture can be drawn as people do: the whole thing roughly, then finer and finer. phi, a 3x3 convolution mixed half
and half with the identity, repairs what enlarging blurs.

Where to detach: residuals and codes are constants, `straight_through` stands once around the whole sum, and two losses,
averaged over the scales, pull the sum towards the features (phi learns) and the features towards the sum (commitment).

Source: Tian et al. 2024, "Visual Autoregressive Modeling" (VAR).
Different from the paper: the shared codebook moves by averages with revival, as in `quantize.py`, in few dimensions; the
residual of each scale is first brought to mean 0 and standard deviation 1 by running statistics. The fine scales'
residuals are small, and without this they would all fall on the same few codes. And features lie on a sphere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.quantize import Codebook, Quantizer, gather, straight_through

PARTS = ("nothing", "revival", "phi", "whitening", "detaching")


class MultiScaleVQ(Quantizer):
    """Square grids of features (B, h, h, dim), coded at each of `scales`, which rise to h.

    code_dim: dimension in which features are compared and codes live. without: takes one of `PARTS` away, to see what it
    is good for: "revival" never moves a dead code, "phi" only enlarges, "whitening" leaves each scale's residual as it
    is, "detaching" makes every scale straight-through by itself. Raises ValueError for what is none of these.
    """

    def __init__(self, dim: int, num_codes: int, scales: tuple[int, ...], code_dim: int = 8, commitment: float = 0.25,
                 decay: float = 0.99, dead_below: float = 0.05, without: str = "nothing"):
        super().__init__(dim, code_dim)
        if list(scales) != sorted(set(scales)) or not scales or scales[0] < 1:
            raise ValueError(f"scales must rise, got {scales}")
        if without not in PARTS:
            raise ValueError(f"without must be one of {', '.join(PARTS)}, got {without!r}")
        self.num_codes, self.scales, self.commitment = num_codes, tuple(scales), commitment
        self.decay, self.whiten, self.detached = decay, without != "whitening", without != "detaching"
        self.book = Codebook(code_dim, num_codes, False, decay, 0.0 if without == "revival" else dead_below)
        self.phi = nn.ModuleList(nn.Conv2d(code_dim, code_dim, 3, padding=1) for _ in scales) if without != "phi" else None
        for conv in self.phi or ():  # phi starts as the identity: from random weights a scale would at first add half of itself
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.register_buffer("mean", torch.zeros(len(scales), code_dim))  # of the residuals of each scale
        self.register_buffer("std", torch.ones(len(scales), code_dim))

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z: (B, h, h, code_dim) -> codes of the same shape, straight-through; indices (B, sum of scale^2), the scales one
        after another; the two losses."""
        z = F.normalize(z, dim=-1) * z.shape[-1] ** 0.5  # a fixed size: otherwise shrinking would please the losses
        features = z.permute(0, 3, 1, 2)  # (B, code_dim, h, h)
        if self.training and not self.book.initialised:
            self.start(features.detach())
        total, residuals, indices, loss = torch.zeros_like(features), [], [], 0.0
        for k, scale in enumerate(self.scales):
            residual = shrink(features - total.detach(), scale).flatten(2).transpose(1, 2)  # (B, scale^2, code_dim)
            if self.training and self.whiten:
                self.measure(k, residual.detach(), self.decay)
            mean, std = self.mean[k].clone(), self.std[k].clone()  # those of the next scale move before the backward pass
            residual = (residual - mean) / std
            index = self.book.nearest(residual.detach())
            codes = F.embedding(index, self.book.vectors)
            total = total + self.enlarge(codes if self.detached else straight_through(residual, codes), k)
            loss = loss + F.mse_loss(total, features.detach()) + self.commitment * F.mse_loss(total.detach(), features)
            residuals.append(residual.detach().flatten(0, 1))
            indices.append(index)
        if self.training:
            self.book.update(torch.cat(residuals), torch.cat([index.flatten() for index in indices]))
        total = total.permute(0, 2, 3, 1)
        return straight_through(z, total) if self.detached else total, torch.cat(indices, dim=1), loss / len(self.scales)

    def enlarge(self, codes: Tensor, k: int) -> Tensor:
        """Codes of scale k (B, scale^2, code_dim) -> what they add to the sum (B, code_dim, h, h)."""
        square = (codes * self.std[k].clone() + self.mean[k]).transpose(1, 2).unflatten(2, (self.scales[k], self.scales[k]))
        if self.scales[k] < self.scales[-1]:
            square = F.interpolate(square, self.scales[-1], mode="bicubic")
        return 0.5 * self.phi[k](square) + 0.5 * square if self.phi else square

    def split(self, indices: Tensor) -> list[Tensor]:
        """Indices (B, L), of all scales or only of the first ones -> one (B, scale^2) for each."""
        counts = [scale**2 for scale in self.scales]
        present = [count for i, count in enumerate(counts) if sum(counts[: i + 1]) <= indices.shape[1]]
        return list(indices.split(present, dim=1))

    def sums(self, indices: Tensor, known: Tensor | None = None) -> list[Tensor]:
        """The sum after each of the scales in `indices`: a list of (B, code_dim, h, h). known: bool (L,), the indices to look
        at; the cells of the others add the mean of their scale."""
        codes = F.embedding(indices, self.book.vectors)
        if known is not None:
            codes = codes * known[:, None]
        total, sums = 0, []
        for k, part in enumerate(self.split(codes)):
            total = total + self.enlarge(part, k)
            sums.append(total)
        return sums

    def lookup(self, indices: Tensor, known: Tensor | None = None) -> Tensor:
        """Indices (B, L) of all scales, or of the first ones for a blurred picture -> codes (B, h^2, code_dim).
        known: as in `sums`."""
        return self.sums(indices, known)[-1].flatten(2).transpose(1, 2)

    @torch.no_grad()
    def measure(self, k: int, residual: Tensor, decay: float) -> None:
        """Move the running mean and standard deviation of scale k towards those of residuals (B, scale^2, code_dim)."""
        flat = gather(residual.flatten(0, 1))  # as for the codebook, what all processes see
        self.mean[k].lerp_(flat.mean(0), 1 - decay)
        self.std[k].lerp_(flat.std(0, correction=0).clamp(min=1e-4), 1 - decay)

    @torch.no_grad()
    def start(self, features: Tensor) -> None:
        """Start the codebook on the features of the first batch, shrunk to every scale: no residuals exist yet."""
        pool = []
        for k, scale in enumerate(self.scales):
            flat = shrink(features, scale).flatten(2).transpose(1, 2)
            if self.whiten:
                self.measure(k, flat, decay=0.0)
            pool.append(((flat - self.mean[k]) / self.std[k]).flatten(0, 1))
        self.book.start(torch.cat(pool))


def shrink(square: Tensor, size: int) -> Tensor:
    """(B, C, h, h) -> (B, C, size, size), each cell the mean of the area that it covers."""
    if square.device.type == "mps" and square.shape[-1] % size:  # MPS only has areas of whole cells
        return shrink(square.cpu(), size).to(square.device)
    return square if square.shape[-1] == size else F.interpolate(square, size, mode="area")
