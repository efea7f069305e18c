"""Metrics for images, by hand: functions of arrays, without networks.

    frechet_distance                           how far apart are two *sets*, by their features?
    precision_recall                           are samples realistic, and is all the data covered?
    psnr, ssim                                 how close is a reconstruction to its original?
    radial_spectrum, high_frequency_fraction   is there fine detail, or was it averaged away?
    bits_per_dim, lossless_bits_per_dim        the likelihood of a model, beside PNG and LOCO-I

Features (N, D) may be of any network. Ours come from a small judge trained here, so we call the
Fréchet distance FD-nano, never FID. Only values of one judge at one N compare.

Sources: Heusel et al. 2017 (Fréchet distance); Kynkäänniemi et al. 2019 (precision, recall); Wang
et al. 2004 (SSIM; here a mean over the colours); Weinberger et al. 2000 (LOCO-I, JPEG-LS).
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nanogen import UserError

Array = np.ndarray | Tensor

# ---- two sets of images, by their features

def frechet_distance(features_a: Array, features_b: Array) -> float:
    """Squared distance of two Gaussians fitted to features (N, D) and (M, D); 0 if they agree:

        |mean_a - mean_b|^2 + trace(C_a) + trace(C_b) - 2 trace((C_a C_b)^(1/2))

    C_a C_b is not symmetric, but S C_b S with S = C_a^(1/2) is, and has the same eigenvalues. N may
    be below D: nothing is inverted. The estimate is too high at small N, so compare at equal N."""
    a, b = _feature_pair(features_a, features_b)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)  # (D, D)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # rounding can make zeros negative
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace()
    return max(0.0, (distance - 2 * trace_root).item())


def precision_recall(real: Array, fake: Array, k: int = 3) -> tuple[float, float]:
    """Fraction of fake rows that the real ones cover (precision), and the reverse (recall).
    real: (N, D), fake: (M, D). A set covers the balls around its rows that reach to their k-th
    neighbours. Both values depend on the number of rows, so take N = M; NaN with at most k rows."""
    real, fake = _feature_pair(real, fake)
    if min(len(real), len(fake)) <= k:
        return math.nan, math.nan
    real, fake = real - real.mean(0), fake - real.mean(0)  # near 0, rounding does less harm
    distances = torch.cdist(fake, real)  # (M, N)
    real_reach, fake_reach = (
        torch.cat([torch.cdist(part, rows).kthvalue(k + 1).values  # the first is the row itself
                   for part in rows.split(1000)]) for rows in (real, fake))  # in parts, for memory
    distances -= 1e-6 * distances.max()  # tolerance, so that equal rows count
    precise, recalled = (distances <= real_reach).any(1), (distances <= fake_reach[:, None]).any(0)
    return precise.double().mean().item(), recalled.double().mean().item()


def _feature_pair(a: Array, b: Array) -> tuple[Tensor, Tensor]:
    """Both as float64, to keep small differences, on the CPU, since MPS has no float64."""
    a, b = _tensor(a).double(), _tensor(b).double()
    if a.ndim != 2 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 2:
        raise UserError(f"features must be (N, D), N > 1, of one judge: {[*a.shape]}, {[*b.shape]}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError("features contain NaN or infinity: has the model diverged?")
    return a, b


def _tensor(array: Array) -> Tensor:
    """On the CPU, without gradient. Arrays are copied: those from a file may be read-only."""
    return torch.tensor(array) if isinstance(array, np.ndarray) else array.detach().cpu()


def accuracy(logits: Tensor, labels: Array) -> float:
    """Fraction of the rows (N, classes) whose largest logit is that of the label (N,)."""
    return (logits.argmax(1) == torch.as_tensor(labels)).float().mean().item()


# ---- images: reconstructions and detail

def psnr(a: Array, b: Array) -> float:
    """Peak signal-to-noise ratio in dB, the mean over images; 100 dB for equal ones.
    Images: float (N, 3, H, W) in [-1, 1] or uint8 (N, H, W, 3), also mixed."""
    a, b = _unit_images(a, b)
    squared_error = (a - b).square().mean(dim=(1, 2, 3))  # (N,)
    return (-10 * squared_error.clamp(min=1e-10).log10()).mean().item()


def ssim(a: Array, b: Array) -> float:
    """Structural similarity: 1 for equal images, about 0 for unrelated ones. Images as in `psnr`.
    Local mean, variance and covariance are compared under an 11x11 Gaussian window (sigma 1.5); the
    mean over positions, channels and images. Unlike PSNR it punishes blur."""
    a, b = _unit_images(a, b)
    if min(a.shape[-2:]) < 11:
        raise UserError(f"SSIM needs images of at least 11x11, got {a.shape[-1]}x{a.shape[-2]}")
    gauss = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    # Rows and columns are filtered apart: two matrices with the window along the diagonal.
    down, across = (torch.stack([F.pad(gauss / gauss.sum(), (i, size - 11 - i))
                                 for i in range(size - 10)]) for size in a.shape[-2:])
    c1, c2 = 0.01**2, 0.03**2  # the paper's, for values in [0, 1]: no division by 0 in flat areas
    scores = []
    for x, y in zip(a.split(1000), b.split(1000), strict=True):  # in float64, so not all at once
        x, y = x.double(), y.double()
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = (  # each (1000, 3, H - 10, W - 10)
            down @ z @ across.T for z in (x, y, x * x, y * y, x * y))
        covariance, variances = mean_xy - mean_x * mean_y, mean_xx - mean_x**2 + mean_yy - mean_y**2
        scores.append((2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)  # brightness
                      * (2 * covariance + c2) / (variances + c2))  # structure
    return torch.cat(scores).mean().item()


def _unit_images(*sets: Array) -> list[Tensor]:
    """Images as in `psnr`, clamped -> float (N, 3, H, W) in [0, 1] on the CPU."""
    return [x.permute(0, 3, 1, 2).float() / 255 if x.dtype == torch.uint8 else
            (x.float().clamp(-1, 1) + 1) / 2 for x in map(_tensor, sets)]


def radial_spectrum(images: Array) -> tuple[np.ndarray, np.ndarray]:
    """Power at each spatial frequency, the mean over directions, channels and images.
    Images as in `psnr` -> frequencies (R,) in units of Nyquist, power (R,). Without a window, the
    jump between opposite borders leaks into every spectrum alike, so compare sets of images."""
    power, radius = _power(images)
    rings = min(power.shape) // 2
    ring = (radius * rings).round().long().flatten()  # ring 0 is the mean; corners lie beyond 1
    power = torch.bincount(ring, weights=power.flatten()) / torch.bincount(ring)
    return np.arange(1, rings + 1) / rings, power[1 : rings + 1].numpy()


def high_frequency_fraction(images: Array, above: float = 0.5) -> float:
    """Fraction of the images' energy, without the mean, at frequencies over `above` x Nyquist.
    A model that averages plausible images loses these frequencies first. Flat images give 0."""
    power, radius = _power(images)
    return (power[radius > above].sum() / power.sum().clamp(min=1e-12)).item()


def _power(images: Array) -> tuple[Tensor, Tensor]:
    """Mean squared Fourier coefficients (H, W), and their frequencies in units of Nyquist."""
    images = _unit_images(images)[0].double()
    images = images - images.mean(dim=(2, 3), keepdim=True)
    power = torch.fft.fft2(images, norm="ortho").abs().square().mean(dim=(0, 1))
    rows, columns = (2 * torch.fft.fftfreq(size, dtype=torch.float64) for size in power.shape)
    return power, torch.hypot(rows[:, None], columns[None])


# ---- bits

def bits_per_dim(nats: float | Tensor, dims: int) -> float | Tensor:
    """Negative log-likelihood of an image in nats -> bits for each of its `dims` values."""
    return nats / (dims * math.log(2))


def lossless_bits_per_dim(images: np.ndarray) -> dict[str, float]:
    """Bits per dimension of images uint8 (N, H, W, 3) under compressors that learn nothing.
    "png": each image alone, with its headers. "predictor": the entropy of the error of LOCO-I's
    prediction from the left and upper pixels; too low for fewer than some hundred images, on which
    it is counted. "best": the smaller one, the baseline that a density model has to beat."""
    file = io.BytesIO()
    for image in images:
        Image.fromarray(image).save(file, format="PNG", optimize=True)
    residuals = torch.from_numpy(_residuals(images)).flatten(0, 2)  # (N H W, 3)
    counts = torch.stack([channel.bincount(minlength=256) for channel in residuals.T])
    nats = torch.special.entr(counts.double() / len(residuals)).sum().item()  # of three values
    bits = {"png": 8 * file.tell() / images.size, "predictor": bits_per_dim(nats, 3)}
    return bits | {"best": min(bits.values())}


def _residuals(images: np.ndarray) -> np.ndarray:
    """R-G, G, B-G minus LOCO-I's prediction, uint8 as the input: modulo 256, so nothing is lost."""
    other = np.array([1, 0, 1], dtype=np.uint8)  # 128 is added because differences lie around 0,
    planes = images + other * (128 - images[..., 1:2])  # and would jump between 255 and 0
    padded = np.pad(planes, ((0, 0), (1, 0), (1, 0), (0, 0))).astype(np.int16)
    left, up, corner = padded[:, 1:, :-1], padded[:, :-1, 1:], padded[:, :-1, :-1]
    guess = np.clip(left + up - corner, np.minimum(left, up), np.maximum(left, up))
    return planes - guess.astype(np.uint8)
