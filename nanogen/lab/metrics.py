"""Numbers for pictures: how good, how varied, how sharp, how many bits. Functions of arrays, no networks.

    frechet_distance, kernel_distance       how far apart are two *sets* of pictures, by their features?
    precision_recall                        are the samples realistic, and is all of the data covered?
    psnr, ssim                              how close is each reconstruction to its original?
    radial_spectrum, high_frequency_share   is fine detail there, or was it averaged away (the MSE trap)?
    bits_per_dim, lossless_bits_per_dim     what does a likelihood say, and what do PNG and its kin reach?

The set distances take features (N, D) from any network one trusts. Ours come from a small judge trained in
this repository, so the Fréchet distance is called FD-nano and never FID: only numbers from the same judge, at
the same N, compare. Each stands beside its floor (train against test) and its ceiling (noise).

Sources: Heusel et al. 2017 (Fréchet distance); Bińkowski et al. 2018 (kernel distance); Kynkäänniemi et al.
2019 (precision and recall); Wang et al. 2004 (SSIM); Weinberger et al. 2000 (LOCO-I, the guess in JPEG-LS).
Different here: SSIM on each colour channel, then averaged, where the paper takes grey pictures.
"""

import io
import lzma
import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nanogen import UserError

Array = np.ndarray | Tensor

# ---- two sets of pictures, by their features


def frechet_distance(features_a: Array, features_b: Array) -> float:
    """Squared distance between two Gaussians fitted to features (N, D) and (M, D); 0 if they agree:

        |mean_a - mean_b|^2 + trace(C_a) + trace(C_b) - 2 trace((C_a C_b)^(1/2))

    C_a C_b is not symmetric, but S C_b S with S = C_a^(1/2) is, and has the same eigenvalues. Nothing is
    inverted, so N < D (a rank-deficient C) does no harm. Too high at small N: compare only at equal N.
    """
    a, b = _feature_pair(features_a, features_b)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)  # (D, D)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # rounding makes zeros slightly negative
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root
    return max(0.0, distance.item())


def kernel_distance(
    features_a: Array, features_b: Array, subset_size: int = 1000, subsets: int = 20, seed: int = 0
) -> float:
    """KID's formula on features (N, D) and (M, D): squared mean discrepancy under the kernel (x.y / D + 1)^3.

    Unlike the Fréchet distance it is unbiased: at any N, equal distributions give 0 on average, so at times a
    little less. The mean over `subsets` draws of `subset_size` rows (or all, if fewer), fixed by the seed.
    """
    a, b = _feature_pair(features_a, features_b)
    generator = torch.Generator().manual_seed(seed)
    size = min(subset_size, len(a), len(b))
    total = 0.0
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]]
        y = b[torch.randperm(len(b), generator=generator)[:size]]
        xx, yy, xy = ((p @ q.T / a.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))  # (size, size)
        # A row paired with itself says nothing about the distribution: leaving it out removes the bias.
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        total += (within - 2 * xy.mean()).item()
    return total / subsets


def precision_recall(real: Array, fake: Array, k: int = 3) -> tuple[float, float]:
    """Share of fake rows that lie among the real ones (precision), and of real among fake (recall).

    real: (N, D), fake: (M, D). A set covers the balls around its rows that reach to their k-th neighbour.
    Beautiful but few: high precision, low recall. Both depend on the number of rows: take N = M. With no more
    than k rows there is no k-th neighbour, and both are NaN.
    """
    real, fake = _feature_pair(real, fake)
    if k < 1:
        raise UserError(f"precision and recall need k of at least 1, got {k}")
    if min(len(real), len(fake)) <= k:
        return math.nan, math.nan
    centre = real.mean(0)  # distances do not change, and rounding does less harm near zero
    return _covered(fake - centre, real - centre, k), _covered(real - centre, fake - centre, k)


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of points inside the k-nearest-neighbour ball of at least one centre."""

    def squared_distances(a: Tensor) -> Tensor:  # (N, D) -> (N, M)
        return a.square().sum(1)[:, None] + centres.square().sum(1) - 2 * a @ centres.T

    # The (k + 1)-th smallest, because the first is the row itself. 1000 rows at a time, for memory.
    reach = torch.cat([squared_distances(part).kthvalue(k + 1).values for part in centres.split(1000)])
    reach = reach + 1e-9 * centres.square().sum(1).mean()  # equal rows count as equal in spite of rounding
    inside = torch.cat([(squared_distances(part) <= reach).any(1) for part in points.split(1000)])
    return inside.double().mean().item()


def _feature_pair(a: Array, b: Array) -> tuple[Tensor, Tensor]:
    """Both as float64 on the CPU: the differences that matter are small, and Apple's GPUs have no float64."""
    a, b = (_tensor(features).double() for features in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] < 2 or min(len(a), len(b)) < 2:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise UserError(f"sets compare by features (N, D) of one judge with N, D of at least 2, got {shapes}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError("features hold NaN or infinity: look at the samples, the model may have diverged")
    return a, b


def _tensor(array: Array) -> Tensor:
    """On the CPU, without its gradient. Arrays are copied: data that came from a file may be read-only."""
    return torch.tensor(array) if isinstance(array, np.ndarray) else array.detach().cpu()


# ---- a picture and its reconstruction


def psnr(a: Array, b: Array) -> float:
    """Peak signal-to-noise ratio in dB, of each picture, then averaged over pictures. (One ratio of the
    pooled error would be lower.) Pictures: float (N, 3, H, W) in [-1, 1] or uint8 (N, H, W, 3), also mixed.
    Twice the error costs 6 dB; equal pictures count as 100 dB, so that the mean stays finite."""
    a, b = _picture_pair(a, b)
    squared_error = (a - b).square().mean(dim=(1, 2, 3))  # (N,)
    return (-10 * squared_error.clamp(min=1e-10).log10()).mean().item()


def ssim(a: Array, b: Array) -> float:
    """Structural similarity: 1 for equal pictures, about 0 for unrelated ones. Pictures as in `psnr`.

    Compares local mean, variance and covariance under an 11x11 Gaussian window (sigma 1.5), only where it
    fits whole; the mean over places, channels and pictures. Where PSNR forgives blur, SSIM does not.
    """
    a, b = _picture_pair(a, b)
    if min(a.shape[-2:]) < 11:
        raise UserError(f"SSIM needs pictures of at least 11x11, got {a.shape[-1]}x{a.shape[-2]}")
    parts = zip(a.split(1000), b.split(1000), strict=True)  # float64 below, so not all at once
    return torch.cat([_similarity(x.double(), y.double()) for x, y in parts]).mean().item()


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """(N, C, H, W) in [0, 1] twice -> each picture's SSIM (N,)."""
    bell = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    bell = bell / bell.sum()
    # A Gaussian blurs rows and columns apart, and each is a matrix with the bell along its diagonal.
    down, across = (
        torch.stack([F.pad(bell, (i, size - 11 - i)) for i in range(size - 10)]) for size in a.shape[-2:]
    )

    def local_mean(x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H - 10, W - 10)
        return down @ x @ across.T

    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2  # the paper's, for values in [0, 1]: in flat areas nothing is divided by 0
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _picture_pair(a: Array, b: Array) -> tuple[Tensor, Tensor]:
    a, b = _unit_pictures(a), _unit_pictures(b)
    if a.shape != b.shape:
        raise UserError(f"pictures of different sizes do not compare: {tuple(a.shape)} and {tuple(b.shape)}")
    return a, b


def _unit_pictures(images: Array) -> Tensor:
    """uint8 (N, H, W, 3), or float (N, 3, H, W) in [-1, 1] clamped as if it were shown -> float (N, 3, H, W)
    in [0, 1] on the CPU. The range matters: SSIM compares brightness, which must not be negative."""
    images = _tensor(images)
    if images.ndim != 4 or not len(images):
        raise UserError(f"expected pictures (N, H, W, 3) or (N, 3, H, W), got shape {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.permute(0, 3, 1, 2).float() / 255
    return (images.float().clamp(-1, 1) + 1) / 2


# ---- detail


def radial_spectrum(images: Array) -> tuple[np.ndarray, np.ndarray]:
    """Power at each spatial frequency, averaged over directions, channels and pictures.

    Pictures as in `psnr` -> frequencies (R,) in units of Nyquist (1: light and dark alternate by pixel),
    power (R,). No window: the jump at the border leaks into every set alike, so compare sets.
    """
    power, radius = _power(images)
    rings = min(power.shape) // 2
    ring = (radius * rings).round().long().flatten()  # ring 0 is the mean; the corners beyond 1 are cut off
    mean_power = torch.bincount(ring, weights=power.flatten()) / torch.bincount(ring)
    return np.arange(1, rings + 1) / rings, mean_power[1 : rings + 1].numpy()


def high_frequency_share(images: Array, above: float = 0.5) -> float:
    """Share in [0, 1] of the pictures' energy, mean colour aside, at frequencies over `above` x Nyquist.
    A model that averages plausible pictures loses this first. Flat pictures give 0."""
    power, radius = _power(images)
    total = power.sum().item()
    return power[radius > above].sum().item() / total if total > 0 else 0.0


def _power(images: Array) -> tuple[Tensor, Tensor]:
    """Mean squared Fourier coefficients (H, W), and the frequency of each in units of Nyquist (H, W)."""
    images = _unit_pictures(images).double()
    images = images - images.mean(dim=(2, 3), keepdim=True)
    power = torch.fft.fft2(images, norm="ortho").abs().square().mean(dim=(0, 1))
    vertical, horizontal = (2 * torch.fft.fftfreq(size, dtype=torch.float64) for size in power.shape)
    return power, torch.hypot(vertical[:, None], horizontal[None])


# ---- bits


def bits_per_dim(nats: float | Tensor, dims: int) -> float | Tensor:
    """A negative log-likelihood in nats -> bits for each of a picture's `dims` numbers. Raw bytes cost 8."""
    return nats / (dims * math.log(2))


def entropy(counts: Array) -> float:
    """Bits per symbol of the distribution that these counts (K,) estimate."""
    counts = _tensor(counts).double()
    share = counts[counts > 0] / counts.sum()
    return max(0.0, -(share * share.log2()).sum().item())


def lossless_bits_per_dim(images: np.ndarray) -> dict[str, float]:
    """What compression without learning makes of pictures uint8 (N, H, W, 3), in bits per dimension:

    png, zlib, lzma   each picture alone, at the strongest setting (PNG with its headers, the others bare)
    histogram         entropy of each channel's values: no context at all
    predictor         the same of what LOCO-I's guess from the left and upper neighbours leaves
    best              the least of these, the trivial baseline that a density model has to beat

    The two entropies count on `images` themselves, which flatters them on fewer than some hundred pictures.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise UserError(f"expected pictures as uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
    bare_lzma = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 16}]
    size = {"png": 0, "zlib": 0, "lzma": 0}  # bytes
    for image in images:
        png, deflate, pixels = io.BytesIO(), zlib.compressobj(9, wbits=-15), image.tobytes()
        Image.fromarray(image).save(png, format="PNG", optimize=True)
        size["png"] += png.tell()
        size["zlib"] += len(deflate.compress(pixels) + deflate.flush())
        size["lzma"] += len(lzma.compress(pixels, format=lzma.FORMAT_RAW, filters=bare_lzma))
    bits = {name: 8 * count / images.size for name, count in size.items()}
    for name, values in ("histogram", images), ("predictor", _residuals(images)):
        bits[name] = sum(entropy(np.bincount(values[..., c].ravel())) for c in range(3)) / 3
    return bits | {"best": min(bits.values())}


def _residuals(images: np.ndarray) -> np.ndarray:
    """R-G, G, B-G minus LOCO-I's guess of them, uint8 as the input: they wrap at 256, and nothing is lost."""
    red, green, blue = (images[..., c] for c in range(3))
    # Differences of colours lie around 0: half-way up, they do not jump between 255 and 0.
    planes = np.stack([red - green + np.uint8(128), green, blue - green + np.uint8(128)], axis=-1)
    padded = np.pad(planes, ((0, 0), (1, 0), (1, 0), (0, 0))).astype(np.int16)
    left, up, corner = padded[:, 1:, :-1], padded[:, :-1, 1:], padded[:, :-1, :-1]
    guess = np.clip(left + up - corner, np.minimum(left, up), np.maximum(left, up))
    return planes - guess.astype(np.uint8)


# ---- cost


def parameter_count(model: nn.Module) -> int:
    """All numbers that training may change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
