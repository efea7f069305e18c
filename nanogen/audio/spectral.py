"""Spectra: how much of each frequency a sound has, moment by moment. Everything that looks at frequencies is built on this.

    waveform (B, T) --windows of n_fft samples, hop apart--> magnitudes (B, n_fft/2 + 1, frames) --mel, log--> (B, bands, frames)

A long window tells close frequencies apart, a short one tells moments apart, none does both. The ear hears ratios, of loudness
(hence the logarithm) and above 1 kHz of frequency (hence the mel scale: even steps of pitch up there, even steps in Hz below).

Magnitudes are amplitudes: a sine of amplitude A in the middle of a bin has magnitude A, whatever the window.

Source for the scale, linear below 1 kHz: Slaney 1998, "Auditory Toolbox". Different here: each filter's weights sum to 1,
so a band is an average, and no filter is narrower than the spectrum's own bins, so none is empty.
"""

import functools
import math

import torch
from torch import Tensor

from nanogen.data.folders import SAMPLE_RATE as RATE

FLOOR = 1e-5  # the quietest magnitude told apart: 100 dB below full scale, about the rounding noise of 16 bits


def stft(waveforms: Tensor, n_fft: int, hop: int | None = None) -> Tensor:
    """(B, T) -> complex64 (B, n_fft/2 + 1, T // hop + 1): frame i is centred on sample i hop; silence beyond both ends.

    Hann window; hop: n_fft / 4 samples unless told. Float32 also under autocast: 8 bits are not enough for a sum of squares.
    """
    with torch.autocast(waveforms.device.type, enabled=False):
        window = torch.hann_window(n_fft, device=waveforms.device)
        spectra = torch.stft(waveforms.float(), n_fft, hop or n_fft // 4, window=window, pad_mode="constant", return_complex=True)
        return spectra * (2 / window.sum())


def spectrogram(waveforms: Tensor, n_fft: int, hop: int | None = None) -> Tensor:
    """Magnitudes float32 (B, n_fft/2 + 1, frames) of waveforms (B, T); hop as in `stft`."""
    return stft(waveforms, n_fft, hop).abs()


def log_mel(waveforms: Tensor, bands: int = 64, n_fft: int = 256, hop: int = 64) -> Tensor:
    """Waveforms (B, T) in [-1, 1] at 8 kHz -> natural logarithm of the mel magnitudes, float32 (B, bands, T // hop + 1)."""
    return to_log_mel(spectrogram(waveforms, n_fft, hop), bands)


def to_log_mel(magnitudes: Tensor, bands: int, floor: float = FLOOR) -> Tensor:
    """Magnitudes (B, n_fft/2 + 1, frames) -> log(max(mel magnitude, floor)), float32 (B, bands, frames)."""
    filters = mel_filters(bands, 2 * (magnitudes.shape[1] - 1)).to(magnitudes.device)
    with torch.autocast(magnitudes.device.type, enabled=False):
        return (filters @ magnitudes).clamp(min=floor).log()


@functools.lru_cache(maxsize=16)
def mel_filters(bands: int, n_fft: int, rate: int = RATE) -> Tensor:
    """Triangles (bands, n_fft/2 + 1), evenly spaced in mel from 0 to rate / 2 Hz, each row with sum 1.

    Raises ValueError for fewer than one band."""
    if bands < 1:
        raise ValueError(f"bands must be at least 1, got {bands}")
    edges = mel_to_hertz(torch.linspace(0, hertz_to_mel(rate / 2), bands + 2, dtype=torch.float64))
    bins = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    centres, below, above = edges[1:-1, None], edges[1:-1] - edges[:-2], edges[2:] - edges[1:-1]
    below, above = (width.clamp(min=rate / n_fft)[:, None] for width in (below, above))
    distance = bins - centres  # (bands, bins)
    triangles = (1 - torch.where(distance < 0, -distance / below, distance / above)).clamp(min=0)
    return (triangles / triangles.sum(1, keepdim=True)).float()


def hertz_to_mel(hertz: float) -> float:
    """200 / 3 Hz a mel up to 1,000 Hz, from there 27 mel for a factor of 6.4."""
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000, 6.4)


def mel_to_hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
