"""Spectra: how much of each frequency a sound contains, moment by moment.

    waveform (B, T) -> magnitudes (B, n_fft/2 + 1, frames) -> mel, log -> (B, bands, frames)

A long window separates close frequencies, a short one separates moments; no window does both. The
ear hears ratios: of loudness, hence the logarithm, and of frequency above 1 kHz, hence the mel
scale (even steps of pitch above 1 kHz, even steps in Hz below). Magnitudes are amplitudes: a sine
of amplitude A in the middle of a bin has magnitude A, whatever the window.

Source of the scale: Slaney 1998, "Auditory Toolbox". Different here: each filter's weights sum to
1, so a band is an average; and no filter is narrower than the spectrum's bins, so none is empty.
"""

import functools
import math

import torch
from torch import Tensor

from nanogen.data.sources import SAMPLE_RATE as RATE

FLOOR = 1e-5  # smaller magnitudes count as this one: -100 dB, about the rounding noise of 16 bits


def stft(waveforms: Tensor, n_fft: int, hop: int | None = None) -> Tensor:
    """(B, T) -> complex64 (B, n_fft/2 + 1, T // hop + 1), frame i around sample i hop. Hann window;
    hop: n_fft / 4 unless told. Float32 also under autocast: 8 bits are too few for the sums."""
    with torch.autocast(waveforms.device.type, enabled=False):
        window = torch.hann_window(n_fft, device=waveforms.device)
        spectra = torch.stft(waveforms.float(), n_fft, hop or n_fft // 4, window=window,
                             pad_mode="constant", return_complex=True)
        return spectra * (2 / window.sum())


def spectrogram(waveforms: Tensor, n_fft: int, hop: int | None = None) -> Tensor:
    """Magnitudes float32 (B, n_fft/2 + 1, frames) of waveforms (B, T); hop as in `stft`."""
    return stft(waveforms, n_fft, hop).abs()


def log_mel(waveforms: Tensor, bands: int = 64, n_fft: int = 256, hop: int = 64) -> Tensor:
    """Waveforms (B, T) at 8 kHz -> log of the mel magnitudes, float32 (B, bands, T // hop + 1)."""
    return to_log_mel(spectrogram(waveforms, n_fft, hop), bands)


def to_log_mel(magnitudes: Tensor, bands: int, floor: float = FLOOR) -> Tensor:
    """Magnitudes (B, n_fft/2 + 1, frames) -> log(max(mel magnitude, floor)), (B, bands, frames)."""
    filters = mel_filters(bands, 2 * (magnitudes.shape[1] - 1)).to(magnitudes.device)
    with torch.autocast(magnitudes.device.type, enabled=False):
        return (filters @ magnitudes).clamp(min=floor).log()


@functools.lru_cache(maxsize=16)
def mel_filters(bands: int, n_fft: int, rate: int = RATE) -> Tensor:
    """Triangles (bands, n_fft/2 + 1), evenly spaced in mel from 0 to rate / 2 Hz, rows of sum 1."""
    if bands < 1:
        raise ValueError(f"bands must be at least 1, got {bands}")
    edges = mel_to_hertz(torch.linspace(0, hertz_to_mel(rate / 2), bands + 2, dtype=torch.float64))
    bins = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    widths = edges.diff().clamp(min=rate / n_fft)
    distance = bins - edges[1:-1, None]  # (bands, bins)
    sides = torch.where(distance < 0, -distance / widths[:-1, None], distance / widths[1:, None])
    triangles = (1 - sides).clamp(min=0)
    return (triangles / triangles.sum(1, keepdim=True)).float()


def hertz_to_mel(hertz: float) -> float:
    """200 / 3 Hz a mel up to 1,000 Hz, from there 27 mel for a factor of 6.4."""
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000, 6.4)


def mel_to_hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
